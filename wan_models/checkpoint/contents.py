"""What a checkpoint holds, under official names, whatever its own naming."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from wan_models.checkpoint import naming as names
from wan_models.checkpoint.errors import CheckpointError, Problem
from wan_models.checkpoint.reader import Entry, Source
from wan_models.quant.recipes import E4M3, E5M2

#: Parts of a layer by the names that only some files use.
_PARTS = {"scale_weight": "weight_scale", "scale_input": "input_scale"}
#: Top-level marker of the old scaled FP8 files, and how many elements forbid FP8 products.
MARKER = "scaled_fp8"
MARKER_WITHOUT_PRODUCTS = 2
#: Keys of a header's metadata: ours, and ComfyUI's.
OWN_METADATA = "wan_models"
COMFY_METADATA = "_quantization_metadata"


@dataclass
class Contents:
    """A checkpoint's tensors by official name.

    Attributes:
        source: the open files.
        naming, prefix: as given or found.
        tensors: by official name, ``weight_scale`` and ``input_scale`` under these names.
        marker: of an old scaled FP8 file.
        settings: by official path of a layer, what the file says about its quantisation.
        recipes: by official path of a layer, the recipe that :func:`save` noted.
        problems: found so far.
        faulty: official names of tensors with a problem.
        unused: names in the file that nothing needs, fused copies of what is there unfused.
    """

    source: Source
    naming: str
    prefix: str
    tensors: dict[str, Entry] = field(default_factory=dict)
    marker: Entry | None = None
    settings: dict[str, dict] = field(default_factory=dict)
    recipes: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    faulty: set[str] = field(default_factory=set)
    unused: list[str] = field(default_factory=list)

    def file_name(self, name: str) -> str:
        """What a tensor with this official name would be called in the file."""
        path, _, part = name.rpartition(".")
        if self.naming == "comfyui_old":
            old = {new: old for old, new in _PARTS.items()}
            name = f"{path}.{old[part]}" if part in old else name
        if self.naming == "diffusers":
            name = names.diffusers(name)
        return self.prefix + name


class Detected(NamedTuple):
    """How a checkpoint is written.

    Attributes:
        naming: one of :data:`wan_models.checkpoint.NAMINGS`.
        prefix: in front of every name, perhaps empty.
        quantisation: the recipe by which its linears load, several joined by commas, or None.
    """

    naming: str
    prefix: str
    quantisation: str | None


def contents(source: Source, naming: str | None = None, prefix: str | None = None) -> Contents:
    """Sort what ``source`` holds.

    Args:
        source: the open files.
        naming: how they are named; found out if None.
        prefix: in front of every name; found out if None.

    Raises:
        ValueError: there is no such naming.
        CheckpointError: no prefix and naming makes the names those of a Wan model.
    """
    faulty = [problem.name for problem in source.problems]
    bare_names = [names.without_compiled(name) for name in (*source.entries, *faulty)]
    if naming is not None:
        names.check_naming(naming)
    if prefix is None:
        prefix = names.find_prefix(bare_names)
        if prefix is None:
            shown = ", ".join(sorted(bare_names)[:3]) or "nothing"
            raise CheckpointError(
                source.path,
                [*source.problems, Problem("format", "names", f"no Wan model's: {shown}, ...")],
            )
    if naming is None:
        naming = _naming_of(source, bare_names, prefix)
    found = Contents(source, naming, prefix, problems=list(source.problems))
    found.settings = _comfy_settings(found)
    noted = _json(source.metadata.get(OWN_METADATA)).get("recipes")
    for recipe, paths in noted.items() if isinstance(noted, dict) else ():
        found.recipes |= {str(path): recipe for path in paths}
    found.faulty = {name for raw in faulty for name in _official(found, raw)}
    fused = []
    for raw, entry in source.entries.items():
        targets = _official(found, raw)
        if targets == (MARKER,):
            found.marker = entry
        elif len(targets) > 1:
            fused.append((targets, entry))
        else:
            _add(found, targets[0], entry)
    for targets, entry in fused:
        _split(found, targets, entry)
    return found


def _official(found: Contents, raw: str) -> tuple[str, ...]:
    """Official names of what the file calls ``raw``: several for a fused tensor."""
    name = names.without_compiled(raw)
    if name == MARKER:
        return (MARKER,)
    if not name.startswith(found.prefix):
        return (name,)
    name = name.removeprefix(found.prefix)
    if found.naming == "diffusers":
        parts = names.fused_parts(name)
        if parts:
            return tuple(map(_part_renamed, parts))
        name = names.official(name)
    return (_part_renamed(name),)


def _part_renamed(name: str) -> str:
    path, dot, part = name.rpartition(".")
    return path + dot + _PARTS.get(part, part)


def _add(found: Contents, name: str, entry: Entry) -> None:
    if name in found.tensors:
        found.problems.append(
            Problem("twice", entry.name, f"{found.tensors[name].name} is the same tensor")
        )
    else:
        found.tensors[name] = entry


def _split(found: Contents, targets: tuple[str, ...], entry: Entry) -> None:
    """Give each target its rows of a fused tensor; a single number belongs to all of them."""
    if all(name in found.tensors for name in targets):
        found.unused.append(entry.name)
        return
    count = len(targets)
    part = targets[0].rpartition(".")[2]
    if part == "comfy_quant" or entry.shape in ((), (1,)):
        pieces = [entry] * count
    elif entry.shape[0] % count:
        found.faulty.update(targets)
        found.problems.append(
            Problem("shape", entry.name, f"{entry.shape[0]} rows are no multiple of {count}")
        )
        return
    else:
        pieces = [entry.rows(i, count) for i in range(count)]
    for name, piece in zip(targets, pieces, strict=True):
        _add(found, name, piece)


def _naming_of(source: Source, bare_names: list[str], prefix: str) -> str:
    noted = _json(source.metadata.get(OWN_METADATA)).get("naming")
    if noted in names.NAMINGS:
        return noted
    bare = [name.removeprefix(prefix) for name in bare_names]
    if names.uses_diffusers_paths(bare):
        return "diffusers"
    parts = {name.rpartition(".")[2] for name in bare}
    if parts & {"scale_weight", MARKER}:
        return "comfyui_old"
    if "comfy_quant" in parts or COMFY_METADATA in source.metadata:
        return "comfyui"
    for name, entry in source.entries.items():
        if name.endswith(".weight_scale") and math.prod(entry.shape) > 1:
            weight = source.entries.get(name.removesuffix("_scale"))
            if weight is not None and weight.dtype in (E4M3, E5M2):
                return "lightx2v"
        if name.endswith(".weight") and entry.dtype in (E4M3, E5M2) and _transposed(source, name):
            return "lightx2v"
    return "official"


def _transposed(source: Source, name: str) -> bool:
    """Whether the bias of a weight says that its rows are columns."""
    shape = source.entries[name].shape
    bias = source.entries.get(name.removesuffix("weight") + "bias")
    return (
        bias is not None
        and len(shape) == 2
        and shape[0] != shape[1]
        and bias.shape == shape[1:]
    )


def _comfy_settings(found: Contents) -> dict[str, dict]:
    """What the file says of each layer's quantisation: in the header, or in a tensor of JSON."""
    said: dict[str, dict] = {}
    layers = _json(found.source.metadata.get(COMFY_METADATA)).get("layers")
    pairs = list(layers.items()) if isinstance(layers, dict) else []
    for raw, entry in found.source.entries.items():
        if raw.endswith(".comfy_quant"):
            text = bytes(found.source.read(entry).flatten().view(torch.uint8).tolist())
            pairs.append((raw.removesuffix(".comfy_quant"), _json(text)))
    for raw, settings in pairs:
        for name in _official(found, f"{raw}.comfy_quant"):
            # What says nothing of a format is reported as one that is not known.
            told = settings if isinstance(settings, dict) and "format" in settings else {}
            said[name.rpartition(".")[0]] = told or {"format": None}
    return said


def _json(text: str | bytes | None) -> dict:
    """An object written as JSON; empty if there is none, or something else."""
    try:
        made = json.loads(text or "{}")
    except ValueError:
        return {}
    return made if isinstance(made, dict) else {}
