"""Graph inputs that a contract can reach, and how a misaligned one is realigned at run time."""

from __future__ import annotations

import torch
from torch import fx

from contig_pass.callsite import called_op, operands, view_base
from contig_pass.contracts.registry import REGISTRY
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
    """Placeholders whose memory an operand of a contract op can be, in order of the inputs."""
    reached: set[fx.Node] = set()
    for node in graph.nodes:
        op = called_op(node)
        if op is None or not REGISTRY.knows(op):
            continue
        for operand in operands(node, op):
            root: fx.Node | None = operand.node
            while root is not None and root.op != "placeholder":
                root = root.args[0] if root.target in _PERHAPS_NO_COPY else view_base(root)
            if root is not None:
                reached.add(root)
    return [
        node for node in graph.nodes if node.op == "placeholder" and node in reached
    ]


def realigned(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor``, or, where it does not start on 16 bytes, a copy with the same strides that does.

    The copy spans the same extent, gaps included, so views of it keep their offsets.
    """
    if tensor.data_ptr() % INPUT_ALIGNMENT == 0:
        return tensor
    extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    if tensor.numel() == 0:
        return tensor
    flat = torch.as_strided(tensor, (extent,), (1,)).clone()
    return torch.as_strided(flat, tensor.shape, tensor.stride())
