"""A report as text: tables that fit 100 columns, then the graph diff.

Rows of equal blocks are rolled up: ``blocks.*.attn.q x40`` with bytes and times summed.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from contig_pass.provenance import repeated
from contig_pass.report.model import Report
from contig_pass.report.rolling import kind_of_hunk, rolled_up
from contig_pass.report.tables import WIDTH, copies_section, fixes_table, skips_table
from contig_pass.report.units import in_bytes, in_microseconds

_LEGEND = "memory is written (strides in elements) @byte offset, aligned to N bytes: aN"


def to_text(report: Report, width: int = WIDTH) -> str:
    """The whole report: headline, totals, fixes, skips, the program's own copies, graph diff."""
    sections = [_headline(report, width)]
    copies = copies_section(report.copies, width)
    if report.rows or copies:
        sections.append(_LEGEND)
    if report.fixes:
        sections.append(fixes_table(report.fixes, width))
    if report.skips:
        sections.append(skips_table(report.skips, width))
    if copies:
        sections.append(copies)
    if report.hunks:
        sections.append(render_diff(report, width))
    return "\n\n".join(sections) + "\n"


def render_diff(report: Report, width: int = WIDTH) -> str:
    """The graph diff: each node as ``name: dtype[shape][strides]@byte offset = op(...)``."""
    lines = ["graph diff (dtype[shape][strides]@byte offset)"]
    for hunks in rolled_up(report.hunks, kind_of_hunk):
        count = f" x{len(hunks)}, the first:" if len(hunks) > 1 else ""
        lines.append(f"@@ {repeated(hunks[0].module) or 'top level'}{count}")
        for mark, line in hunks[0].lines:
            lines += textwrap.wrap(
                line, width, initial_indent=f"{mark} ", subsequent_indent=f"{mark}     "
            )
    return "\n".join(lines)


# -- headline ------------------------------------------------------------------------------------


def _headline(report: Report, width: int) -> str:
    totals = report.totals
    about = f"contig_pass report: graph {report.graph or 'unnamed'}, policy {report.policy}"
    if report.targets:
        about += f", judged by {', '.join(report.targets)}"
    lines = [about]
    if not totals.uses:
        lines.append(f"no use that a contract binds, in {totals.nodes} nodes")
        return _wrapped(lines, width)
    if report.clean:
        lines.append(f"clean: {totals.uses} uses checked, nothing inserted")
    else:
        lines.append(
            f"{totals.uses} uses checked: {totals.clean} clean, {totals.fixed_uses} fixed by "
            f"{totals.fixes} {'copy' if totals.fixes == 1 else 'copies'}, {totals.skips} left "
            "alone with a reason"
        )
    if totals.fixes:
        moved, spent = in_bytes(totals.nbytes), in_microseconds(totals.microseconds)
        lines.append(f"the copies move {moved} in {spent} (modelled; {report.bandwidth})")
    if totals.preparable:
        lines.append(
            f"{in_bytes(totals.preparable)} of that are parameters, copied on every call: "
            "contig_pass.prepare(model, ...) copies them once"
        )
    checks = f", {totals.checks} looked at when the graph runs" if totals.checks else ""
    passed = "from a compile cache, " if report.cached else ""
    lines.append(
        f"{totals.pins} layouts held{checks}; {passed}pass time {report.seconds * 1e3:.1f} ms"
    )
    return _wrapped(lines, width)


def _wrapped(lines: Iterable[str], width: int) -> str:
    return "\n".join(textwrap.fill(line, width, subsequent_indent="  ") for line in lines)
