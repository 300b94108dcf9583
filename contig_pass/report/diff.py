"""The graph diff: how the nodes around each fix read before and after, with strides and offsets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from contig_pass.plan import Fix, Plan
from contig_pass.provenance import origin_of
from contig_pass.report.model import Hunk


def node_line(node: fx.Node) -> str:
    """``name: dtype[shape][strides]@offset = op(args)``, the offset in bytes of its storage."""
    return line_of(node, node.args, node.kwargs, node.meta.get("val"))


def line_of(
    node: fx.Node, args: Any, kwargs: Any, value: Any, alignment: int | None = None
) -> str:
    """The line of ``node`` with these arguments and this value; where the alignment of its address
    is given, in bytes, `` a16`` follows the offset."""
    known = "" if alignment is None else f" a{alignment}"
    return f"{node.name}: {_memory(value)}{known} = {_op(node)}({_arguments(args, kwargs)})"


def lines_of(plan: Plan) -> dict[fx.Node, str]:
    """The lines of every consumer that ``plan`` will rewire, as they read now."""
    return {use.node: node_line(use.node) for fix in plan.fixes for use in fix.uses}


def hunks_of(
    plan: Plan, copies: Mapping[Fix, fx.Node], before: Mapping[fx.Node, str]
) -> tuple[Hunk, ...]:
    """One hunk for each rewired consumer: what its copies are made of, then itself, before and
    after. A copy that several consumers share stands in the hunk of the first."""
    reads: dict[fx.Node, list[Fix]] = {}
    for fix in plan.fixes:
        for consumer in dict.fromkeys(use.node for use in fix.uses):
            reads.setdefault(consumer, []).append(fix)
    shown: set[Fix] = set()
    hunks = []
    for consumer, fixes in reads.items():
        lines = []
        for fix in fixes:
            if fix not in shown:
                lines += [(" ", node_line(fix.source)), ("+", node_line(copies[fix]))]
                shown.add(fix)
        lines += [("-", before[consumer]), ("+", node_line(consumer))]
        hunks.append(Hunk(origin_of(consumer).module, tuple(lines)))
    return tuple(hunks)


def _memory(value: object) -> str:
    if isinstance(value, torch.Tensor) and value.layout is torch.strided:
        dtype = str(value.dtype).removeprefix("torch.")
        offset = value.storage_offset() * value.dtype.itemsize
        return f"{dtype}[{_numbers(value.shape)}][{_numbers(value.stride())}]@{offset}"
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(_memory(item) for item in value) + ")"
    return type(value).__name__


def _numbers(values: object) -> str:
    return ", ".join(str(v) for v in values)  # type: ignore[attr-defined]


def _op(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_function" else f"{node.op} {node.target}"


def _arguments(args: Any, kwargs: Any) -> str:
    listed = [_argument(a) for a in args]
    listed += [f"{name}={_argument(value)}" for name, value in kwargs.items()]
    return ", ".join(listed)


def _argument(value: object) -> str:
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_argument(item) for item in value) + "]"
    return repr(value) if isinstance(value, str) else str(value)
