"""``python -m benchmarks memory``: bytes of the 14B model's weights, and a block's activations.

Weights are parameters and buffers, each counted once, in GB = 10^9 bytes. With ``--meta`` they are
those of a model on the meta device, which needs no GPU; on a GPU the model is made there and what
the allocator holds stands beside. Activations are the peak of a compiled call less what lay there
before it, in GiB, the result included.
"""

from __future__ import annotations

import argparse
import gc
from typing import Any

import torch

from benchmarks.speed import ours
from benchmarks.speed.bars import OURS_4, OURS_8, OURS_16, WEIGHTS_FP4, WEIGHTS_FP8
from benchmarks.speed.block import activation
from benchmarks.speed.command import Command
from benchmarks.speed.measure import Settings
from benchmarks.speed.rows import Group, Prepared, Row, Task
from benchmarks.speed.sizes import SIZES, SMOKE, Size
from wan_models import block_inputs, zoo

MODEL = "14B model"


def options(parser: argparse.ArgumentParser) -> None:
    """Of this command alone."""
    parser.add_argument("--meta", action="store_true", help="only weights, without a GPU")
    parser.add_argument("--fp8-recipe", metavar="NAME", help="of the FP8 rows")


def plan(settings: Settings, args: argparse.Namespace) -> list[Group]:
    """The weights, then the activations by resolution."""
    weights = []
    for name, kind in ((WEIGHTS_FP8, "FP8"), (WEIGHTS_FP4, "FP4"), ("weights, bf16", None)):
        row = Row(MODEL, name, required=kind is not None)
        weights.append(Task(row, _weights(kind, settings, args)))
    groups = [Group(MODEL, weights)]
    if not args.meta:
        sizes = SMOKE if settings.smoke else SIZES
        groups += [_activations(sizes[name], settings, args) for name in settings.resolutions]
    return groups


def _weights(kind: str | None, settings: Settings, args: argparse.Namespace) -> Any:
    def prepare() -> Prepared:
        recipe = None if kind is None else ours.recipe(kind, _given(kind, args))

        def figures() -> dict[str, float | str]:
            with torch.device("meta"):
                model = zoo.build(
                    "t2v-14b", "tiny" if settings.smoke else "full", quantization=recipe
                )
            found: dict[str, float | str] = {
                "GB": ours.stored_bytes(model) / 1e9, "recipe": recipe or "bf16",
            }
            if settings.device == "cuda" and kind is not None and not args.meta:
                found["allocated GB"] = _allocated(recipe)
            return found

        return Prepared(_nothing, None, figures, timed=False)

    return prepare


def _allocated(recipe: str) -> float:
    """What the allocator holds for a model that was made on the GPU, in GB."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model = ours.model(SIZES["480p"].config, recipe, "sdpa", "cuda")
    held = torch.cuda.memory_allocated() - before
    del model
    gc.collect()
    torch.cuda.empty_cache()
    return held / 1e9


def _activations(size: Size, settings: Settings, args: argparse.Namespace) -> Group:
    def task(name: str, kind: str, attention: str) -> Task:
        row = Row(size.name, name, required=True)

        def prepare() -> Prepared:
            mode = ours.mode(attention, size.config, settings.device)
            recipe = ours.recipe(kind, _given(kind, args))
            chosen = ours.measured_attention(mode, size, settings.device)
            row.figures |= {"recipe": recipe, **chosen}
            block = ours.block(size.config, recipe, mode, settings.device)
            inputs = block_inputs(
                size.config, size.grid, dtype=torch.bfloat16, device=settings.device
            )
            function = ours.compiled(block, settings)
            return Prepared(
                lambda: function(*inputs), None,
                lambda: activation(lambda: function(*inputs), settings.device),
            )

        return Task(row, prepare)

    return Group(size.name, [
        task(OURS_16, "FP8", "16-bit"), task(OURS_8, "FP8", "8-bit"), task(OURS_4, "FP4", "8-bit"),
    ])


def _given(kind: str, args: argparse.Namespace) -> str | None:
    return args.fp8_recipe if kind == "FP8" else None


def _nothing() -> None:
    """Rows of weights are not timed."""


COMMAND = Command(
    "memory", "weights of the 14B model and activations of a block", plan, rounds=3,
    options=options, without_gpu=lambda args: args.meta,
    columns=("GB", "allocated GB", "activation GiB", "recipe", "attention"),
)
