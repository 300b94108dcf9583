"""Graph inputs that a contract can reach, and how a misaligned one is realigned at run time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from contig_pass.callsite import (
    Operand,
    called_op,
    is_triton_kernel,
    operands,
    subgraph_call,
    triton_operands,
    view_base,
)
from contig_pass.contracts.registry import REGISTRY
from contig_pass.inductor.ops import copy_with_strides
from contig_pass.layout import INPUT_ALIGNMENT

#: Ops that may turn out to be no copy at all once Inductor has simplified the graph.
_PERHAPS_NO_COPY = frozenset(
    {
        torch.ops.aten.clone.default,
        torch.ops.aten._to_copy.default,
        torch.ops.prims.convert_element_type.default,
    }
)


def reached_inputs(graph: fx.Graph) -> list[fx.Node]:
    """Placeholders whose memory a bound operand can be, in order of the inputs."""
    reached: set[fx.Node] = set()
    for node in graph.nodes:
        for operand in _bound_operands(node):
            root: fx.Node | None = operand.node
            while root is not None and root.op != "placeholder":
                root = root.args[0] if root.target in _PERHAPS_NO_COPY else view_base(root)
            if root is not None:
                reached.add(root)
    return [node for node in graph.nodes if node.op == "placeholder" and node in reached]


def reaching_operands(node: fx.Node) -> Iterator[Operand]:
    """Operands of a subgraph call whose memory a bound operand inside can be."""
    call = subgraph_call(node)
    if call is None:
        return
    inside = set()
    for module in call.graphs:
        placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
        inside.update(placeholders.index(n) for n in reached_inputs(module.graph))
    yield from (operand for position, operand in call.operands if position in inside)


def _bound_operands(node: fx.Node) -> Iterator[Operand]:
    if node.op != "call_function":
        return
    op = called_op(node)
    if op is not None:
        if REGISTRY.knows(op):
            yield from operands(node, op)
    elif is_triton_kernel(node):
        yield from triton_operands(node)
    else:
        yield from reaching_operands(node)


def realigned(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor``, or, where it does not start on 16 bytes, a copy with the same strides that does.

    The copy spans the same extent, gaps included, so views of it keep their offsets.
    """
    if tensor.data_ptr() % INPUT_ALIGNMENT == 0:
        return tensor
    return copy_with_strides(tensor)
