"""A repair of Inductor's own lowering of scaled products, for compiles of contig_safe only.

On a GPU the lowering puts a bias of shape (N,) and scales of shape () into two dimensions with
``unsqueeze``. It hands ``unsqueeze`` a bare view, which then takes the view's base for the view:
an aligned slice of a fused bias, or one scale out of a stack, ends the compile with an
AssertionError (seen in torch 2.11; 2.13 has the same lines). A view in a TensorBox is understood.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

from contig_pass.inductor import hooks

_installing = threading.Lock()


def install() -> None:
    """Box bare views before the lowering unsqueezes them, once a process."""
    with _installing:
        _wrap_lowering()


@functools.cache
def _wrap_lowering() -> None:
    original = hooks.SCALED_LOWERING.find()
    if original is None:
        return  # another version's lowering; if it has the fault, its own error says so
    from torch._inductor.template_heuristics import triton

    triton.BaseScaledMMConfigMixin.adjust_kernel_inputs = _with_boxes(original)


def _with_boxes(original: Any) -> Any:
    from torch._inductor import ir

    from contig_pass.inductor.scope import in_progress

    @functools.wraps(original)
    def adjust_kernel_inputs(self: Any, kernel_inputs: Any, op_name: str) -> Any:
        nodes = kernel_inputs.nodes()
        if in_progress() and any(isinstance(node, ir.ReinterpretView) for node in nodes):
            kernel_inputs = type(kernel_inputs)(
                [ir.TensorBox(n) if isinstance(n, ir.ReinterpretView) else n for n in nodes],
                mat1_idx=kernel_inputs._mat1_idx,
                mat2_idx=kernel_inputs._mat2_idx,
                out_dtype=kernel_inputs._out_dtype,
            )
        return original(self, kernel_inputs, op_name)

    return adjust_kernel_inputs
