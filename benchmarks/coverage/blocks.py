"""Whole blocks as variants: each cross-attention, each add-on, each self-attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from benchmarks.coverage.sizes import Draw, Size
from benchmarks.coverage.variants import CHUNKS, Variant
from wan_models import (
    CONFIGS,
    BlockConditions,
    WanConfig,
    WanModel,
    addons,
    block_conditions,
    block_inputs,
)

Conditions = Callable[[Draw], BlockConditions]


def blocks() -> list[Variant]:
    """Every kind of block."""
    return [
        _block("text", "t2v-14b"),
        _block("text, a time step per token", "t2v-14b", per_token=True),
        _block("text, column-major input", "t2v-14b", column_major=True),
        _block(
            "text, split", "t2v-14b", lambda d: BlockConditions(grid=d.size.grid, chunks=CHUNKS)
        ),
        _radial(),
        _block("text and image", "i2v-14b"),
        *(
            _block(f"{'text and image' if base == 'i2v-14b' else 'text'}, {name}", base, addon=name)
            for name, base in ADDON_MODELS.items()
        ),
        _vace("first", 0),
        _vace("other", 1),
    ]


def told_who_speaks() -> Variant:
    """The block with MultiTalk's layers, given the maps that it makes by itself otherwise.

    Of random inputs all maps are nearly equal, so whom a token is taken for, a matter of which
    map is the largest, hangs on the last bit.
    """
    made = {variant.name: variant for variant in blocks()}["text and image, multitalk"]

    def inputs(d: Draw) -> tuple[Any, ...]:
        *others, conditions = made.inputs(d)
        maps = d.uniform(d.batch, 3, d.size.tokens)
        return *others, conditions._replace(multitalk_masks=None, multitalk_maps=maps)

    return replace(made, name=f"{made.name}, maps given", inputs=inputs)


#: Add-ons, and the models of whose width they are.
ADDON_MODELS = {
    "fantasytalking": "i2v-14b", "fantasyportrait": "i2v-14b", "multitalk": "i2v-14b",
    "mtvcrafter": "i2v-14b", "humo": "i2v-a14b", "ovi": "t2v-14b",
}


def config_of(name: str, size: Size) -> WanConfig:
    """The sizes of a model at ``size``, tiny or full."""
    return CONFIGS[name].tiny() if size.name == "tiny" else CONFIGS[name]


def _block(
    name: str,
    base: str,
    conditions: Conditions | None = None,
    *,
    addon: str | None = None,
    mode: str = "sdpa",
    grid: Callable[[Size], tuple[int, int, int]] = lambda size: size.grid,
    per_token: bool = False,
    column_major: bool = False,
) -> Variant:
    """A block of the model ``base`` with at most one add-on.

    Args:
        name: of the variant.
        base: a name of :data:`wan_models.CONFIGS`.
        conditions: besides those of the add-on and the image.
        addon: attached to it.
        mode: attention kernel.
        grid: tokens of the video.
        per_token: e0 (B, L, 6, C) instead of (B, 6, C).
        column_major: x as patchifying leaves it.
    """

    def make(size: Size) -> nn.Module:
        model = WanModel(replace(config_of(base, size), num_layers=1), mode)
        if addon is not None:
            addons.attach(model, addon)
        return _with_open_gates(model.blocks[0])

    def inputs(d: Draw) -> tuple[Any, ...]:
        config, tokens = config_of(base, d.size), grid(d.size)
        x, e0, context, rope = block_inputs(
            config, tokens, batch=d.batch, dtype=d.dtype, device=d.device, seed=d.seed,
            column_major=column_major,
        )
        if per_token:
            e0 = e0[:, None] * d.uniform(1, x.shape[1], 1, 1)
        given = conditions(d) if conditions else block_conditions(
            config, tokens, [addon] if addon else [], batch=d.batch, dtype=d.dtype,
            device=d.device, seed=d.seed,
        )
        return x, e0, context, rope, None, given

    return Variant("WanBlock", name, make, inputs, residual=True)


def _radial() -> Variant:
    return _block(
        "text, radial", "t2v-14b", lambda d: BlockConditions(radial=d.size.pattern),
        mode="radial", grid=lambda size: size.pattern.grid,
    )


def _vace(name: str, number: int) -> Variant:
    plain = _block("", "vace-14b")

    def make(size: Size) -> nn.Module:
        layers = tuple(range(number + 1))
        config = replace(
            config_of("vace-14b", size), num_layers=len(layers), vace_layers=layers
        )
        return _with_open_gates(WanModel(config).vace_blocks[number])

    def inputs(d: Draw) -> tuple[Any, ...]:
        control, *others = plain.inputs(d)
        return control, d.video(), *others

    return Variant("VaceBlock", name, make, inputs)


def _with_open_gates(block: nn.Module) -> nn.Module:
    """The gates that a fresh block has, near 0, would hide its self-attention and feed-forward."""
    nn.init.normal_(block.modulation, std=0.5)
    return block


def update(variant: Variant, args: tuple[Any, ...], out: Any) -> Any:
    """What ``variant`` adds to its residual stream, or ``out`` itself if it has none."""
    if not variant.residual:
        return out
    return out.float() - args[0].float() if isinstance(out, torch.Tensor) else out
