"""Ops whose values do not depend on how their operands lie in memory, to the last bit.

An op is here if it only moves elements or computes each result by one correctly rounded operation.
Others may take another path by strides or address, and round otherwise on it: vectorised and scalar
``exp`` differ on a CPU, and a matrix product chooses its kernel by layout and by alignment.
"""

from __future__ import annotations

import torch
from torch import fx

from contig_pass.inductor.ops import contiguous_op

aten = torch.ops.aten

_MOVING = (
    aten.clone.default, aten.copy.default, aten._to_copy.default, aten.cat.default,
    aten.constant_pad_nd.default, aten.index_select.default, aten.flip.default, aten.roll.default,
    aten.slice_scatter.default, aten.select_scatter.default, aten.where.self, aten.repeat.default,
    aten.stack.default, torch.ops.prims.convert_element_type.default,
)
_ROUNDED_ONCE = (
    aten.mul.Tensor, aten.neg.default, aten.abs.default, aten.eq.Tensor, aten.eq.Scalar,
    aten.ne.Tensor, aten.ne.Scalar, aten.lt.Tensor, aten.lt.Scalar, aten.gt.Tensor, aten.gt.Scalar,
    aten.le.Tensor, aten.le.Scalar, aten.ge.Tensor, aten.ge.Scalar,
)
#: ``a + alpha * b`` is rounded once or twice, by path, unless ``alpha`` is 1.
_WITH_ALPHA = (aten.add.Tensor, aten.sub.Tensor)


def is_exact(node: fx.Node) -> bool:
    """Whether the values of ``node`` are the same for every layout of what it reads."""
    if node.target in _WITH_ALPHA:
        return node.kwargs.get("alpha", 1) == 1
    return node.target in _MOVING or node.target in _ROUNDED_ONCE or node.target is contiguous_op()
