"""Ops that make a row-wise 8-bit activation together with what produces it.

Each is one pass over memory on a GPU (:mod:`wan_models.quant.fused_triton`); on a CPU, and as the
definition that the kernels are tested against, it is the formula in torch. Everything is computed
in fp32. Where the unfused model rounds to 16 bits between two steps these do not, except for the
residual stream, which is rounded where it is stored, and read back so.

Shapes: x (B, L, C); shift, scale and gate (B or 1, L or 1, C) fp32; results dense.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from contig_pass import AlignedPointer, Dense, Rule, UnitStrideLast
from wan_models.quant.binding import bind, check_unit_stride
from wan_models.quant.recipes import E4M3
from wan_models.quant.rows import Deferred, QuantizedRows
from wan_models.quant.rows import quantise_rows as formula

Tensor = torch.Tensor
Optional = torch.Tensor | None


# -- the formulas --------------------------------------------------------------------------------


def norm_modulate(
    x: Tensor, weight: Optional, bias: Optional, shift: Optional, scale: Optional, eps: float
) -> Tensor:
    """LN(x) * weight + bias, then * (1 + scale) + shift, in fp32; what is None is left out."""
    width = (x.shape[-1],)
    wide = None if weight is None else weight.float(), None if bias is None else bias.float()
    y = F.layer_norm(x.float(), width, *wide, eps)
    return y if shift is None else y * (1 + scale) + shift


def scaled(x: Tensor, row_scale: Optional, column_scale: Optional, bias: Optional) -> Tensor:
    """A product in fp32; with its scales and bias if these are still to be applied."""
    if row_scale is not None:
        return Deferred(x, row_scale, column_scale, bias).wide()
    return x.float() if bias is None else x.float() + bias.float()


def rows_of(x: Tensor) -> QuantizedRows:
    """``x`` (..., K) as quantised rows, by :func:`quantise_rows`."""
    values, scale = quantise_rows(x.reshape(1, -1, x.shape[-1]))
    return QuantizedRows(values.view(x.shape), scale.view(*x.shape[:-1], 1), x.dtype)


def gelu_formula(
    x: Tensor, row_scale: Optional, column_scale: Optional, bias: Optional
) -> tuple[Tensor, Tensor]:
    """GELU of :func:`scaled`, by row."""
    return formula(F.gelu(scaled(x, row_scale, column_scale, bias), approximate="tanh"))


# -- ops -----------------------------------------------------------------------------------------


@torch.library.custom_op("wan_models::quantise_rows", mutates_args=())
def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` (B, L, C) as e4m3 by row and its scales (B, L, 1)."""
    if x.is_cuda:
        from wan_models.quant import fused_triton

        return fused_triton.run_quantise(x)
    return dense(*formula(x))


@quantise_rows.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return _fake(x)


@torch.library.custom_op("wan_models::norm_quantise", mutates_args=())
def norm_quantise(
    x: Tensor, weight: Optional, bias: Optional, shift: Optional, scale: Optional, eps: float
) -> tuple[Tensor, Tensor]:
    """:func:`norm_modulate` of ``x`` as e4m3 by row, and its scales (B, L, 1)."""
    check_unit_stride("norm_quantise", shift=shift, scale=scale)
    if x.is_cuda:
        from wan_models.quant import fused_triton

        return fused_triton.run_norm_quantise(x, weight, bias, shift, scale, eps)
    return dense(*formula(norm_modulate(x, weight, bias, shift, scale, eps)))


@norm_quantise.register_fake
def _(
    x: Tensor, weight: Optional, bias: Optional, shift: Optional, scale: Optional, eps: float
) -> tuple[Tensor, Tensor]:
    return _fake(x)


@torch.library.custom_op("wan_models::add_norm_quantise", mutates_args=())
def add_norm_quantise(
    x: Tensor, branch: Tensor, gate: Optional, weight: Optional, bias: Optional,
    shift: Optional, scale: Optional, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """y = x + gate * branch in the type of ``x``; :func:`norm_modulate` of y by row; its scales.

    ``branch`` is (B, L, C) like ``x``; a ``gate`` of None is 1.
    """
    check_unit_stride("add_norm_quantise", gate=gate, shift=shift, scale=scale)
    if x.is_cuda:
        from wan_models.quant import fused_triton

        return fused_triton.run_add_norm_quantise(
            x, branch, gate, weight, bias, shift, scale, eps
        )
    added = branch.float()
    total = (x.float() + (added if gate is None else added * gate)).to(x.dtype)
    return dense(total, *formula(norm_modulate(total, weight, bias, shift, scale, eps)))


@add_norm_quantise.register_fake
def _(
    x: Tensor, branch: Tensor, gate: Optional, weight: Optional, bias: Optional,
    shift: Optional, scale: Optional, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return (x.new_empty(x.shape), *_fake(x))


@torch.library.custom_op("wan_models::gelu_quantise", mutates_args=())
def gelu_quantise(
    x: Tensor, row_scale: Optional, column_scale: Optional, bias: Optional
) -> tuple[Tensor, Tensor]:
    """tanh-approximated GELU of ``x`` (M, N), scaled as a bare product if it is one, by row."""
    if x.is_cuda:
        from wan_models.quant import fused_triton

        return fused_triton.run_gelu_quantise(x, row_scale, column_scale, bias)
    return dense(*gelu_formula(x, row_scale, column_scale, bias))


@gelu_quantise.register_fake
def _(
    x: Tensor, row_scale: Optional, column_scale: Optional, bias: Optional
) -> tuple[Tensor, Tensor]:
    return _fake(x)


def dense(*made: Tensor) -> tuple[Tensor, ...]:
    """Formulas keep the order of their input's dimensions; fakes promise row-major."""
    return tuple(
        x if x.is_contiguous() else x.new_empty(x.shape).copy_(x) for x in made
    )


def _fake(x: Tensor) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty(x.shape, dtype=E4M3),
        x.new_empty((*x.shape[:-1], 1), dtype=torch.float32),
    )


#: Rows are read by vectors of 16 bytes; off those, Triton compiles a kernel that reads elements.
_ROWS: tuple[Rule, ...] = (UnitStrideLast(), AlignedPointer(16))
_SOURCE = "wan_models/quant/fused_triton.py reads rows by vectors of 16 bytes"
_WHOLE = "wan_models/quant/fused_triton.py reads this as one dense vector"

bind("wan_models::quantise_rows", ("x",), _ROWS, _SOURCE)
bind("wan_models::gelu_quantise", ("x",), _ROWS, _SOURCE)
bind("wan_models::gelu_quantise", ("row_scale", "column_scale", "bias"), (Dense("row"),), _WHOLE)
bind("wan_models::norm_quantise", ("x", "shift", "scale"), _ROWS, _SOURCE)
bind("wan_models::norm_quantise", ("weight", "bias"), (Dense("row"),), _WHOLE)
bind("wan_models::add_norm_quantise", ("x", "branch", "gate", "shift", "scale"), _ROWS, _SOURCE)
bind("wan_models::add_norm_quantise", ("weight", "bias"), (Dense("row"),), _WHOLE)
