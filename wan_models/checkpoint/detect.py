"""What a checkpoint is, from its headers alone."""

from __future__ import annotations

from pathlib import Path

import torch

from wan_models.checkpoint.contents import Detected, contents
from wan_models.checkpoint.quantised import Form, stored_linear
from wan_models.checkpoint.reader import open_checkpoint
from wan_models.config import CONFIGS
from wan_models.quant.recipes import RECIPES


def detect(path: str | Path) -> Detected:
    """How a checkpoint is written: naming, prefix and quantisation, from its headers.

    Args:
        path: as for :func:`load`.

    Raises:
        CheckpointError: no safetensors file, or not of a Wan model.
        FileNotFoundError: there is no such file.
    """
    found = contents(open_checkpoint(path))
    recipes = set()
    for name, entry in found.tensors.items():
        layer, _, part = name.rpartition(".")
        if part != "weight" or len(entry.shape) != 2:
            continue
        rows, columns = entry.shape
        bias = found.tensors.get(f"{layer}.bias")
        if bias is not None and bias.shape == (columns,) != (rows,):
            rows, columns = columns, rows
        columns *= 2 if entry.dtype == torch.uint8 else 1
        stored, _ = stored_linear(found, layer, (rows, columns))
        if stored is not None and stored.recipe is not None:
            narrowed = stored.form is Form.FP8_ROWS and not RECIPES[stored.recipe].channels
            recipes.add(stored.recipe + (" with a scale a row" if narrowed else ""))
    return Detected(found.naming, found.prefix, ", ".join(sorted(recipes)) or None)


def variant(path: str | Path) -> str:
    """The name in :data:`wan_models.config.CONFIGS` of the model that a checkpoint is of.

    Judged by the patch embedding's width and channels, and by which branches are there. The A14B
    experts of Wan 2.2 for text look like the 14B model of 2.1 and get its name.

    Args:
        path: as for :func:`load`.

    Raises:
        CheckpointError: no safetensors file, or not of a Wan model.
        FileNotFoundError: there is no such file.
        ValueError: none of the known sizes.
    """
    tensors = contents(open_checkpoint(path)).tensors
    embedding = tensors.get("patch_embedding.weight")
    shape = embedding.shape if embedding is not None else ()
    seen = (
        shape[:2],
        any(name.endswith("cross_attn.k_img.weight") for name in tensors),
        "img_emb.emb_pos" in tensors,
        "vace_patch_embedding.weight" in tensors,
    )
    for name, config in CONFIGS.items():
        image = config.image_dim > 0
        facts = (
            (config.dim, config.in_channels),
            image,
            image and config.images > 1,
            bool(config.vace_layers),
        )
        if facts == seen:
            return name
    raise ValueError(
        f"{path} is none of {', '.join(CONFIGS)}: its patch embedding has shape {list(shape)}"
    )
