"""A report as text: tables that fit 100 columns, then the graph diff.

Rows of equal blocks are rolled up: ``blocks.*.attn.q x40`` with bytes and times summed.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Iterable, Sequence

from tabulate import tabulate

from contig_pass.provenance import repeated
from contig_pass.report.model import Place, Report, Row
from contig_pass.report.rolling import kind_of_hunk, kind_of_row, rolled_up
from contig_pass.report.units import in_bytes, in_microseconds

WIDTH = 100
_LEGEND = "memory is written (strides in elements) @byte offset, aligned to N bytes: aN"


def to_text(report: Report, width: int = WIDTH) -> str:
    """The whole report: headline, totals, fixes, skips, graph diff."""
    sections = [_headline(report, width)]
    if report.rows:
        sections.append(_LEGEND)
    if report.fixes:
        sections.append(_table("fixes", report.fixes, _fix_cells, _FIX_COLUMNS, width))
    if report.skips:
        sections.append(_table("left alone", report.skips, _skip_cells, _SKIP_COLUMNS, width))
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


# -- tables --------------------------------------------------------------------------------------

_WHERE = 23
#: Header and widest column text; with tabulate's two spaces between columns the sum is the width.
_FIX_COLUMNS = (
    ("where", _WHERE),
    ("operand", 16),
    ("what was wrong", 21),
    ("before -> after", 24),
    ("cost", 8),
)
_SKIP_COLUMNS = (("where", 28), ("operand", 18), ("layout", 19), ("why", 29))

_Cells = Callable[[Sequence[Row]], tuple[str, ...]]


def _table(
    title: str, rows: Iterable[Row], cells: _Cells, columns: Sequence[tuple[str, int]], width: int
) -> str:
    spare = width - WIDTH
    widths = [size + (spare if i == len(columns) - 2 else 0) for i, (_, size) in enumerate(columns)]
    body = [
        [_fold(cell, size) for cell, size in zip(cells(group), widths, strict=True)]
        for group in rolled_up(rows, kind_of_row)
    ]
    table = tabulate(body, [name for name, _ in columns], tablefmt="simple")
    return f"{title}\n{table}"


def _fold(text: str, width: int) -> str:
    """``text`` in lines of at most ``width`` characters; words longer than that are cut."""
    return "\n".join(
        part for line in text.splitlines() for part in textwrap.wrap(line, width) or [""]
    )


def _fix_cells(rows: Sequence[Row]) -> tuple[str, ...]:
    row = rows[0]
    moved = sum(r.nbytes or 0 for r in rows)
    cost = "symbolic" if row.nbytes is None else in_bytes(moved)
    if row.nbytes is not None:
        cost += f"\n{in_microseconds(sum(r.microseconds or 0.0 for r in rows))}"
    if row.fused:
        cost += "\nfused"
    after = row.after or row.before
    memory = f"{_place(row.before)} ->\n{_place(after)}\n{row.order}, in {row.copy}"
    return (_where(rows), _operand(row), row.reason.replace("; ", "\n"), memory, cost)


def _skip_cells(rows: Sequence[Row]) -> tuple[str, ...]:
    row = rows[0]
    rules = "".join(f"\nnot kept: {rule}" for rule in row.rules)
    return (_where(rows), _operand(row), _place(row.before), row.reason + rules)


def _where(rows: Sequence[Row]) -> str:
    row = rows[0]
    module = repeated(row.module) or "top level"
    count = f" x{len(rows)}" if len(rows) > 1 else ""
    source = _short_line(row.file, row.lineno) if row.file else "no source line"
    return f"{module}{count}\n{source}\n{row.code}"


def _short_line(path: str, lineno: int) -> str:
    """The file's folder, name and line, without the folder where that would not fit a column."""
    folder, name = path.split(os.sep)[-2:] if os.sep in path else ("", path)
    line = f"{name}:{lineno}"
    return f"{folder}/{line}" if folder and len(folder) + len(line) < _WHERE else line


def _operand(row: Row) -> str:
    op = row.op.removesuffix(".default")
    return f"{op}\n{row.operand}\n{row.dtype}[{_numbers(row.shape)}]"


def _place(place: Place) -> str:
    return f"({_numbers(place.strides)}) @{place.offset} a{place.alignment}"


def _numbers(values: Iterable[int | str]) -> str:
    return ", ".join(map(str, values))
