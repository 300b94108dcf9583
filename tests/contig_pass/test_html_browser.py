"""The HTML report in a real Chromium: load, filter, sort, open, fold, find; hostile and large."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from contig_pass.report.model import Hunk, Listing
from tests.browser import Page
from tests.reports import layer, report, row, sample, skip

Show = Callable[..., Page]


def column(page: Page, label: str) -> list[str]:
    return page.js(f"[...document.querySelectorAll('.row td[data-label={label}]')]"
                   ".map(e => e.textContent.trim())")


def choose(page: Page, name: str, value: str) -> None:
    page.js(f"(() => {{ const e = filters.elements[{name!r}]; e.value = {value!r}; "
            "e.dispatchEvent(new Event('input', {bubbles: true})); "
            "e.dispatchEvent(new Event('change', {bubbles: true})); })()")
    page.settle()


# -- rows ----------------------------------------------------------------------------------------


def test_it_loads(show: Show, tmp_path: Path) -> None:
    page = show(sample(tmp_path))
    assert page.text(".verdict") == "6 copies make 6 uses legal; 1 use breaks its contract"
    assert page.text("#count") == "4 rows of 4, for 7 uses"
    assert column(page, "module") == ["blocks.*.attn.q \u00d74", "head", "blocks.*.fc", "head"]
    assert column(page, "bytes") == ["2.0 kB", "9.0 kB", "10.0 kB", "\u2013"]
    assert column(page, "source")[0] == "model.py:20"
    assert page.js("document.querySelector('noscript').getClientRects().length") == 0


def test_filters(show: Show, tmp_path: Path) -> None:
    page = show(sample(tmp_path))
    for name, value, operands in [
        ("kind", "left alone", ["aten::_int_mm self"]),
        ("module", "head", ["aten::mm mat2", "aten::_int_mm self"]),
        ("op", "aten::mm", ["aten::mm mat2"]),
        ("rule", "dense", ["aten::mm mat2"]),
    ]:
        choose(page, name, value)
        assert column(page, "operand") == operands
        page.click("#filters button[type=reset]")
        assert len(column(page, "operand")) == 4
    page.js("filters.elements.text.focus()")
    page.type("MODEL.py step_20")
    assert page.text("#count") == "1 row of 4, for 4 uses"
    choose(page, "kind", "left alone")
    assert page.text("#count") == "0 rows of 4, for 0 uses"


def test_sorting(show: Show, tmp_path: Path) -> None:
    page = show(sample(tmp_path))
    page.click("[data-key=bytes] button")
    assert column(page, "bytes") == ["10.0 kB", "9.0 kB", "2.0 kB", "\u2013"]
    assert page.js("document.querySelector('[data-key=bytes]').ariaSort") == "descending"
    page.click("[data-key=bytes] button")
    assert column(page, "bytes") == ["\u2013", "2.0 kB", "9.0 kB", "10.0 kB"]
    page.click("[data-key=us] button")
    assert column(page, "time")[0] == "10.0 us"
    assert page.js("document.querySelector('[data-key=bytes]').ariaSort") == "none"
    page.click("[data-key=module] button")
    assert column(page, "module")[0] == "blocks.*.attn.q \u00d74"


def test_a_row_opens_the_source_line(show: Show, tmp_path: Path) -> None:
    page = show(sample(tmp_path))
    page.click("#row-0 td[data-label=why]")
    assert page.text("#detail-0 .here").split() == ["20", "step_20(x)"]
    assert page.js("document.querySelectorAll('#detail-0 .excerpt div').length") == 11
    assert f"{tmp_path}/model.py:20" in page.text("#detail-0")
    link = page.js("document.querySelector('#detail-0 a').href")
    assert link == f"vscode://file{tmp_path}/model.py:20"
    cells = "[...document.querySelectorAll('#detail-0 .places tbody td')].map(e => e.innerText)"
    assert page.js(cells) == ["(131, 1)", "1", "1", "(128, 1)", "0", "64"]
    page.click("#detail-0 details summary")
    assert "blocks.3.attn.q: _scaled_mm_3 reads contiguous_default_3" in page.text("#detail-0")
    page.click("#row-0 .toggle")
    assert page.js("document.getElementById('detail-0')") is None


def test_the_place_is_copied_without_a_network(show: Show, tmp_path: Path) -> None:
    page = show(sample(tmp_path))
    page.click("#row-0 .toggle")
    page.js("document.addEventListener('copy', () => { "
            "const a = document.activeElement; "
            "window.copied = a.value.slice(a.selectionStart, a.selectionEnd); })")
    page.js("navigator.clipboard && Object.defineProperty(navigator.clipboard, 'writeText', "
            "{value: () => Promise.reject(new Error('refused'))})")
    page.click("#detail-0 .actions button")
    assert page.js("window.copied") == f"{tmp_path}/model.py:20"
    assert page.text("#detail-0 .actions button") == "Copied"


def test_many_rows_come_in_pages(show: Show) -> None:
    rows = [row(operand=f"x{n}", copy=f"c{n}") for n in range(250)]
    page = show(report(rows))
    assert len(column(page, "operand")) == 100
    page.click("#more button")
    assert len(column(page, "operand")) == 200
    assert page.js("document.activeElement.closest('tr').id") == "row-100"
    page.click("#more button")
    assert len(column(page, "operand")) == 250
    assert page.js("document.querySelector('#more button')") is None


# -- graph ---------------------------------------------------------------------------------------


def test_the_graph_stands_side_by_side(show: Show, tmp_path: Path) -> None:
    page = show(sample(tmp_path))
    summaries = "[...document.querySelectorAll('.block > summary')].map(e => e.textContent)"
    assert page.js(summaries) == [
        "blocks.0 \u00d74, the first shown: 27 nodes, 3 changed lines, 1 copy",
        "blocks.1 \u2026 blocks.3: 81 nodes like those above",
    ]
    assert page.text(".pair.changed .side.old").endswith("= mm(x, slice_0)")
    marks = "[...document.querySelectorAll('.pair.changed mark')].map(e => e.textContent)"
    assert page.js(marks) == ["slice_0", "contiguous_default_0"]
    added = page.js("document.querySelector('.pair.changed .side.new').innerText")
    assert "contiguous_default_0 bfloat16[128][1]@0 a64" in added
    left, right = page.js("['old', 'new'].map(k => [...document.querySelectorAll(`.pair.changed "
                          ".side.${k}`)].at(-1).getBoundingClientRect()).map(r => [r.x, r.y])")
    assert left[0] < right[0]
    assert left[1] == right[1]


def test_unchanged_runs_fold(show: Show, tmp_path: Path) -> None:
    page = show(sample(tmp_path))
    assert page.text(".run summary") == "10 unchanged nodes"
    count = "document.querySelectorAll('.pair').length"
    before = page.js(count)
    page.click(".run summary")
    assert page.js(count) == before + 10
    assert "mul_0 " in page.text(".run")
    page.click(".run summary")
    assert "mul_0 " not in page.text(".run")
    page.click("#fold-all")
    assert "slice_0" not in page.text("#graphs")
    page.click("#open-changes")
    assert "slice_0" in page.text("#graphs")


def test_a_row_shows_its_node_in_the_graph(show: Show, tmp_path: Path) -> None:
    page = show(sample(tmp_path))
    page.click("#fold-all")
    page.click("#row-0 .toggle")
    page.click("#detail-0 .actions:not(:has(code)) button")
    assert page.js("document.activeElement.querySelector('.new b').innerText") == "_scaled_mm_0"
    box = page.js("(() => { const r = document.activeElement.getBoundingClientRect(); "
                  "return [r.top, innerHeight - r.bottom]; })()")
    assert min(box) > 0


def test_finding_in_the_graph_opens_what_is_folded(show: Show, tmp_path: Path) -> None:
    page = show(sample(tmp_path))
    page.click("#finder input")
    page.type("x_2,")
    assert page.text("#found") == "1 line"
    page.press("Enter")
    assert page.text("#found") == "line 1 of 1"
    assert page.text(".target b") == "mul_2"
    page.js("byId('finder').elements.text.value = ''")
    page.type("mul_")
    page.click("#previous")
    assert page.text("#found") == "line 24 of 24"
    page.press("Enter")  # on the button: one more back
    assert page.text("#found") == "line 23 of 24"


def test_hunks_are_shown_where_no_graph_was_kept(show: Show) -> None:
    page = show(report([row()], hunks=[layer(0), layer(1)]))
    assert "only what stands around each fix was kept" in page.text("#graphs")
    assert "blocks.*.attn.q \u00d72, the first shown" in page.text("#graphs")
    page = show(report([row()]))
    assert page.text("#graphs") == "This report keeps no graph."


# -- hostile, large ------------------------------------------------------------------------------


def test_hostile_names_do_nothing(show: Show) -> None:
    bad = "</script><img src=x onerror=window.hacked=1><b onclick=1>\"'&lt;`${window.hacked=1}"
    fields = {"module": bad, "op": bad, "operand": bad, "reason": bad, "rules": (bad,),
              "node": "n", "file": f"/{bad}", "lineno": 3, "code": bad, "source": bad,
              "device": bad, "parameter": bad}
    hunk = Hunk(bad, ((" ", bad), ("-", f"n: {bad} = {bad}"), ("+", f"n: {bad} = {bad}!")))
    page = show(report([row(**fields), skip(**fields)], [hunk], graph=bad, bandwidth=bad,
                       listings=(Listing(bad, (hunk,)),), targets=(bad,)))
    page.click("#row-0 .toggle")
    page.click("#open-changes")
    page.click("#detail-0 .actions:not(:has(code)) button")
    assert page.js("document.querySelectorAll('img, main b[onclick]').length") == 0
    assert page.js("window.hacked") is None
    assert column(page, "why") == [bad, bad]
    assert page.text(".target .new .memory") == bad
    assert page.js("document.querySelector('#detail-0 a').protocol") == "vscode:"


def test_twenty_thousand_nodes(show: Show) -> None:
    def part(number: int) -> Hunk:
        lines = layer(number, unchanged=248).lines
        return Hunk(f"part{number}x.attn", lines)  # no two modules alike: nothing rolls up

    rows = [row(module=f"part{n}x.attn", node=f"_scaled_mm_{n}", copy=f"c{n}") for n in range(40)]
    page = show(report(rows, [part(number) for number in range(40)]))
    assert page.js("DATA.graphs[0].blocks.reduce((sum, b) => sum + b.nodes, 0)") == 40 * 499
    assert page.js("performance.getEntriesByType('navigation')[0].duration") < 5000
    assert page.js("document.querySelectorAll('*').length") < 10_000
    page.click("#finder input")
    page.type("mul_19400:")
    page.press("Enter")
    assert page.text("#found") == "line 1 of 1"
    assert page.text(".target b") == "mul_19400"
    page.click("#open-changes")
    assert page.js("document.querySelectorAll('.block[open]').length") == 40


def test_one_long_run_of_changes_comes_in_pages(show: Show) -> None:
    lines = tuple(("+", f"n{at}: f32[1][1]@0 a64 = f(x)") for at in range(1000))
    page = show(report([row()], [Hunk("m", lines)]))
    page.click("#open-changes")
    assert page.js("document.querySelectorAll('.pair').length") == 300
    page.click(".block > button")
    assert page.js("document.querySelectorAll('.pair').length") == 600
    page.click("#finder input")
    page.type("n999:")
    page.press("Enter")
    assert page.text(".target b") == "n999"
