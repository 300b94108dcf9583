"""An FP8 linear whose weight and bias lie in one flat byte buffer.

Loaders that map a checkpoint without copying keep tensors like this: at whatever byte the file
has them, with whatever padding. The forward slices the buffer and views the pieces, so a
misaligned pointer or a padded pitch reaches the kernel from inside the graph.
"""

from __future__ import annotations

import torch
from torch import nn

from wan_models.quant.fp8 import Fp8Linear, fp8_linear, fp8_recipe
from wan_models.quant.linear import QuantizedLinear
from wan_models.quant.recipes import E4M3, quantize_weight, recipe_named

#: Where a bias starts if nothing displaces it: behind the weight, at a multiple of this byte.
_ALIGNMENT = 16


class SlabLinear(QuantizedLinear):
    """See the module's docstring; values equal those of the :class:`Fp8Linear` it is built from.

    Buffers: ``slab`` uint8, ``weight_scale`` and ``input_scale`` fp32 of shape (); the last is 1
    and no part of ``state_dict``. Addresses count from the start of ``slab``, which torch
    allocates at a multiple of 64 bytes or more.

    Args:
        slab: 1-D uint8; any bytes between the pieces are ignored.
        weight_scale: fp32 of shape ().
        shape: (N, K).
        weight_offset: byte at which the weight starts.
        pitch: bytes from one row of the weight to the next, at least K.
        bias_offset: byte at which the bias starts, a multiple of its item size; None without one.
        bias_dtype: bf16 or fp16.
        recipe: name of a fast e4m3 recipe.

    Raises:
        ValueError: pieces that leave the slab or overlap, a bias that splits an element, or
            another recipe.
    """

    def __init__(
        self,
        slab: torch.Tensor,
        weight_scale: torch.Tensor,
        shape: tuple[int, int],
        weight_offset: int,
        pitch: int,
        bias_offset: int | None,
        bias_dtype: torch.dtype = torch.bfloat16,
        recipe: str = "fp8_e4m3fn_scaled_fast",
    ) -> None:
        made_by = fp8_recipe(recipe)
        if made_by.dtype != E4M3 or not made_by.fast:
            raise ValueError(f"recipe {recipe!r}: a slab holds e4m3 for the scaled product alone")
        _check(slab, shape, weight_offset, pitch, bias_offset, bias_dtype)
        super().__init__(shape, made_by)
        self.weight_offset = weight_offset
        self.pitch = pitch
        self.bias_offset = bias_offset
        self.bias_dtype = bias_dtype
        self.register_buffer("slab", slab)
        self.register_buffer("weight_scale", weight_scale)
        self.register_one("input_scale", slab.device)

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
            bias_gap: bytes between the next 16-byte boundary behind the weight and the bias, a
                multiple of the bias's item size (2).

        Raises:
            ValueError: a recipe that is unknown or no fast e4m3 one, a size that the kernel does
                not take, a negative number, or a bias that would split an element.
        """
        if min(weight_offset, row_padding, bias_gap) < 0 or bias_gap % 2:
            raise ValueError(
                f"weight_offset={weight_offset}, row_padding={row_padding}, bias_gap={bias_gap}: "
                "use numbers from 0 on, bias_gap a multiple of 2"
            )
        dense = Fp8Linear.from_linear(linear, recipe)
        rows, columns = dense.weight.shape
        pitch = columns + row_padding
        size = weight_offset + rows * pitch
        bias_offset, bias_dtype = None, torch.bfloat16
        if dense.bias is not None:
            bias_offset = -(-size // _ALIGNMENT) * _ALIGNMENT + bias_gap
            bias_dtype = dense.bias.dtype
            size = bias_offset + rows * bias_dtype.itemsize
        slab = torch.zeros(size, dtype=torch.uint8, device=dense.weight.device)
        made = cls(
            slab,
            dense.weight_scale,
            (rows, columns),
            weight_offset,
            pitch,
            bias_offset,
            bias_dtype,
            recipe,
        )
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
        """The bias as a view of the slab: (N,) in ``bias_dtype``."""
        if self.bias_offset is None:
            return None
        end = self.bias_offset + self.out_features * self.bias_dtype.itemsize
        return self.slab[self.bias_offset : end].view(self.bias_dtype)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type of the bias, whether there is one or not."""
        return self.bias_dtype

    def dequantised(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return (self.weight().float() * self.weight_scale).to(dtype)

    @torch.no_grad()
    def requantise_(self, weight: torch.Tensor) -> None:
        stored, scale = quantize_weight(weight, recipe_named(self.recipe))
        self.weight().copy_(stored)
        self.weight_scale.copy_(scale)

    def scaled_product(self, x: torch.Tensor) -> torch.Tensor:
        return fp8_linear(x, self.weight(), self.weight_scale, self.input_scale, self.bias())

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, weight_offset={self.weight_offset}, "
            f"pitch={self.pitch}, bias_offset={self.bias_offset}, recipe={self.recipe!r}"
        )


def _check(
    slab: torch.Tensor,
    shape: tuple[int, int],
    weight_offset: int,
    pitch: int,
    bias_offset: int | None,
    bias_dtype: torch.dtype,
) -> None:
    rows, columns = shape
    weight_end = weight_offset + rows * pitch
    if slab.dtype != torch.uint8 or slab.dim() != 1:
        raise ValueError(f"slab is {slab.dtype} of {slab.dim()} dimensions: use 1-D uint8")
    if pitch < columns:
        raise ValueError(f"pitch={pitch}: rows of {columns} bytes would overlap")
    if weight_offset < 0 or weight_end > slab.numel():
        raise ValueError(
            f"weight takes bytes {weight_offset} to {weight_end} of a slab of {slab.numel()}"
        )
    if bias_offset is None:
        return
    bias_end = bias_offset + rows * bias_dtype.itemsize
    if bias_offset % bias_dtype.itemsize:
        raise ValueError(
            f"bias_offset={bias_offset}: use a multiple of {bias_dtype.itemsize}, the item size"
        )
    if bias_offset < 0 or bias_end > slab.numel():
        raise ValueError(
            f"bias takes bytes {bias_offset} to {bias_end} of a slab of {slab.numel()}"
        )
    if bias_offset < weight_end and weight_offset < bias_end:
        raise ValueError(
            f"bias at bytes {bias_offset} to {bias_end} overlaps the weight at "
            f"{weight_offset} to {weight_end}"
        )
