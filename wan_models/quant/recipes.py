"""The recipes by name, and the arithmetic of the FP8 types."""

from __future__ import annotations

from dataclasses import dataclass

import torch

E4M3 = torch.float8_e4m3fn
E5M2 = torch.float8_e5m2
#: Two e2m1 values to a byte. Buffers hold the bytes as uint8: see :mod:`wan_models.quant.nvfp4`.
E2M1 = torch.float4_e2m1fn_x2


@dataclass(frozen=True)
class Recipe:
    """How a linear layer is stored and computed. The table is in :mod:`wan_models.quant`.

    Attributes:
        name: as users write it.
        dtype: of the weight: :data:`E4M3`, :data:`E5M2` or :data:`E2M1`.
        scaled: whether one fp32 scale fits the weight's range to the type's.
        fast: multiplied in FP8 or FP4 by a scaled matrix product, or dequantised first.
        activations: how a fast recipe scales them: by a ``"static"`` scale, 1 unless a checkpoint
            brings another, by amax over the ``"tensor"``, or by amax over each ``"row"``.
        channels: whether every row of the weight, an output channel, has a scale of its own.
    """

    name: str
    dtype: torch.dtype
    scaled: bool
    fast: bool
    activations: str = "static"
    channels: bool = False

    @property
    def fp4(self) -> bool:
        """Whether the weight is NVFP4."""
        return self.dtype is E2M1

    @property
    def takes_input_scale(self) -> bool:
        """Whether activations are divided by a calibrated scale where a checkpoint brings one."""
        return self.fast and not self.fp4 and self.activations == "static"


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("fp8_e4m3fn", E4M3, scaled=False, fast=False),
        Recipe("fp8_e5m2", E5M2, scaled=False, fast=False),
        Recipe("fp8_e4m3fn_scaled", E4M3, scaled=True, fast=False),
        Recipe("fp8_e5m2_scaled", E5M2, scaled=True, fast=False),
        Recipe("fp8_e4m3fn_fast", E4M3, scaled=False, fast=True),
        Recipe("fp8_e5m2_fast", E5M2, scaled=False, fast=True),
        Recipe("fp8_e4m3fn_scaled_fast", E4M3, scaled=True, fast=True),
        Recipe("fp8_e5m2_scaled_fast", E5M2, scaled=True, fast=True),
        Recipe("fp8_e4m3fn_dynamic_fast", E4M3, scaled=True, fast=True, activations="tensor"),
        Recipe(
            "fp8_e4m3fn_rowwise_fast", E4M3, scaled=True, fast=True, activations="row",
            channels=True,
        ),
        Recipe("fp4_experimental", E2M1, scaled=False, fast=False),
        Recipe("fp4_scaled", E2M1, scaled=True, fast=False),
        Recipe("fp4_scaled_fast", E2M1, scaled=True, fast=True, activations="row"),
    )
}


def recipe_named(name: str, also: tuple[str, ...] = ()) -> Recipe:
    """The recipe called ``name``.

    Raises:
        ValueError: there is none; the message offers the names in ``also``, too.
    """
    if name not in RECIPES:
        names = ", ".join(map(repr, (*RECIPES, *also)))
        raise ValueError(f"quantization {name!r}: use one of {names}")
    return RECIPES[name]


def quantize_weight(weight: torch.Tensor, recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor]:
    """``weight`` in the FP8 type and its scale, so that weight is about quantised * scale.

    Args:
        weight: (N, K), any float type.
        recipe: decides the type and the scale: 1, or amax / largest value, over the tensor or
            over each row.

    Returns:
        (N, K) e4m3 or e5m2, dense; scale fp32 of shape (), or (N, 1) for a scale a channel.
    """
    wide = weight.float()
    scale = torch.ones((), dtype=torch.float32, device=weight.device)
    if recipe.scaled:
        size = wide.abs()
        amax = size.amax(1, keepdim=True) if recipe.channels else size.amax()
        scale = (amax / torch.finfo(recipe.dtype).max).clamp(min=torch.finfo(torch.float32).tiny)
    return quantize(wide / scale, recipe.dtype), scale


def quantize(x: torch.Tensor, dtype: torch.dtype = E4M3) -> torch.Tensor:
    """``x`` clamped to the range of an FP8 type, 448 or 57344, out of place, and cast.

    Beyond it an eager cast to e4m3 gave NaN before torch 2.12; to e5m2 it gives infinity.
    """
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype)
