"""Reports as one HTML file that needs no network.

The page's data lies in it as JSON, which its script shows piece by piece, so that a graph of
20,000 nodes opens at once. Nothing from a report is ever markup: Python escapes what it writes, the
script sets text, and the page's security policy runs no script and loads nothing but what is named
in it by hash. Without scripts the page shows the report as text.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Sequence
from html import escape
from importlib import resources
from string import Template

from contig_pass.plan import AUDIT
from contig_pass.report.model import Report, Totals, merge
from contig_pass.report.page.chart import chart
from contig_pass.report.page.data import page_data
from contig_pass.report.text import to_text
from contig_pass.report.units import in_bytes, in_microseconds

_SCRIPTS = ("page.js", "rows.js", "graph.js")


def to_html(reports: Sequence[Report]) -> str:
    """``reports`` as one self-contained page.

    Raises:
        ValueError: no reports given.
    """
    whole = merge(list(reports))
    style, script = _asset("page.css"), "\n".join(map(_asset, _SCRIPTS))
    policy = (
        f"default-src 'none'; style-src 'sha256-{_hash(style)}'; "
        f"script-src 'sha256-{_hash(script)}'; base-uri 'none'; form-action 'none'"
    )
    return Template(_asset("page.html")).substitute(
        policy=escape(policy),
        style=style,
        script=script,
        title=escape(f"contig_pass: {whole.graph or 'unnamed'}"),
        verdict=_verdict(whole),
        facts=_facts(whole, len(reports)),
        totals=_totals(whole),
        chart=chart(reports),
        bandwidth=escape(whole.bandwidth or "nothing was priced"),
        data=_embedded(page_data(reports)),
        text=escape("\n".join(map(to_text, reports))),
    )


def _verdict(report: Report) -> str:
    """The outcome in one sentence, in an element that is coloured by it."""
    totals = report.totals
    kind, words = "good", f"{totals.uses:,} uses checked, nothing to repair"
    unkept = sum(bool(row.rules) for row in report.skips)
    if not totals.uses:
        kind, words = "quiet", f"no use that a contract binds, in {totals.nodes:,} nodes"
    elif totals.fixes:
        copies = "1 copy makes" if totals.fixes == 1 else f"{totals.fixes:,} copies make"
        uses = "1 use" if totals.fixed_uses == 1 else f"{totals.fixed_uses:,} uses"
        kind, words = "good", f"{copies} {uses} legal"
    if unkept:
        broken = "1 use breaks its contract" if unkept == 1 else f"{unkept:,} uses break theirs"
        audit = " (policy audit changes nothing)" if report.policy == AUDIT else ""
        words = f"{words}; {broken}{audit}" if totals.fixes else f"{broken}{audit}"
        kind = "bad"
    return f'<p class="verdict {kind}">{escape(words)}</p>'


def _facts(report: Report, count: int) -> str:
    """What was judged and how, as a list of names and values."""
    graphs = report.graph.split(", ")
    named = f"{len(graphs)} graphs" if len(graphs) > 1 else report.graph or "unnamed"
    facts = [
        ("graph", named),
        ("policy", report.policy),
        ("judged by", ", ".join(report.targets) or "no contract"),
    ]
    if report.seconds:
        facts.append(("pass time", f"{report.seconds * 1e3:.1f} ms"))
    if report.cached:
        facts.append(("from", "a compile cache"))
    if count > 1:
        facts.append(("reports", str(count)))
    return "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)


def _totals(report: Report) -> str:
    totals: Totals = report.totals
    cards = [
        ("uses checked", f"{totals.uses:,}", f"in {totals.nodes:,} nodes"),
        ("clean", f"{totals.clean:,}", "legal as they were"),
        ("fixed", f"{totals.fixed_uses:,}", f"by {totals.fixes:,} copies"),
        ("left alone", f"{totals.skips:,}", "each with a reason"),
        ("moved a call", in_bytes(totals.nbytes), "read plus written"),
        ("time a call", in_microseconds(totals.microseconds), "modelled, not measured"),
    ]
    if totals.preparable:
        cards.append(("prepare saves", in_bytes(totals.preparable), "of that, on every call"))
    held = f"{totals.checks:,} looked at when it runs" if totals.checks else "the compiler keeps"
    cards.append(("layouts held", f"{totals.pins:,}", held))
    return "".join(
        f"<div><dt>{name}</dt><dd>{value} <small>{note}</small></dd></div>"
        for name, value, note in cards
    )


def _embedded(data: object) -> str:
    """``data`` as JSON that cannot end the element it stands in, nor open another."""
    text = json.dumps(data, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


@functools.cache
def _asset(name: str) -> str:
    return resources.files("contig_pass.report.page").joinpath(name).read_text("utf-8")


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
