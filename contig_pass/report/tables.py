"""The tables of a report as text."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from tabulate import tabulate

from contig_pass.provenance import repeated
from contig_pass.report.copies import NEEDED, VERDICTS, Copy
from contig_pass.report.model import Row
from contig_pass.report.place import Place
from contig_pass.report.rolling import kind_of_copy, kind_of_row, modules_of, rolled_up
from contig_pass.report.units import in_bytes, in_microseconds

WIDTH = 100
_Item = TypeVar("_Item", Row, Copy)


def fixes_table(fixes: Iterable[Row], width: int) -> str:
    """The copies that the pass made."""
    return _table("fixes", rolled_up(fixes, kind_of_row), _fix_cells, _FIX_COLUMNS, width)


def skips_table(skips: Iterable[Row], width: int) -> str:
    """The uses that were left alone."""
    return _table("left alone", rolled_up(skips, kind_of_row), _skip_cells, _SKIP_COLUMNS, width)


def copies_section(copies: Sequence[Copy], width: int) -> str:
    """What becomes of the program's own copies; those that are needed are only counted.

    Empty where the program asks for none.
    """
    if not copies:
        return ""
    counts = ((verdict, sum(c.verdict == verdict for c in copies)) for verdict in VERDICTS)
    told = ", ".join(f"{count} {verdict}" for verdict, count in counts if count)
    heading = f"copies in your own program: {told}"
    shown = [copy for copy in copies if copy.verdict != NEEDED]
    if not shown:
        return heading
    groups = rolled_up(shown, kind_of_copy)
    return _table(heading, groups, _copy_cells, _COPY_COLUMNS, width)


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
_COPY_COLUMNS = (("where", 28), ("call", 15), ("before -> after", 22), ("why", 29))


def _table(
    title: str,
    groups: Iterable[Sequence[_Item]],
    cells: Callable[[Sequence[_Item]], tuple[str, ...]],
    columns: Sequence[tuple[str, int]],
    width: int,
) -> str:
    spare = width - WIDTH
    widths = [size + (spare if i == len(columns) - 2 else 0) for i, (_, size) in enumerate(columns)]
    body = [
        [_fold(cell, size) for cell, size in zip(cells(group), widths, strict=True)]
        for group in groups
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
    reason = row.reason.replace("; ", "\n")
    return (_where(rows, _module(rows)), _operand(row), reason, memory, cost)


def _skip_cells(rows: Sequence[Row]) -> tuple[str, ...]:
    row = rows[0]
    rules = "".join(f"\nnot kept: {rule}" for rule in row.rules)
    return (_where(rows, _module(rows)), _operand(row), _place(row.before), row.reason + rules)


def _copy_cells(copies: Sequence[Copy]) -> tuple[str, ...]:
    copy = copies[0]
    called = f"{copy.call}\n{copy.dtype}[{_numbers(copy.shape)}]"
    memory = _place(copy.before)
    if copy.nbytes != 0:
        memory += f" ->\n{_place(copy.after)}\n"
        memory += _price(sum(c.nbytes or 0 for c in copies), copies) if copy.nbytes else "symbolic"
    return (_where(copies, modules_of(copies)), called, memory, f"{copy.verdict}: {copy.proof}")


def _price(nbytes: int, copies: Sequence[Copy]) -> str:
    return f"{in_bytes(nbytes)}, {in_microseconds(sum(c.microseconds or 0.0 for c in copies))}"


def _module(rows: Sequence[Row]) -> str:
    return repeated(rows[0].module) or "top level"


def _where(rows: Sequence[Row] | Sequence[Copy], module: str) -> str:
    row = rows[0]
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
    named = "" if row.parameter in (None, "?") else f"\nof {repeated(row.parameter)}"
    return f"{op}\n{row.operand}\n{row.dtype}[{_numbers(row.shape)}]{named}"


def _place(place: Place) -> str:
    return f"({_numbers(place.strides)}) @{place.offset} a{place.alignment}"


def _numbers(values: Iterable[int | str]) -> str:
    return ", ".join(map(str, values))
