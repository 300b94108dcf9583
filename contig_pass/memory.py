"""Whose memory a node's value lies in, by what the ops declare."""

from __future__ import annotations

import functools
import operator

import torch
from torch import fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2

from contig_pass.callsite import (
    Operand,
    base_index,
    called_op,
    is_functionalized,
    is_triton_kernel,
    mutated_arguments,
    operands,
    writes_directly,
)


def view_base(node: fx.Node) -> fx.Node | None:
    """The node whose memory ``node`` is a view of, one step up; ``None`` if it has its own."""
    if node.op != "call_function":
        return None
    if node.target is operator.getitem:
        producer = node.args[0]
        return view_base(producer) if isinstance(producer, fx.Node) else None
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    position = _viewed_argument(node.target)
    if position is None or position >= len(node.args):
        return None
    base = node.args[position]
    return base if isinstance(base, fx.Node) else None


@functools.cache
def _viewed_argument(op: torch._ops.OpOverload) -> int | None:
    """Position of the argument that the result of ``op`` is a view of, or is itself."""
    if op is torch.ops.aten._unsafe_view.default:
        return 0  # declared as functional, lowered as a view
    returned = {
        name
        for ret in op._schema.returns
        if ret.alias_info is not None
        for name in ret.alias_info.before_set
    }
    for position, argument in enumerate(op._schema.arguments):
        info = argument.alias_info
        if info is None:
            continue
        # An op that returns a list of views names it of its argument only: Tensor(a -> *).
        if returned & set(info.before_set) or "*" in info.after_set:
            return position
    return None


#: Ops that return a copy whose storage starts where their first operand's does.
_KEEPING_OFFSET = frozenset(
    {
        torch.ops.aten.slice_scatter.default,
        torch.ops.aten.select_scatter.default,
        torch.ops.aten.diagonal_scatter.default,
        torch.ops.aten.as_strided_scatter.default,
    }
)


def offset_source(node: fx.Node) -> fx.Node | None:
    """The node that the memory of ``node``, though its own, starts like, or turns out to be.

    So it is with scatters, and with what an op behind ``auto_functionalized_v2`` has written to.
    """
    if node.target in _KEEPING_OFFSET:
        return node.args[0]  # type: ignore[return-value]
    if node.target is not operator.getitem:
        return None
    producer, position = node.args
    if producer.target is not auto_functionalized_v2:
        return None
    base = position - max(len(called_op(producer)._schema.returns), 1)
    return producer.kwargs["_all_bases"][base] if base >= 0 else None


#: Namespaces whose results torch itself allocates, or Inductor for it.
_TRANSPARENT = frozenset({"aten", "prims", "inductor", "contig_pass", "rngprims"})


def is_opaque(node: fx.Node) -> bool:
    """Whether ``node`` owns memory that only its callee knows: what a fake tensor says of its
    address need not hold. So it is with custom ops and with subgraphs."""
    producer, position = node, 0
    if node.target is operator.getitem:
        producer, position = node.args  # type: ignore[assignment]
    if producer.op != "call_function" or is_triton_kernel(producer):
        return False
    op = called_op(producer)
    if op is None:
        return isinstance(producer.target, torch._ops.HigherOrderOperator)
    if is_functionalized(producer) and position >= len(op._schema.returns):
        return False  # what the op wrote to
    return not is_transparent(op)


def is_transparent(op: torch._ops.OpOverload) -> bool:
    """Whether the results of ``op`` lie where the compiler says."""
    return op.namespace in _TRANSPARENT


def memory_of(node: fx.Node) -> fx.Node:
    """The node that owns the memory which the value of ``node`` is a view of."""
    while (base := view_base(node)) is not None:
        node = base
    return node


def can_redirect(node: fx.Node, operand: Operand) -> bool:
    """Whether the op may write to other memory than ``operand``, to be put back afterwards.

    It may where no other argument writes to the same memory.
    """
    if writes_directly(node):
        return memory_of(operand.node) not in (
            memory_of(other.node)
            for other in operands(node, node.target)  # type: ignore[arg-type]
            if other != operand and other.argument in mutated_arguments(node.target)
        )
    if node.target is not auto_functionalized_v2 or operand.path or operand.index is not None:
        return False
    written = [key for key in node.kwargs if key.endswith("_base_index")]
    bases = [node.kwargs[key] for key in written]
    return bases.count(base_index(node, operand)) == 1
