"""The FP8 recipes by name, and their arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

import torch

E4M3 = torch.float8_e4m3fn
#: Largest finite e4m3 value. Beyond it an eager cast gave NaN before torch 2.12.
E4M3_MAX = 448.0


@dataclass(frozen=True)
class Recipe:
    """How a linear layer is stored and computed.

    Attributes:
        name: as users write it.
        scaled: whether the weight has a scale of its own, amax / 448, or is cast as it is.
    """

    name: str
    scaled: bool


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("fp8_e4m3fn_fast", scaled=False),
        Recipe("fp8_e4m3fn_scaled_fast", scaled=True),
    )
}


def recipe_named(name: str) -> Recipe:
    """The recipe called ``name``.

    Raises:
        ValueError: there is none.
    """
    if name not in RECIPES:
        raise ValueError(f"quantization {name!r}: use one of {', '.join(map(repr, RECIPES))}")
    return RECIPES[name]


def quantize_weight(weight: torch.Tensor, recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor]:
    """``weight`` as e4m3 and its scale, so that weight is about quantised * scale.

    Args:
        weight: (N, K), any float type.
        recipe: decides the scale: 1, or amax / 448 over the tensor.

    Returns:
        (N, K) e4m3, dense; scale fp32 of shape ().
    """
    wide = weight.float()
    scale = torch.ones((), dtype=torch.float32, device=weight.device)
    if recipe.scaled:
        scale = (wide.abs().amax() / E4M3_MAX).clamp(min=torch.finfo(torch.float32).tiny)
    return quantize(wide / scale), scale


def quantize(x: torch.Tensor) -> torch.Tensor:
    """``x`` clamped to the e4m3 range, out of place, and cast."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
