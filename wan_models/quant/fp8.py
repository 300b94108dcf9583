"""FP8 linear layers, built from any ``nn.Linear``."""

from __future__ import annotations

from typing import Self

import torch
from torch import nn

from wan_models.quant.fused import rows_of
from wan_models.quant.linear import (
    QuantizedLinear,
    checked_scale,
    compute_type,
    kept_bias,
)
from wan_models.quant.recipes import E4M3, Recipe, quantize, quantize_weight, recipe_named
from wan_models.quant.rows import above_zero
from wan_models.quant.rows_linear import rows_linear

#: ``_scaled_mm`` wants K and N to be multiples of this.
SIZE_MULTIPLE = 16


def fp8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    input_scale: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    input_scaled: bool = False,
) -> torch.Tensor:
    """y = (s_x * s_w) * Q(x) Q(W)^T + b with Q(x) = e4m3(clamp(x / s_x)).

    Args:
        x: (..., K), left unchanged. Activations are e4m3 whatever the weight is: the kernel
            takes no e5m2 on both sides.
        weight: (N, K) e4m3 or e5m2; its transpose is the column-major operand it wants.
        weight_scale: s_w, fp32, one element.
        input_scale: s_x, fp32, one element.
        bias: (N,) in the compute type, or None.
        input_scaled: whether s_x may differ from 1; without it nothing is divided.

    Returns:
        (..., N) in the dtype of ``x``. Computed in bf16 or fp16; an fp32 ``x`` computes in bf16,
        since ``_scaled_mm`` takes no bias with an fp32 result.
    """
    compute = compute_type(x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    if input_scaled:
        rows = rows.float() / input_scale
    out = torch._scaled_mm(
        quantize(rows),
        weight.t(),
        scale_a=input_scale,
        scale_b=weight_scale,
        bias=None if bias is None else bias.to(compute),
        out_dtype=compute,
        use_fast_accum=True,
    )
    return out.reshape(*x.shape[:-1], weight.shape[0]).to(x.dtype)


class Fp8Linear(QuantizedLinear):
    """A linear layer with an e4m3 or e5m2 weight, by any FP8 recipe. For inference.

    Buffers: ``weight`` (N, K); ``weight_scale`` fp32 of shape (), or (N, 1) with a scale for every
    channel; ``input_scale`` fp32 of shape (); ``bias`` (N,) bf16 or fp16, or None. Scales that
    are 1 by the recipe are no part of ``state_dict``.
    A fast recipe needs a CPU, or a CUDA device of capability 8.9 or later.

    Args:
        weight: (N, K) in the recipe's type.
        weight_scale: one element for a scaled recipe, otherwise None or a 1 that is ignored; N
            elements, or one for all, for a recipe with a scale for every channel.
        bias: (N,) or None.
        recipe: name of an FP8 recipe.
        input_scale: one element by which activations are divided before the cast of a fast
            recipe, or None for 1.

    Raises:
        ValueError: a recipe that is not FP8 or not of the weight's type, or a bad scale.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        weight_scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        recipe: str = "fp8_e4m3fn_scaled_fast",
        input_scale: torch.Tensor | None = None,
    ) -> None:
        made_by = fp8_recipe(recipe)
        if weight.dtype != made_by.dtype:
            raise ValueError(f"weight is {weight.dtype}: recipe {recipe!r} stores {made_by.dtype}")
        if made_by.scaled and weight_scale is None:
            raise ValueError(f"recipe {recipe!r} needs a weight_scale")
        super().__init__((weight.shape[0], weight.shape[1]), made_by)
        self.scaled = made_by.scaled
        self.activations = made_by.activations
        self.register_buffer("weight", weight)
        if made_by.channels:
            self.register_buffer("weight_scale", channel_scales(weight_scale, weight.shape[0]))
        elif made_by.scaled:
            self.register_buffer("weight_scale", checked_scale("weight_scale", weight_scale))
        else:
            self.register_one("weight_scale", weight.device)
        self.register_buffer("bias", bias)
        self.input_scaled = False
        self.register_one("input_scale", weight.device)
        if input_scale is not None:
            self.set_input_scale(input_scale)

    @classmethod
    def from_linear(cls, linear: nn.Linear, recipe: str) -> Self:
        """Quantise ``linear`` by the recipe called ``recipe``.

        Raises:
            ValueError: unknown recipe, one that is not FP8, or sizes that the kernel refuses.
        """
        made_by = fp8_recipe(recipe)
        obstacle = unfit(linear, made_by)
        if obstacle is not None:
            raise ValueError(obstacle)
        weight, scale = quantize_weight(linear.weight.detach(), made_by)
        return cls(weight, scale, kept_bias(linear), recipe)

    def set_input_scale(self, scale: torch.Tensor) -> None:
        """Divide activations by ``scale``, one element, before they are cast to e4m3.

        For checkpoints that bring a calibrated scale; it becomes part of ``state_dict``.

        Raises:
            ValueError: more than one element, or a recipe that casts no activations.
        """
        if not self.fast:
            raise ValueError(f"recipe {self.recipe!r} casts no activations: it has no input_scale")
        if self.activations != "static":
            raise ValueError(
                f"recipe {self.recipe!r} scales activations by what they are: it has no input_scale"
            )
        scale = checked_scale("input_scale", scale).to(self.weight.device)
        self._ones.remove("input_scale")
        self.input_scaled = True
        self.register_buffer("input_scale", scale)

    def dequantised(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        if not self.scaled:
            return self.weight.to(dtype)
        return (self.weight.float() * self.weight_scale).to(dtype)

    @torch.no_grad()
    def requantise_(self, weight: torch.Tensor) -> None:
        stored, scale = quantize_weight(weight, recipe_named(self.recipe))
        self.weight.copy_(stored)
        self.weight_scale.copy_(scale)

    def operands(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.weight, self.weight_scale.view(-1)

    def scaled_product(self, x: torch.Tensor) -> torch.Tensor:
        if self.by_row:
            return rows_linear(rows_of(x), *self.operands(), self.bias)
        dynamic = self.activations == "tensor"
        return fp8_linear(
            x,
            self.weight,
            self.weight_scale,
            tensor_scale(x) if dynamic else self.input_scale,
            self.bias,
            input_scaled=dynamic or self.input_scaled,
        )


def tensor_scale(x: torch.Tensor) -> torch.Tensor:
    """amax / 448 over all of ``x``, fp32 of shape (); a tensor without elements has 1."""
    if x.numel() == 0:
        return torch.ones((), dtype=torch.float32, device=x.device)
    return above_zero(x.float().abs().amax()) / torch.finfo(E4M3).max


def channel_scales(scale: torch.Tensor, rows: int) -> torch.Tensor:
    """Scales of the output channels as fp32 (N, 1), dense; one element stands for all.

    Raises:
        ValueError: another number of elements.
    """
    if scale.numel() not in (1, rows):
        raise ValueError(
            f"weight_scale has shape {tuple(scale.shape)}: use ({rows}, 1), one for every channel"
        )
    wide = scale.detach().to(torch.float32).reshape(-1, 1)
    return wide.expand(rows, 1).clone(memory_format=torch.contiguous_format)


def fp8_recipe(name: str) -> Recipe:
    """The FP8 recipe called ``name``.

    Raises:
        ValueError: there is none, or it is FP4.
    """
    recipe = recipe_named(name)
    if recipe.fp4:
        raise ValueError(f"recipe {name!r} is FP4: use Fp4Linear")
    return recipe


def unfit(linear: nn.Linear, recipe: Recipe) -> str | None:
    """Why ``linear`` cannot be quantised by an FP8 recipe; ``None`` if it can."""
    if not recipe.fast:
        return None
    for name, size in (("K", linear.in_features), ("N", linear.out_features)):
        if size % SIZE_MULTIPLE:
            return f"{name}={size} is not a multiple of {SIZE_MULTIPLE}, as _scaled_mm demands"
    return None
