"""An FP8 linear whose weight and bias lie in one flat byte buffer.

Loaders that map a checkpoint without copying keep tensors like this: at whatever byte the file
has them, with whatever padding. The forward slices the buffer and views the pieces, so a
misaligned pointer or a padded pitch reaches the kernel from inside the graph.
"""

from __future__ import annotations

import torch
from torch import nn

from wan_models.quant.fp8 import Fp8Linear, fp8_linear
from wan_models.quant.recipes import E4M3

_BIAS = torch.bfloat16


class SlabLinear(nn.Module):
    """See the module's docstring; values equal those of the :class:`Fp8Linear` it is built from.

    Buffers: ``slab`` uint8, ``weight_scale`` and ``input_scale`` fp32 of shape ().
    """

    def __init__(
        self,
        slab: torch.Tensor,
        weight_scale: torch.Tensor,
        shape: tuple[int, int],
        weight_offset: int,
        pitch: int,
        bias_offset: int | None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.weight_offset = weight_offset
        self.pitch = pitch
        self.bias_offset = bias_offset
        self.register_buffer("slab", slab)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("input_scale", torch.ones((), device=slab.device))

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        recipe: str,
        *,
        weight_offset: int = 0,
        row_padding: int = 0,
        bias_gap: int = 0,
    ) -> SlabLinear:
        """Quantise ``linear`` and lay it out in one buffer: weight first, then bias.

        Args:
            linear: the layer.
            recipe: name of a recipe, see :mod:`wan_models.quant.recipes`.
            weight_offset: byte at which the weight starts.
            row_padding: unused bytes after each row.
            bias_gap: bytes between the next 16-byte boundary behind the weight and the bias.

        Raises:
            ValueError: a negative number, or a bias that would split an element.
        """
        if min(weight_offset, row_padding, bias_gap) < 0 or bias_gap % _BIAS.itemsize:
            raise ValueError(
                f"weight_offset={weight_offset}, row_padding={row_padding}, bias_gap={bias_gap}: "
                f"use numbers from 0 on, bias_gap a multiple of {_BIAS.itemsize}"
            )
        dense = Fp8Linear.from_linear(linear, recipe)
        rows, columns = dense.weight.shape
        pitch = columns + row_padding
        end = weight_offset + rows * pitch
        bias_offset = None if dense.bias is None else -(-end // 16) * 16 + bias_gap
        size = end if bias_offset is None else bias_offset + rows * _BIAS.itemsize
        slab = torch.zeros(size, dtype=torch.uint8, device=dense.weight.device)
        made = cls(slab, dense.weight_scale, (rows, columns), weight_offset, pitch, bias_offset)
        made.weight().copy_(dense.weight)
        if dense.bias is not None:
            made.bias().copy_(dense.bias)
        return made

    def weight(self) -> torch.Tensor:
        """The weight as a view of the slab: (N, K) e4m3 with strides (pitch, 1)."""
        end = self.weight_offset + self.out_features * self.pitch
        rows = self.slab[self.weight_offset : end].view(E4M3).view(self.out_features, self.pitch)
        return rows[:, : self.in_features]

    def bias(self) -> torch.Tensor | None:
        """The bias as a view of the slab: (N,) bf16."""
        if self.bias_offset is None:
            return None
        end = self.bias_offset + self.out_features * _BIAS.itemsize
        return self.slab[self.bias_offset : end].view(_BIAS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., K). Returns (..., N)."""
        return fp8_linear(x, self.weight(), self.weight_scale, self.input_scale, self.bias())
