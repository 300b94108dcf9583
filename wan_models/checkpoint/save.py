"""Saving: a header with everything's place, then tensor after tensor, into one new file."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from wan_models.checkpoint.contents import MARKER, MARKER_WITHOUT_PRODUCTS, OWN_METADATA
from wan_models.checkpoint.layers import layers_of
from wan_models.checkpoint.naming import check_naming, diffusers
from wan_models.checkpoint.quantised import COMFY_FORMATS, SCALES, comfy_nvfp4
from wan_models.checkpoint.reader import DTYPE_NAMES, DTYPES
from wan_models.quant import QuantizedLinear
from wan_models.quant.recipes import Recipe, recipe_named

#: Every tensor whose size is a multiple of this starts at one, in a file written here.
_ALIGNMENT = 64
_OLD_PARTS = {"weight_scale": "scale_weight", "input_scale": "scale_input"}


class _Part(NamedTuple):
    """One tensor to write: its name in the file, type, shape, and how to get its values."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    values: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        size = self.dtype.itemsize
        for n in self.shape:
            size *= n
        return size


def save(
    model: nn.Module, path: str | Path, *, naming: str = "official", prefix: str = ""
) -> None:
    """Write the tensors of ``model`` to one safetensors file; loading it gives the same bits.

    One tensor at a time is copied to host memory. The file replaces ``path`` when it is complete,
    so a model may be saved over the file that it is mapped from.

    Args:
        model: any module with official names, plain or quantised.
        path: the file.
        naming: one of :data:`NAMINGS`.
        prefix: in front of every name.

    Raises:
        ValueError: an unknown naming, one that has no form for what the model holds, unmerged
            LoRAs, tensors without values or of a type that the format lacks.
    """
    check_naming(naming)
    parts, recipes = _parts(model, naming, prefix)
    metadata = {
        "format": "pt",
        OWN_METADATA: json.dumps({"naming": naming, "recipes": recipes}),
    }
    _write(Path(path), parts, metadata)


def _parts(
    model: nn.Module, naming: str, prefix: str
) -> tuple[list[_Part], dict[str, list[str]]]:
    layers = layers_of(model)
    if layers.loras:
        raise ValueError(
            f"{layers.loras[0]} has unmerged LoRAs, which no naming has a place for: detach_lora "
            "or merge_lora_ first"
        )
    # Values of swapped blocks come from here, not from the modules.
    state = {name.replace("_orig_mod.", ""): value for name, value in model.state_dict().items()}
    parts: list[_Part] = []
    recipes: dict[str, list[str]] = {}
    for path, linear in layers.linears.items():
        module = linear.module
        if isinstance(module, QuantizedLinear):
            recipes.setdefault(module.recipe, []).append(path)
        for part in ("weight", "bias", *SCALES):
            value = state.get(f"{path}.{part}")
            if value is not None:
                parts += _linear_part(path, part, value, module, state, naming)
        parts += _comfy_marker(path, module, state, naming)
    parts += [_plain(name, state[name]) for name in layers.others]
    made = [recipe_named(name) for name in recipes]
    _check_forms(made, naming)
    parts += _old_marker(made, naming)
    rename = diffusers if naming == "diffusers" else str
    parts = [part._replace(name=prefix + rename(part.name)) for part in parts]
    return parts, recipes


def _plain(name: str, value: torch.Tensor) -> _Part:
    if value.is_meta:
        raise ValueError(f"{name} is on the meta device and has no values: load the model first")
    if value.dtype not in DTYPE_NAMES:
        raise ValueError(f"{name} is {value.dtype}: safetensors files hold {', '.join(DTYPES)}")
    return _Part(name, value.dtype, tuple(value.shape), lambda: value)


def _linear_part(
    path: str,
    part: str,
    value: torch.Tensor,
    module: nn.Module,
    state: dict[str, torch.Tensor],
    naming: str,
) -> list[_Part]:
    name = f"{path}.{part}"
    plain = _plain(name, value)
    if not isinstance(module, QuantizedLinear):
        return [plain]
    recipe = recipe_named(module.recipe)
    if naming == "comfyui_old" and part in _OLD_PARTS:
        return [plain._replace(name=f"{path}.{_OLD_PARTS[part]}")]
    if naming == "lightx2v" and part == "weight_scale":
        rows = module.out_features
        return [_Part(name, value.dtype, (rows, 1), lambda: value.expand(rows, 1))]
    if naming == "comfyui" and recipe.fp4 and part in ("weight", "weight_scale"):
        index = ("weight", "weight_scale").index(part)

        def values() -> torch.Tensor:
            return comfy_nvfp4(state[f"{path}.weight"], state[f"{path}.weight_scale"])[index]

        rows, columns = value.shape
        tiles = (-(-rows // 128) * 128, -(-columns // 4) * 4)
        return [_Part(name, value.dtype, (rows, columns) if index == 0 else tiles, values)]
    return [plain]


def _comfy_marker(
    path: str, module: nn.Module, state: dict[str, torch.Tensor], naming: str
) -> list[_Part]:
    if naming != "comfyui" or f"{path}.weight_scale" not in state:
        return []
    dtype = state[f"{path}.weight"].dtype
    settings = {"format": next(name for name, of in COMFY_FORMATS.items() if of == dtype)}
    if not module.fast:
        settings["full_precision_matrix_mult"] = True
    text = torch.frombuffer(bytearray(json.dumps(settings).encode()), dtype=torch.uint8)
    return [_plain(f"{path}.comfy_quant", text)]


def _check_forms(recipes: list[Recipe], naming: str) -> None:
    for recipe in recipes:
        if recipe.fp4 and naming in ("comfyui_old", "lightx2v"):
            raise ValueError(
                f"naming={naming!r} has no form for {recipe.name}: use official, diffusers or "
                "comfyui"
            )
        if recipe.channels and naming in ("comfyui_old", "comfyui"):
            raise ValueError(
                f"naming={naming!r} has one scale for a weight, {recipe.name} one for every "
                "channel: use official, diffusers or lightx2v"
            )
    scaled = {(r.dtype, r.fast) for r in recipes if r.scaled and not r.fp4}
    if naming == "comfyui_old" and len(scaled) > 1:
        found = ", ".join(recipe.name for recipe in recipes)
        raise ValueError(f"naming={naming!r} marks a whole file by one recipe, not {found}")


def _old_marker(recipes: list[Recipe], naming: str) -> list[_Part]:
    scaled = [recipe for recipe in recipes if recipe.scaled]
    if naming != "comfyui_old" or not scaled:
        return []
    size = 0 if scaled[0].fast else MARKER_WITHOUT_PRODUCTS
    return [_plain(MARKER, torch.zeros(size, dtype=torch.uint8).to(scaled[0].dtype))]


def _write(path: Path, parts: list[_Part], metadata: dict[str, str]) -> None:
    # Sizes with many factors of 2 first, so that what follows starts at a multiple of them.
    parts = sorted(parts, key=lambda part: (-_factor(part.nbytes), part.name))
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for part in parts:
        header[part.name] = {
            "dtype": DTYPE_NAMES[part.dtype],
            "shape": list(part.shape),
            "data_offsets": [end, end + part.nbytes],
        }
        end += part.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    try:
        with unfinished.open("wb") as file:
            file.write(len(text).to_bytes(8, "little"))
            file.write(text)
            for part in parts:
                file.write(_raw(part))
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _factor(size: int) -> int:
    """The largest power of two that divides ``size``, up to the alignment."""
    return min(size & -size, _ALIGNMENT) if size else _ALIGNMENT


def _raw(part: _Part) -> memoryview:
    values = part.values().detach().cpu().clone(memory_format=torch.contiguous_format)
    size = values.numel() * values.itemsize
    if values.dtype != part.dtype or tuple(values.shape) != part.shape:
        raise ValueError(f"{part.name} became {values.dtype} {tuple(values.shape)} while saving")
    if size == 0:
        return memoryview(b"")
    buffer = (ctypes.c_ubyte * size).from_address(values.data_ptr())
    buffer.owner = values  # keeps the memory while the view is in use
    return memoryview(buffer)
