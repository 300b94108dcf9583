"""Carry a plan out: the only code that edits a graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, in_kernel_invocation_manager

from contig_pass.analysis import Use
from contig_pass.callsite import (
    redirect,
    replace_operand,
    writes_directly,
    written_base,
    written_view,
)
from contig_pass.contracts.rules import STRIDES
from contig_pass.inductor.ops import checked_op, contiguous_op, empty_in_order, pin_op
from contig_pass.plan import Fix, Plan

aten = torch.ops.aten

#: What a new node takes over from its consumer, so that reports, profiles and the pattern
#: matcher's regions see it as part of that consumer.
_INHERITED = (
    "stack_trace",
    "nn_module_stack",
    "source_fn_stack",
    "from_node",
    "original_aten",
    "seq_nr",
    "mutation_region_id",
)


#: How a view of a base is taken, and how what was written to a copy of it is put back.
_TAKEN = {
    "alias": (None, aten.copy.default),
    "slice": (aten.slice.Tensor, aten.slice_scatter.default),
    "as_strided": (aten.as_strided.default, aten.as_strided_scatter.default),
}


def apply_plan(graph: fx.Graph, plan: Plan) -> dict[Fix, fx.Node]:
    """Insert what ``plan`` asks for into ``graph``; returns each fix's new node.

    Only the planned uses read the new nodes: other users of the same value, the graph's outputs
    and every alias stay as they are.
    """
    if not plan.fixes and not plan.pins and not plan.checks:
        return {}
    positions = {node: index for index, node in enumerate(graph.nodes)}
    copies = {}
    for fix in plan.fixes:
        if not fix.write_back:
            value, args = _copied(fix.source, fix.order), (fix.source, fix.order)
            copies[fix] = _insert(graph, positions, contiguous_op(), args, value, fix.uses)
    for check in plan.checks:
        value, args = _copied(check.source, STRIDES), (check.source, check.alignment)
        _insert(graph, positions, checked_op(), args, value, check.uses)
    for pin in plan.pins:
        value = pin.source.meta["val"]
        _insert(graph, positions, pin_op(), (pin.source, pin.alignment), value, pin.uses)
    # Last, since they take over every user of what the op wrote to.
    copies |= {fix: _insert_written(graph, fix) for fix in plan.fixes if fix.write_back}
    return copies


def _insert(
    graph: fx.Graph,
    positions: dict[fx.Node, int],
    op: torch._ops.OpOverload,
    args: tuple,
    value: torch.Tensor,
    uses: Sequence[Use],
) -> fx.Node:
    first = min((use.node for use in uses), key=positions.__getitem__)
    with graph.inserting_before(first):
        new = _new_node(graph, op, args, value, first)
    for use in uses:
        earlier = replace_operand(use.node, use.operand, new)
        if earlier.target is contiguous_op() and not earlier.users:
            graph.erase_node(earlier)  # a copy made while tracing, planned anew
    return new


def _insert_written(graph: fx.Graph, fix: Fix) -> fx.Node:
    """A copy for an op to write to, and what it wrote put back into the copied view's base."""
    (use,) = fix.uses
    if writes_directly(use.node):
        return _insert_written_directly(graph, fix)
    node, base = use.node, written_base(use.node, use.operand)
    kind, view = written_view(node, use.operand)
    take, put_back = _TAKEN[kind]
    with graph.inserting_before(node):
        taken = base
        if take is not None:
            taken = _new_node(graph, take, (base, *view), use.operand.value, node)
        value = _copied(taken, fix.order)
        copy = _new_node(graph, contiguous_op(), (taken, fix.order), value, node)
    written = redirect(node, use.operand, copy)
    users = list(written.users)
    with graph.inserting_after(written):
        args = (base, written, *view)
        whole = _new_node(graph, put_back, args, base.meta["val"], node)
    for user in users:
        user.replace_input_with(written, whole)
    return copy


def _insert_written_directly(graph: fx.Graph, fix: Fix) -> fx.Node:
    """A copy for an op to write to, and a ``copy_`` back into what it was copied from."""
    (use,) = fix.uses
    value = _copied(fix.source, fix.order)
    with graph.inserting_before(use.node):
        copy = _new_node(graph, contiguous_op(), (fix.source, fix.order), value, use.node)
    replace_operand(use.node, use.operand, copy)
    with graph.inserting_after(use.node):
        back = (fix.source, copy)
        _new_node(graph, aten.copy_.default, back, fix.source.meta["val"], use.node)
    return copy


def _new_node(
    graph: fx.Graph, op: torch._ops.OpOverload, args: tuple, value: torch.Tensor, like: fx.Node
) -> fx.Node:
    new = graph.call_function(op, args)
    for key in _INHERITED:
        if key in like.meta:
            new.meta[key] = like.meta[key]
    new.meta["val"] = value
    return new


def _copied(source: fx.Node, order: str) -> torch.Tensor:
    """The fake tensor of a copy of ``source``: a storage of its own, as the op's fake would make.

    Made directly, since dispatching ``empty_strided`` takes six times as long.
    """
    value = source.meta["val"]
    if not isinstance(value, FakeTensor):
        return empty_in_order(value, order)
    with in_kernel_invocation_manager(value.fake_mode):
        storage = empty_in_order(value, order, device="meta")
    return FakeTensor(value.fake_mode, storage, value.device)
