"""Activations in e4m3 with one scale a row.

x is about values * scale: scale = amax of the row / 448, so every token fills the range of e4m3
whatever the other tokens are. One such activation serves all linears that read it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from wan_models.quant.recipes import E4M3


class QuantizedRows(NamedTuple):
    """An activation (..., K) in 8 bits, to be handed to linears in its place.

    Attributes:
        values: (..., K) e4m3, dense.
        scale: (..., 1) fp32.
        dtype: of the activation, and so of what a linear makes of it.
    """

    values: torch.Tensor
    scale: torch.Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        """(..., K)."""
        return self.values.shape

    @property
    def device(self) -> torch.device:
        return self.values.device

    def dequantised(self) -> torch.Tensor:
        """The activation that this stands for, in its type."""
        return (self.values.float() * self.scale).to(self.dtype)


class Deferred(NamedTuple):
    """A product of quantised rows, to whose sums the next pass applies scales and bias.

    The bare product is by the library's tensor-wise kernel, 4% faster than one with scales of rows
    (5,120 to 5,120 channels, 32,760 rows, H100), and the next pass reads its result anyway.

    Attributes:
        sums: (..., N) bf16, dense.
        row_scale: (..., 1) fp32.
        column_scale: (N,), or (1,) for all; fp32.
        bias: (N,) or None.
    """

    sums: torch.Tensor
    row_scale: torch.Tensor
    column_scale: torch.Tensor
    bias: torch.Tensor | None

    def wide(self) -> torch.Tensor:
        """The product with scales and bias, in fp32."""
        y = self.sums.float() * self.row_scale * self.column_scale
        return y if self.bias is None else y + self.bias.float()


def quantise_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` in e4m3 by row: values (..., K) and scale (..., 1) fp32. Computed in fp32.

    NaN stays NaN; a row with an infinity becomes NaN.
    """
    wide = x.float()
    amax = above_zero(wide.abs().amax(-1, keepdim=True))
    # Rounding may carry |x| * 448 / amax one ulp beyond 448, which e4m3 rounds back.
    largest = torch.finfo(E4M3).max
    return (wide * (largest / amax)).to(E4M3), amax / largest


def above_zero(amax: torch.Tensor) -> torch.Tensor:
    """``amax``, at least 1e-30, so that 448 / amax stays finite.

    The number stands here and in the kernels and in no constant of the module: under
    ``dynamic=True`` Dynamo takes a float from a module for an input, and compiles twice.
    """
    return amax.clamp(min=1e-30)
