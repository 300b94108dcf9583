"""NVFP4 linear layers, built from any ``nn.Linear``."""

from __future__ import annotations

from typing import Self

import torch
from torch import nn
from torch.nn import functional as F

from wan_models.quant.fp4_ops import expand_fp4, expanded_scale, fp4_weight_linear
from wan_models.quant.fp8 import SIZE_MULTIPLE
from wan_models.quant.linear import QuantizedLinear, checked_scale, compute_type, kept_bias
from wan_models.quant.nvfp4 import (
    BLOCK,
    Nvfp4,
    dequantize_nvfp4,
    quantize_nvfp4,
    swizzle_scales,
)
from wan_models.quant.recipes import E2M1, E4M3, Recipe, recipe_named

#: The native product wants the packed K / 2 to be a multiple of 16.
NATIVE_MULTIPLE = 2 * SIZE_MULTIPLE


class Fp4Linear(QuantizedLinear):
    """A linear layer with an NVFP4 weight, by any FP4 recipe. For inference.

    Buffers: ``weight`` (N, K / 2) uint8; ``weight_scale`` (N, K / 16) e4m3; ``weight_scale_2``
    fp32 of shape (), 1 for a recipe without tensor scale; ``bias`` (N,) bf16 or fp16, or None.
    The fast recipe needs a CPU, or a CUDA device of capability 8.9 or later. From capability
    10 on it multiplies in FP4, activations included; elsewhere as
    :func:`wan_models.quant.fp4_ops.fp4_weight_linear` says.

    Args:
        weight, weight_scale, weight_scale_2, bias: the buffers.
        recipe: name of an FP4 recipe.

    Raises:
        ValueError: a recipe that is not FP4, or a buffer of another type or shape.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        weight_scale_2: torch.Tensor,
        bias: torch.Tensor | None,
        recipe: str = "fp4_scaled_fast",
    ) -> None:
        made_by = fp4_recipe(recipe)
        rows, columns = weight.shape[0], weight.shape[1] * 2
        if weight.dtype != torch.uint8 or columns % BLOCK:
            raise ValueError(
                f"weight is {weight.dtype} of shape {tuple(weight.shape)}: use uint8 (N, K/2) "
                f"with K a multiple of {BLOCK}"
            )
        if weight_scale.dtype != E4M3 or weight_scale.shape != (rows, columns // BLOCK):
            raise ValueError(
                f"weight_scale is {weight_scale.dtype} of shape {tuple(weight_scale.shape)}: use "
                f"{E4M3} of shape {(rows, columns // BLOCK)}"
            )
        super().__init__((rows, columns), made_by)
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("weight_scale_2", checked_scale("weight_scale_2", weight_scale_2))
        self.register_buffer("bias", bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, recipe: str) -> Self:
        """Quantise ``linear`` by the recipe called ``recipe``.

        Raises:
            ValueError: unknown recipe, one that is not FP4, or sizes that the format refuses.
        """
        made_by = fp4_recipe(recipe)
        obstacle = unfit(linear, made_by)
        if obstacle is not None:
            raise ValueError(obstacle)
        stored = quantize_nvfp4(linear.weight.detach(), scaled=made_by.scaled)
        return cls(*stored, kept_bias(linear), recipe)

    def stored(self) -> Nvfp4:
        """The weight as it is stored."""
        return Nvfp4(self.weight, self.weight_scale, self.weight_scale_2)

    def dequantised(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return dequantize_nvfp4(self.stored(), dtype)

    @torch.no_grad()
    def requantise_(self, weight: torch.Tensor) -> None:
        made = quantize_nvfp4(weight, scaled=recipe_named(self.recipe).scaled)
        self.weight.copy_(made.packed)
        self.weight_scale.copy_(made.block_scale)
        self.weight_scale_2.copy_(made.tensor_scale)

    def scaled_product(self, x: torch.Tensor) -> torch.Tensor:
        if self._native:
            return fp4_linear(x, self.stored(), self.bias)
        flat = x.reshape(-1, self.in_features).to(compute_type(x.dtype))
        out = fp4_weight_linear(
            flat, self.weight, self.weight_scale, self.weight_scale_2, self.bias
        )
        return out.reshape(*x.shape[:-1], self.out_features).to(x.dtype)

    @property
    def takes_rows(self) -> bool:
        # Written out: Dynamo of torch 2.11 does not evaluate a property of super().
        return self.by_row and self.lora is None and not self._native

    @property
    def _native(self) -> bool:
        fits = self.in_features % NATIVE_MULTIPLE == 0
        return fits and multiplies_fp4(self.weight.device)

    def operands(self) -> tuple[torch.Tensor, torch.Tensor]:
        weight = expand_fp4(self.weight, self.weight_scale)
        return weight, expanded_scale(self.weight_scale_2)


def multiplies_fp4(device: torch.device) -> bool:
    """Whether ``device`` has matrix products of NVFP4: NVIDIA, capability 10 or later."""
    return _multiplies_fp4(device.type, device.index)


@torch.compiler.assume_constant_result
def _multiplies_fp4(kind: str, index: int | None) -> bool:
    # Not traced: a machine does not change, and Dynamo cannot branch on what torch says of it.
    if kind != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_properties(index).major >= 10


def fp4_linear(x: torch.Tensor, weight: Nvfp4, bias: torch.Tensor | None) -> torch.Tensor:
    """y = Q(x) W^T + b with activations in NVFP4 as well, by the device's own FP4 product.

    Args:
        x: (..., K), K a multiple of 32, left unchanged; quantised with scales of its own.
        weight: (N, K), N a multiple of 16.
        bias: (N,) or None.

    Returns:
        (..., N) in the dtype of ``x``.
    """
    compute = compute_type(x.dtype)
    columns = weight.packed.shape[0]
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] == 0:  # no largest value to scale by
        return x.new_empty(*x.shape[:-1], columns)
    activations = quantize_nvfp4(rows)
    recipe = [F.ScalingType.BlockWise1x16, F.ScalingType.TensorWise]
    order = [F.SwizzleType.SWIZZLE_32_4_4, F.SwizzleType.NO_SWIZZLE]
    out = F.scaled_mm(
        activations.packed.view(E2M1),
        weight.packed.view(E2M1).t(),
        scale_a=[swizzle_scales(activations.block_scale), activations.tensor_scale],
        scale_recipe_a=recipe,
        swizzle_a=order,
        scale_b=[swizzle_scales(weight.block_scale), weight.tensor_scale],
        scale_recipe_b=recipe,
        swizzle_b=order,
        output_dtype=compute,
    )
    if bias is not None:
        out = out + bias.to(compute)
    return out.reshape(*x.shape[:-1], columns).to(x.dtype)


def fp4_recipe(name: str) -> Recipe:
    """The FP4 recipe called ``name``.

    Raises:
        ValueError: there is none, or it is FP8.
    """
    recipe = recipe_named(name)
    if not recipe.fp4:
        raise ValueError(f"recipe {name!r} is FP8: use Fp8Linear")
    return recipe


def unfit(linear: nn.Linear, recipe: Recipe) -> str | None:
    """Why ``linear`` cannot be quantised by an FP4 recipe; ``None`` if it can."""
    if linear.in_features % BLOCK:
        return f"K={linear.in_features} is not a multiple of {BLOCK}, as NVFP4's blocks demand"
    if recipe.fast and linear.out_features % SIZE_MULTIPLE:
        return (
            f"N={linear.out_features} is not a multiple of {SIZE_MULTIPLE}, as _scaled_mm demands"
        )
    return None
