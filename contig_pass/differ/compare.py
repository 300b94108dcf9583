"""What changed between two reports of one program.

A violation is a rule that a use breaks, or is not known to keep, whether a copy repairs it or not.
It is known by the module with block numbers rolled up, the op, the operand and the rule: that
stays while line numbers, node names and sizes move.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from contig_pass.errors import ReportError
from contig_pass.report.json import from_file
from contig_pass.report.model import FIX, Report, Row, merge


class Key(NamedTuple):
    """What a violation is known by.

    Attributes:
        module: dotted path, the block's number as ``*``; empty at the top.
        op, operand: the use.
        rule: the rule in words.
    """

    module: str
    op: str
    operand: str
    rule: str

    def __str__(self) -> str:
        return f"{self.module or 'top level'}: {self.op} {self.operand}, {self.rule}"


@dataclass(frozen=True)
class Violation:
    """All uses that share a key.

    Attributes:
        count: how many.
        fixed: how many of them a copy repairs.
        nbytes: bytes that their copies move, where known.
        layouts: type, sizes, strides and byte offset of each, without repeats, sorted.
    """

    count: int
    fixed: int
    nbytes: int
    layouts: tuple[str, ...]


@dataclass(frozen=True)
class Changes:
    """New, gone and changed violations, each sorted by key.

    Attributes:
        new: present now and not before.
        gone: present before and not now.
        changed: (key, before, now) where something differs.
        notes: settings in which the two reports differ.
    """

    new: tuple[tuple[Key, Violation], ...]
    gone: tuple[tuple[Key, Violation], ...]
    changed: tuple[tuple[Key, Violation, Violation], ...]
    notes: tuple[str, ...] = ()

    @property
    def worse(self) -> bool:
        """Whether there are new violations, or more of a kind that was there before."""
        return bool(self.new) or any(now.count > old.count for _, old, now in self.changed)


def violations(report: Report) -> dict[Key, Violation]:
    """The violations of ``report``; a strided operand that its kernel accepts is none."""
    rows: dict[Key, list[Row]] = {}
    for row in report.rows:
        for rule in row.rules:
            rows.setdefault(Key(_rolled_up(row.module), row.op, row.operand, rule), []).append(row)
    return {key: _joined(rows[key]) for key in sorted(rows)}


def compare(old: Report, new: Report) -> Changes:
    """What changed from ``old`` to ``new``."""
    before, now = violations(old), violations(new)
    notes = [
        f"the earlier report was made with {what} {was!r}, this one with {is_!r}"
        for what, was, is_ in (
            ("policy", old.policy, new.policy),
            ("target", ", ".join(old.targets), ", ".join(new.targets)),
            ("program", old.graph, new.graph),
        )
        if was and is_ and was != is_
    ]
    return Changes(
        new=tuple((key, now[key]) for key in now if key not in before),
        gone=tuple((key, before[key]) for key in before if key not in now),
        changed=tuple(
            (key, before[key], now[key])
            for key in now
            if key in before and before[key] != now[key]
        ),
        notes=tuple(notes),
    )


def read_report(path: str) -> Report:
    """The report in a file that ``--json`` wrote.

    Raises:
        ReportError: it cannot be read, or is no such file.
    """
    try:
        reports = from_file(json.loads(Path(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise ReportError(f"{path}: {error.strerror or error}") from error
    except ReportError as error:
        raise ReportError(f"{path}: {error}") from error
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        what = str(error).partition("\n")[0]
        raise ReportError(f"{path} is no report of contig-pass: {what}") from error
    if not reports:
        raise ReportError(f"{path} holds no report")
    return merge(reports)


def render(changes: Changes) -> str:
    """``changes`` as text, one line a violation."""
    lines = [f"note: {note}" for note in changes.notes]
    counts = [
        f"{len(rows)} {word}"
        for word, rows in (
            ("new", changes.new), ("gone", changes.gone), ("changed", changes.changed)
        )
    ]
    lines.append(f"since the earlier report: {', '.join(counts)}")
    lines += (f"+ {key} ({_said(violation)})" for key, violation in changes.new)
    lines += (f"- {key} ({_said(violation)})" for key, violation in changes.gone)
    lines += (f"~ {key} ({_difference(old, now)})" for key, old, now in changes.changed)
    return "\n".join(lines)


def _rolled_up(module: str) -> str:
    """``blocks.7.ffn.2`` as ``blocks.*.ffn.2``: what follows the block's number tells two layers of
    one block apart."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", module, count=1)


def _joined(rows: Iterable[Row]) -> Violation:
    rows = list(rows)
    layouts = {
        f"{row.dtype}[{_list(row.shape)}] ({_list(row.before.strides)}) @{row.before.offset}"
        for row in rows
    }
    return Violation(
        count=len(rows),
        fixed=sum(row.kind == FIX for row in rows),
        nbytes=sum(row.nbytes or 0 for row in rows),
        layouts=tuple(sorted(layouts)),
    )


def _said(violation: Violation) -> str:
    uses = f"{violation.count} use{'s' if violation.count > 1 else ''}"
    return f"{uses}, {violation.fixed} fixed, {violation.nbytes} B; {_layouts(violation)}"


def _difference(old: Violation, now: Violation) -> str:
    parts = [
        f"{word} {was} -> {is_}"
        for word, was, is_ in (
            ("uses", old.count, now.count),
            ("fixed", old.fixed, now.fixed),
            ("bytes", old.nbytes, now.nbytes),
        )
        if was != is_
    ]
    if old.layouts != now.layouts:
        parts.append(f"{_layouts(old)} -> {_layouts(now)}")
    return ", ".join(parts)


def _layouts(violation: Violation) -> str:
    first, *others = violation.layouts
    return f"{first} and {len(others)} other layouts" if others else first


def _list(values: Iterable[int | str]) -> str:
    return ", ".join(map(str, values))
