"""Which rows, hunks and blocks read alike, so that one stands for all."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from contig_pass.provenance import repeated
from contig_pass.report.copies import Copy
from contig_pass.report.model import Hunk, Row

T = TypeVar("T")

#: Counters in the names of nodes: ``add_12``, ``arg37_1``, ``p_blocks_3_attn_q_weight``.
_COUNTERS = re.compile(r"(?<=[A-Za-z])\d*(?:_\d+)+(?=_|\b)")
#: The module path up to its first layer number.
_NUMBERED = re.compile(r"(?:[^.]+\.)*?\d+(?=\.|$)")


def rolled_up(items: Iterable[T], kind: Callable[[T], Hashable]) -> list[list[T]]:
    """``items`` in groups of equal kind, in the order of each group's first."""
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        groups.setdefault(kind(item), []).append(item)
    return list(groups.values())


def kind_of_row(row: Row) -> Hashable:
    """Equal for rows that read alike but for layer numbers and node names."""
    return (
        row.kind, repeated(row.module), row.op, row.operand, row.reason, row.dtype, row.shape,
        row.before, row.after, row.order, row.fused, repeated(row.parameter or ""), row.file,
        row.lineno,
    )


def kind_of_copy(copy: Copy) -> Hashable:
    """Equal for copies made at one line for one reason, whichever modules run that line."""
    return (
        copy.verdict, copy.call, copy.dtype, copy.shape, copy.before, copy.after,
        _COUNTERS.sub("", copy.proof), copy.file, copy.lineno,
    )


def modules_of(copies: Sequence[Copy]) -> str:
    """The module that runs the line, layer numbers rolled up, or how many do."""
    modules = dict.fromkeys(repeated(copy.module) or "top level" for copy in copies)
    return next(iter(modules)) if len(modules) == 1 else f"{len(modules)} modules"


def kind_of_hunk(hunk: Hunk) -> Hashable:
    """Equal for hunks that read alike but for layer numbers and counters in names."""
    lines = tuple((mark, _COUNTERS.sub("", line)) for mark, line in hunk.lines)
    return repeated(hunk.module), lines


@dataclass(frozen=True)
class Block:
    """Parts of a graph that follow each other in one layer of the model.

    Attributes:
        name: module path up to its first layer number, such as ``"blocks.3"``; where there is no
            number the path's first name, empty at the top.
        parts: runs of nodes of one module each.
    """

    name: str
    parts: tuple[Hunk, ...]


def blocks_of(parts: Sequence[Hunk]) -> list[Block]:
    """``parts`` by layer. What belongs to no module goes with the layer before it, but at the end:
    the graph's output is no part of its last layer."""
    blocks: list[tuple[str, list[Hunk]]] = []
    homeless: list[Hunk] = []
    for part in parts:
        name = _layer(part.module)
        if not name:
            homeless.append(part)
            continue
        if homeless:
            if not blocks:
                blocks.append(("", []))
            blocks[-1][1].extend(homeless)
            homeless = []
        if blocks and blocks[-1][0] == name:
            blocks[-1][1].append(part)
        else:
            blocks.append((name, [part]))
    if homeless:
        blocks.append(("", homeless))
    return [Block(name, tuple(inside)) for name, inside in blocks]


def kind_of_block(block: Block) -> Hashable:
    """Equal for blocks whose parts are."""
    return tuple(kind_of_hunk(part) for part in block.parts)


def _layer(module: str) -> str:
    numbered = _NUMBERED.match(module)
    return numbered[0] if numbered else module.partition(".")[0]
