"""Linears as files store them: in full, in FP8 or in NVFP4, each with its scales.

| | weight | scales |
|---|---|---|
| FP8 | (N, K) e4m3 or e5m2 | none, ``weight_scale`` of one element, or one a row: (N,), (N, 1) |
| NVFP4 | (N, K / 2) uint8 | ``weight_scale`` (N, K / 16) e4m3, ``weight_scale_2`` of one element |

ComfyUI's NVFP4 differs in two ways from what :mod:`wan_models.quant.nvfp4` keeps: the first of two
values lies in the high half of a byte, and block scales are in cuBLAS's tiled order. Both are
undone exactly. Sources: the formats' public descriptions, and ComfyUI's and LightX2V's files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import torch

from wan_models.checkpoint.contents import MARKER_WITHOUT_PRODUCTS, Contents
from wan_models.checkpoint.errors import Problem
from wan_models.checkpoint.reader import DTYPE_NAMES, Entry, Placer
from wan_models.quant import Fp4Linear, Fp8Linear, QuantizedLinear
from wan_models.quant.nvfp4 import (
    BLOCK,
    Nvfp4,
    dequantize_nvfp4,
    swap_halves,
    swizzle_scales,
    unswizzle_scales,
)
from wan_models.quant.recipes import E4M3, E5M2, RECIPES, Recipe

#: Types that a weight, bias or other tensor in full precision may have in a file.
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
#: Parts of a quantised linear beside weight and bias.
SCALES = ("weight_scale", "weight_scale_2", "input_scale")
_FP8_NAMES = {E4M3: "fp8_e4m3fn", E5M2: "fp8_e5m2"}
#: ``comfy_quant`` formats that can be loaded.
COMFY_FORMATS = {"float8_e4m3fn": E4M3, "float8_e5m2": E5M2, "nvfp4": torch.uint8}


class Form(Enum):
    """How a weight is stored."""

    FULL = "full precision"
    FP8 = "FP8"
    FP8_ROWS = "FP8 with a scale a row"
    NVFP4 = "NVFP4"


@dataclass(frozen=True)
class Stored:
    """One linear of a checkpoint.

    Attributes:
        path: official path of the layer.
        form: how the weight is stored.
        parts: its entries by name: weight, bias and scales.
        recipe: by which it loads if nobody asks for another; None in full precision.
        tiled: whether NVFP4 is stored as ComfyUI does.
        transposed: whether the weight is stored as (K, N).
    """

    path: str
    form: Form
    parts: dict[str, Entry]
    recipe: str | None
    tiled: bool = False
    transposed: bool = False

    @property
    def scaled(self) -> bool:
        return "weight_scale" in self.parts

    def holds(self, recipe: Recipe) -> bool:
        """Whether ``recipe`` keeps the weight as it is stored here, to the bit.

        One scale of a file stands for that of every channel without loss; the reverse does not.
        """
        if recipe.fp4:
            return self.form is Form.NVFP4
        forms = (Form.FP8, Form.FP8_ROWS) if recipe.channels else (Form.FP8,)
        return (
            self.form in forms
            and self.parts["weight"].dtype == recipe.dtype
            and (recipe.scaled or not self.scaled)
        )

    # -- values ------------------------------------------------------------------------------

    def weight(self, place: Placer, dtype: torch.dtype | None = None) -> torch.Tensor:
        """(N, K), or (N, K / 2) for NVFP4, dense."""
        entry, name = self.parts["weight"], f"{self.path}.weight"
        if self.tiled:
            return swap_halves(place.moved(entry, name))
        if self.transposed:
            place.transposed.append(name)
            return place.moved(entry, name, dtype).t().clone(memory_format=torch.contiguous_format)
        return place(entry, name, dtype)

    def bias(self, place: Placer, dtype: torch.dtype | None) -> torch.Tensor | None:
        entry = self.parts.get("bias")
        return None if entry is None else place(entry, f"{self.path}.bias", dtype)

    def _number(self, part: str, place: Placer) -> torch.Tensor | None:
        entry = self.parts.get(part)
        if entry is None:
            return None
        return place.moved(entry, f"{self.path}.{part}", torch.float32).reshape(())

    def _scale(self, place: Placer) -> torch.Tensor:
        """``weight_scale`` of an FP8 weight: of shape (), or (N, 1) if every row has its own."""
        name = f"{self.path}.weight_scale"
        scale = place.moved(self.parts["weight_scale"], name, torch.float32)
        return scale.reshape((-1, 1) if self.form is Form.FP8_ROWS else ())

    def _block_scales(self, place: Placer, columns: int) -> torch.Tensor:
        entry, name = self.parts["weight_scale"], f"{self.path}.weight_scale"
        if not self.tiled:
            return place(entry, name).view(E4M3)
        rows = self.parts["weight"].shape[0]
        return unswizzle_scales(place.moved(entry, name).view(E4M3), (rows, columns // BLOCK))

    def _nvfp4(self, place: Placer) -> Nvfp4:
        packed = self.weight(place)
        scales = self._block_scales(place, packed.shape[1] * 2)
        return Nvfp4(packed, scales, self._number("weight_scale_2", place))

    def module(
        self, recipe: Recipe, place: Placer, bias: torch.Tensor | None
    ) -> QuantizedLinear:
        """The quantised linear, its weight as it is stored; ``holds(recipe)`` must be true."""
        if recipe.fp4:
            return Fp4Linear(*self._nvfp4(place), bias, recipe.name)
        weight = self.weight(place)
        scale = self._scale(place) if self.scaled else None
        if recipe.scaled and scale is None:
            scale = torch.ones((), device=weight.device)
        given = self._number("input_scale", place) if recipe.takes_input_scale else None
        return Fp8Linear(weight, scale, bias, recipe.name, given)

    def dequantised(self, place: Placer) -> torch.Tensor:
        """The weight that a quantised linear stands for: (N, K) fp32."""
        if self.form is Form.NVFP4:
            return dequantize_nvfp4(self._nvfp4(place))
        weight = self.weight(place, torch.float32)
        if not self.scaled:
            return weight
        return weight * self._scale(place)


def stored_linear(
    found: Contents, path: str, shape: tuple[int, int]
) -> tuple[Stored | None, list[Problem]]:
    """The linear at ``path``, and what is wrong with it.

    Args:
        found: the checkpoint.
        path: official.
        shape: (N, K) that the model wants.

    Returns:
        None with the problems, if there are any or there is no weight.
    """
    parts = {
        part: found.tensors[f"{path}.{part}"]
        for part in ("weight", "bias", *SCALES, "comfy_quant")
        if f"{path}.{part}" in found.tensors
    }
    weight = parts.get("weight")
    if weight is None:
        return None, []
    settings = found.settings.get(path, {})
    parts.pop("comfy_quant", None)
    problems = _settings_problems(found, path, settings, weight)
    problems += _marker_problems(found, parts)
    form = _form(found, parts, shape)
    if form is None:
        problems.append(_bad_dtype(weight, (*FLOATS, E4M3, E5M2, torch.uint8)))
    if problems:
        return None, problems
    transposed = (
        found.naming == "lightx2v"
        and form in (Form.FP8, Form.FP8_ROWS)
        and _columns_first(found)
    )
    tiled = form is Form.NVFP4 and (bool(settings) or found.naming == "comfyui")
    problems = list(_shape_problems(form, parts, shape, tiled, transposed))
    if form is Form.FULL:
        # A scale beside a weight in full precision would be ignored: it is reported as extra.
        parts = {part: entry for part, entry in parts.items() if part not in SCALES}
    missing = {Form.NVFP4: ("weight_scale", "weight_scale_2")}.get(form, ())
    if settings and form is Form.FP8:
        missing = ("weight_scale",)
    problems += [
        Problem("missing", found.file_name(f"{path}.{part}"))
        for part in missing
        if part not in parts and f"{path}.{part}" not in found.faulty
    ]
    if problems or any(f"{path}.{part}" in found.faulty for part in missing):
        return None, problems
    recipe = _recipe(found, path, form, weight.dtype, "weight_scale" in parts, settings)
    return Stored(path, form, parts, recipe, tiled, transposed), []


def _form(found: Contents, parts: dict[str, Entry], shape: tuple[int, int]) -> Form | None:
    dtype = parts["weight"].dtype
    if dtype in FLOATS:
        return Form.FULL
    if dtype == torch.uint8:
        return Form.NVFP4
    if dtype not in (E4M3, E5M2):
        return None
    scale = parts.get("weight_scale")
    if scale is None or math.prod(scale.shape) == 1:
        return Form.FP8
    # One number for every row may be the same number: how LightX2V writes one scale.
    if math.prod(scale.shape) == shape[0] and scale.dtype in FLOATS:
        values = found.source.read(scale).float()
        if (values == values.flatten()[0]).all():
            parts["weight_scale"] = _first(scale)
            return Form.FP8
    return Form.FP8_ROWS


def _first(entry: Entry) -> Entry:
    """The first element alone."""
    return Entry(entry.name, entry.dtype, (1,), entry.file, entry.start)


def _settings_problems(
    found: Contents, path: str, settings: dict, weight: Entry
) -> list[Problem]:
    if not settings:
        return []
    name = found.file_name(f"{path}.comfy_quant")
    wanted = COMFY_FORMATS.get(settings.get("format"))
    if wanted is None:
        known = ", ".join(COMFY_FORMATS)
        detail = f"format {settings.get('format')!r} is not supported: use one of {known}"
        return [Problem("format", name, detail)]
    if wanted != weight.dtype:
        return [Problem("dtype", weight.name, f"is {_name(weight.dtype)}: {name} says "
                                              f"{settings['format']}")]
    return []


def _marker_problems(found: Contents, parts: dict[str, Entry]) -> list[Problem]:
    """The old marker's type is that of every scaled FP8 weight; fp32 means e4m3."""
    weight, marker = parts["weight"], found.marker
    if marker is None or "weight_scale" not in parts or weight.dtype not in (E4M3, E5M2):
        return []
    said = E4M3 if marker.dtype == torch.float32 else marker.dtype
    if weight.dtype == said:
        return []
    detail = f"is {_name(weight.dtype)}: {marker.name} says {_name(said)}"
    return [Problem("dtype", weight.name, detail)]


def _shape_problems(
    form: Form,
    parts: dict[str, Entry],
    shape: tuple[int, int],
    tiled: bool,
    transposed: bool,
) -> list[Problem]:
    rows, columns = shape
    weight, scale = parts["weight"], parts.get("weight_scale")
    problems = []
    wanted = (rows, columns // 2) if form is Form.NVFP4 else shape
    wanted = wanted[::-1] if transposed else wanted
    if weight.shape != wanted:
        problems.append(bad_shape(weight, wanted))
    if form is Form.NVFP4 and scale is not None:
        if scale.dtype not in (E4M3, torch.uint8):
            problems.append(_bad_dtype(scale, (E4M3, torch.uint8)))
        count = (rows, columns // BLOCK)
        if tiled:
            tiles = (-(-count[0] // 128) * 128, -(-count[1] // 4) * 4)
            if math.prod(scale.shape) != math.prod(tiles):
                problems.append(bad_shape(scale, tiles))
        elif scale.shape != count:
            problems.append(bad_shape(scale, count))
    elif form is Form.FP8_ROWS and scale.shape not in ((rows,), (rows, 1)):
        problems.append(bad_shape(scale, (1,)))
    numbers = SCALES if form is Form.FP8 else ("weight_scale_2", "input_scale")
    for part in numbers if form is not Form.FULL else ():
        entry = parts.get(part)
        if entry is not None and math.prod(entry.shape) != 1:
            problems.append(bad_shape(entry, (1,)))
    for part in ("bias", *(() if form is Form.FULL else SCALES)):
        entry = parts.get(part)
        block_scale = form is Form.NVFP4 and part == "weight_scale"
        if entry is not None and not block_scale and entry.dtype not in FLOATS:
            problems.append(_bad_dtype(entry, FLOATS))
    bias = parts.get("bias")
    if bias is not None and bias.shape != (rows,):
        problems.append(bad_shape(bias, (rows,)))
    return problems


def _columns_first(found: Contents) -> bool:
    """Whether the FP8 weights of a LightX2V file are (K, N): a bias as long as the weight's second
    size, but not its first, says so for all of them, the square ones included."""
    for name, entry in found.tensors.items():
        if name.endswith(".weight") and entry.dtype in (E4M3, E5M2) and len(entry.shape) == 2:
            bias = found.tensors.get(name.removesuffix("weight") + "bias")
            if bias is not None and entry.shape[0] != entry.shape[1]:
                return bias.shape == entry.shape[1:]
    return False


def _recipe(
    found: Contents, path: str, form: Form, dtype: torch.dtype, scaled: bool, settings: dict
) -> str | None:
    """The recipe that the file asks for: what :func:`save` noted, or what its markers mean."""
    if form is Form.FULL:
        return None
    noted = RECIPES.get(found.recipes.get(path))
    if form is Form.NVFP4:
        fast = not settings.get("full_precision_matrix_mult", False)
        name = "fp4_scaled_fast" if fast else "fp4_scaled"
        return noted.name if noted is not None and noted.fp4 else name
    if noted is not None and noted.dtype == dtype and noted.scaled == scaled:
        return noted.name
    if not scaled:
        return _FP8_NAMES[dtype]
    marker = found.marker
    forbidden = marker is not None and math.prod(marker.shape) == MARKER_WITHOUT_PRODUCTS
    fast = not (forbidden or settings.get("full_precision_matrix_mult", False))
    if form is Form.FP8_ROWS and dtype == E4M3 and fast:
        return "fp8_e4m3fn_rowwise_fast"
    return f"{_FP8_NAMES[dtype]}_scaled" + ("_fast" if fast else "")


def bad_shape(entry: Entry, wanted: tuple[int, ...]) -> Problem:
    """A tensor whose shape is not the one wanted."""
    return Problem("shape", entry.name, f"is {list(entry.shape)}, wanted {list(wanted)}")


def _bad_dtype(entry: Entry, wanted: tuple[torch.dtype, ...]) -> Problem:
    names = ", ".join(map(_name, wanted))
    return Problem("dtype", entry.name, f"is {_name(entry.dtype)}, wanted one of {names}")


def _name(dtype: torch.dtype) -> str:
    return DTYPE_NAMES.get(dtype, str(dtype))


def comfy_nvfp4(weight: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed weight and block scales as ComfyUI's files hold them.

    Args:
        weight: (N, K / 2) uint8, as :class:`Fp4Linear` keeps it.
        scales: (N, K / 16) e4m3.

    Returns:
        (N, K / 2) uint8; (N up to a multiple of 128, K / 16 up to a multiple of 4) e4m3.
    """
    rows = -(-scales.shape[0] // 128) * 128
    return swap_halves(weight), swizzle_scales(scales).view(rows, -1)
