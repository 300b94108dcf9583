"""The HTML report for everyone: keyboard, names, contrast, phone, paper, without scripts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.browser import Page
from tests.reports import layer, report, row, sample

Show = Callable[..., Page]


# -- keyboard and names --------------------------------------------------------------------------


def test_the_keyboard_reaches_and_works_everything(show: Show, tmp_path: Path) -> None:
    page = show(sample(tmp_path))
    page.press("Tab")
    assert page.js("document.activeElement.className") == "jump"
    assert page.js("document.activeElement.getBoundingClientRect().x") > 0
    page.press("Enter")
    order = []
    for _ in range(25):
        page.press("Tab")
        order.append(page.js(
            "(e => e.name || (e.closest('th') ? 'sort ' + e.closest('th').dataset.key : '')"
            " || e.className || e.id || e.tagName)(document.activeElement)"))
        style = page.js("(s => [s.outlineStyle, parseFloat(s.outlineWidth)])"
                        "(getComputedStyle(document.activeElement))")
        assert style[0] != "none"
        assert style[1] >= 2
    assert order[:5] == ["text", "kind", "module", "op", "rule"]
    assert order[6:8] == ["sort kind", "sort module"]
    assert order[14:18] == ["toggle"] * 4
    page.js("document.querySelector('#row-0 .toggle').focus()")
    for key in ("Enter", " "):
        page.press(key)
        assert page.js("document.activeElement.ariaExpanded") == "true"
        controlled = page.js("document.activeElement.getAttribute('aria-controls')")
        assert page.js(f"document.getElementById({controlled!r}) !== null")
        page.press(key)
        assert page.js("document.activeElement.ariaExpanded") == "false"
    page.js("document.querySelector('.run summary').focus()")
    for key, is_open in (("Enter", True), (" ", False)):
        page.press(key)
        assert page.js("document.activeElement.parentElement.open") is is_open
    page.js("document.querySelector('[data-key=op] button').focus()")
    page.press(" ")
    assert page.js("document.querySelector('[data-key=op]').ariaSort") == "ascending"
    assert page.js("document.activeElement.textContent") == "operand"


def test_everything_that_can_be_used_has_a_name(show: Show, tmp_path: Path) -> None:
    page = show(sample(tmp_path))
    page.click("#row-0 .toggle")
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    used = {"button", "link", "combobox", "searchbox", "textbox", "DisclosureTriangle", "region",
            "table", "columnheader", "search"}
    named = [(node["role"]["value"], node.get("name", {}).get("value", ""))
             for node in nodes if not node["ignored"] and node["role"]["value"] in used]
    assert {"button", "combobox", "searchbox", "link", "table"} <= {role for role, _ in named}
    assert [role for role, name in named if not name] == []
    names = [name for role, name in named if role == "button" and name.startswith("details of")]
    assert names[0] == "details of aten::_scaled_mm bias in blocks.*.attn.q"


# -- screens, print, schemes ---------------------------------------------------------------------

#: Text whose contrast with what is painted behind it falls short of WCAG 2.1 AA.
_TOO_FAINT = """
(() => {
  const parse = (c) => {
    const n = c.match(/[\\d.]+/g).map(Number);
    return [...n.slice(0, 3), n[3] ?? 1];
  };
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c[3] === 1) return c;
      if (c[3] !== 0) throw new Error('half transparent');
    }
    throw new Error('no background');
  };
  const found = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let seen = 0;
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || !e.getClientRects().length) continue;
    if (e.closest('.hidden')) continue;
    seen++;
    const both = [parse(getComputedStyle(e).color), behind(e)].map(light);
    const ratio = (Math.max(...both) + .05) / (Math.min(...both) + .05);
    if (ratio < 4.5) found.push(`${e.tagName}.${e.className}: ${e.textContent}`);
  }
  return [seen, found];
})()
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_is_readable(show: Show, tmp_path: Path, scheme: str) -> None:
    page = show(sample(tmp_path))
    page.media("screen", scheme)
    for number in (0, 3):
        page.click(f"#row-{number} .toggle")
    page.click("#open-changes")
    page.click(".run summary")
    page.settle()
    seen, faint = page.js(_TOO_FAINT)
    assert seen > 150
    assert faint == []
    dark = page.js("getComputedStyle(document.body).backgroundColor") == "rgb(18, 22, 29)"
    assert dark is (scheme == "dark")


def test_a_phone_needs_no_sideways_scrolling(show: Show, tmp_path: Path) -> None:
    page = show(sample(tmp_path))
    page.shape(320, 640)
    page.click("#row-0 .toggle")
    page.click("#open-changes")
    page.settle()
    assert page.js("document.documentElement.scrollWidth") == 320
    # The two sides stand one below the other, and what did not change is shown once.
    left, right = page.js("['old', 'new'].map(k => [...document.querySelectorAll(`.pair.changed "
                          ".side.${k}`)].at(-1).getBoundingClientRect()).map(r => [r.x, r.y])")
    assert left[0] == right[0]
    assert left[1] < right[1]
    assert page.js("document.querySelector('.pair.same .after').getClientRects().length") == 0
    page.js("(e => { e.value = 'bytes down'; e.dispatchEvent(new Event('change')); })"
            "(filters.elements.sort)")
    assert page.text(".row td[data-label=bytes]") == "10.0 kB"


def test_print_shows_all_rows_and_no_controls(show: Show) -> None:
    rows = [row(operand=f"x{n}", copy=f"c{n}") for n in range(250)]
    page = show(report(rows, [layer(0)]))
    assert page.pdf().startswith(b"%PDF")
    assert page.js("document.querySelectorAll('.row').length") == 250
    page.media("print")
    hidden = ("#filters", "#finder", ".toggle", "#more")
    assert all(page.js(f"document.querySelector({one!r}).getClientRects().length") == 0
               for one in hidden)
    assert "contiguous_default_0" in page.text("#graphs")


def test_without_scripts_the_text_report_is_shown(show: Show, tmp_path: Path) -> None:
    page = show(sample(tmp_path))
    page.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        page.open(tmp_path / "report.html")
        shown = page.js("document.body.innerText")
    finally:
        page.call("Emulation.setScriptExecutionDisabled", value=False)
    assert "contig_pass report: graph model__0_inference_0" in shown
    assert "Find in the graph" not in shown
    assert "6 copies make 6 uses legal" in shown
