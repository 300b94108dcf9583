"""Replace the linears of a module by quantised ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from wan_models.quant import fp4, fp8
from wan_models.quant.fp4 import Fp4Linear
from wan_models.quant.fp8 import Fp8Linear
from wan_models.quant.linear import QuantizedLinear
from wan_models.quant.measured import AUTO, chosen
from wan_models.quant.precision import matches, why_kept
from wan_models.quant.recipes import Recipe, recipe_named

#: Least capability of an NVIDIA GPU that multiplies FP8.
FP8_CAPABILITY = (8, 9)


class QuantizedRow(NamedTuple):
    """What :func:`quantize_` did to one linear.

    Attributes:
        name: dotted.
        action: ``"quantised"``, ``"kept"`` or ``"already quantised"``.
        reason: the recipe, with what decided for it under an ``auto`` name; or why the linear was
            kept in 16 bits.
    """

    name: str
    action: str
    reason: str


def quantized(linear: nn.Linear, recipe: str) -> QuantizedLinear:
    """``linear`` as a new quantised layer; LoRAs attached to it go with it.

    Args:
        linear: any ``nn.Linear``, on the meta device too.
        recipe: name of a recipe, see :mod:`wan_models.quant`.

    Raises:
        ValueError: unknown recipe, sizes that it does not take, or a GPU that cannot multiply
            what it stores.
    """
    made_by = recipe_named(recipe)
    check_device(made_by, linear.weight.device)
    made = (Fp4Linear if made_by.fp4 else Fp8Linear).from_linear(linear, recipe)
    made.lora = getattr(linear, "lora", None)
    return made.train(linear.training)


def quantize_(module: nn.Module, recipe: str, skip: Sequence[str] = ()) -> list[QuantizedRow]:
    """Replace the linears of ``module``, in place, by quantised ones.

    May be called again after more layers are attached: what is quantised already stays as it is.

    Args:
        module: any module.
        recipe: name of a recipe, see :mod:`wan_models.quant`; or ``"auto_fp8"`` or ``"auto_fp4"``
            for the fastest accurate one of each shape, by :mod:`wan_models.quant.measured`.
        skip: linears that stay in high precision, by exact dotted name; ``*`` stands for exactly
            one component, as in ``"blocks.*.cross_attn.k"``. Never a substring. For a whole Wan
            model start from :func:`wan_models.quant.high_precision`.

    Returns:
        One row for every name of a linear, in order. A linear with several names is treated as
        one: replaced once, or kept if any of its names is skipped.

    Raises:
        ValueError: unknown recipe, a GPU that cannot multiply what it stores, a ``skip`` entry
            that names no linear or one that is quantised already, or a ``module`` that is itself
            a linear: nothing holds it, so nothing can hold its replacement.
    """
    made_by = recipe_named(AUTO.get(recipe, recipe), also=tuple(AUTO))
    if isinstance(module, nn.Linear):
        raise ValueError(
            "quantize_ replaces linears inside a module: use quantized, or from_linear of "
            "Fp8Linear or Fp4Linear"
        )
    linears = [
        (name, child)
        for name, child in module.named_modules(remove_duplicate=False)
        if isinstance(child, nn.Linear | QuantizedLinear)
    ]
    kept = _kept(linears, skip, type(module).__name__)
    for device in {child.weight.device for _, child in linears if isinstance(child, nn.Linear)}:
        check_device(made_by, device)
    unfit = fp4.unfit if made_by.fp4 else fp8.unfit
    rows: list[QuantizedRow] = []
    made: dict[nn.Linear, QuantizedLinear] = {}
    for name, linear in linears:
        if isinstance(linear, QuantizedLinear):
            rows.append(QuantizedRow(name, "already quantised", linear.recipe))
            continue
        taken, reason = recipe, recipe
        if recipe in AUTO:
            taken, reason = chosen(recipe, linear)
        obstacle = kept.get(linear) or unfit(linear, made_by)
        if taken is None or obstacle is not None:
            rows.append(QuantizedRow(name, "kept", obstacle or reason))
            continue
        parent, _, leaf = name.rpartition(".")
        if linear not in made:
            made[linear] = quantized(linear, taken)
        setattr(module.get_submodule(parent), leaf, made[linear])
        rows.append(QuantizedRow(name, "quantised", reason))
    return rows


def _kept(
    linears: Sequence[tuple[str, nn.Module]], skip: Sequence[str], holder: str
) -> dict[nn.Module, str]:
    """The linears that ``skip`` names, each with the first entry that names it."""
    kept: dict[nn.Module, str] = {}
    for entry in skip:
        named = [(name, linear) for name, linear in linears if matches(entry, name)]
        if not named:
            raise ValueError(f"skip={entry!r} names no linear of {holder}")
        for name, linear in named:
            if isinstance(linear, QuantizedLinear):
                raise ValueError(
                    f"skip={entry!r} names {name}, which is quantised already by {linear.recipe}"
                )
            kept.setdefault(linear, why_kept(entry))
    return kept


def check_device(recipe: Recipe, device: torch.device) -> None:
    """Refuse a fast recipe on an NVIDIA GPU that multiplies no FP8, with a ValueError."""
    if not recipe.fast or device.type != "cuda" or torch.version.hip is not None:
        return
    properties = torch.cuda.get_device_properties(device)
    if (properties.major, properties.minor) < FP8_CAPABILITY:
        raise ValueError(
            f"recipe {recipe.name!r} needs a GPU of capability 8.9 or later: {device} has "
            f"{properties.major}.{properties.minor}, use {recipe.name.removesuffix('_fast')!r}"
        )
