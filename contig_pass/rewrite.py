"""Carry a plan out: the only code that edits a graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, in_kernel_invocation_manager

from contig_pass.analysis import Use
from contig_pass.callsite import replace_operand
from contig_pass.inductor.ops import contiguous_op, empty_in_order, pin_op
from contig_pass.plan import Fix, Plan

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


def apply_plan(graph: fx.Graph, plan: Plan) -> dict[Fix, fx.Node]:
    """Insert the relayouts and pins of ``plan`` into ``graph``; returns each fix's new node.

    Only the planned uses read the new nodes: other users of the same value, the graph's outputs
    and every alias stay as they are.
    """
    if not plan.fixes and not plan.pins:
        return {}
    positions = {node: index for index, node in enumerate(graph.nodes)}
    copies = {}
    for fix in plan.fixes:
        args = (fix.source, fix.order)
        copies[fix] = _insert(graph, positions, contiguous_op(), args, _copied(fix), fix.uses)
    for pin in plan.pins:
        value = pin.source.meta["val"]
        _insert(graph, positions, pin_op(), (pin.source, pin.alignment), value, pin.uses)
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
        new = graph.call_function(op, args)
    for key in _INHERITED:
        if key in first.meta:
            new.meta[key] = first.meta[key]
    new.meta["val"] = value
    for use in uses:
        earlier = replace_operand(use.node, use.op, use.operand, new)
        if earlier.target is op and not earlier.users:
            graph.erase_node(earlier)  # a copy made while tracing, planned anew
    return new


def _copied(fix: Fix) -> torch.Tensor:
    """The fake tensor of a fix's copy: a storage of its own, as the op's fake would make it.

    Made directly, since dispatching ``empty_strided`` takes six times as long.
    """
    value = fix.source.meta["val"]
    if not isinstance(value, FakeTensor):
        return empty_in_order(value, fix.order)
    with in_kernel_invocation_manager(value.fake_mode):
        storage = empty_in_order(value, fix.order, device="meta")
    return FakeTensor(value.fake_mode, storage, value.device)
