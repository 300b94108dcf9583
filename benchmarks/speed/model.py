"""``python -m benchmarks model``: one forward of the whole 14B model, 40 blocks.

Weights are random, made on the GPU block by block from a seed and quantised as they are made, so
that no more than one block lies there in bf16. Every block is compiled in place; equal ones share
one compile. The reference is the bf16 model in eager mode, each block made again from its seed
when it is called. Its cosine is reported, not required: random weights and inputs are no images.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.speed import ours
from benchmarks.speed.accuracy import cosine, relative_l1
from benchmarks.speed.bars import INDUCTOR, OURS_4, OURS_8
from benchmarks.speed.command import Command
from benchmarks.speed.measure import Settings, progress
from benchmarks.speed.rows import Group, Prepared, Row, Shared, Task
from benchmarks.speed.sizes import SIZES, SMOKE, Size, model_flops
from wan_models import ModelInputs, WanModel, model_inputs

_SEED = 0


def options(parser: argparse.ArgumentParser) -> None:
    """Of this command alone."""
    parser.add_argument("--fp8-recipe", metavar="NAME", help="of the FP8 rows")
    parser.add_argument("--references", nargs="*", choices=("480p", "720p"), default=["480p"],
                        help="resolutions at which the output is held against bf16")
    parser.add_argument("--static", action="store_true",
                        help="compile for each resolution by itself, not one graph for all")


def plan(settings: Settings, args: argparse.Namespace) -> list[Group]:
    """A group for each resolution; the models serve all of them."""
    sizes = SMOKE if settings.smoke else SIZES
    config, device = sizes["480p"].config, settings.device

    def made(kind: str | None, attention: str) -> Shared[tuple[WanModel, dict[str, Any]]]:
        def make() -> tuple[WanModel, dict[str, Any]]:
            mode = ours.mode(attention, config, device)
            given = args.fp8_recipe if kind == "FP8" else None
            recipe = None if kind is None else ours.recipe(kind, given)
            began = time.perf_counter()
            model = ours.model(config, recipe, mode, device, _SEED)
            progress(settings, f"model {recipe or 'bf16'}: {time.perf_counter() - began:.0f} s")
            facts = {
                "recipe": recipe or "", "attention mode": mode,
                "weights GB": ours.stored_bytes(model) / 1e9,
            }
            return model, facts

        return Shared(make)

    models = {
        OURS_8: made("FP8", "8-bit"), OURS_4: made("FP4", "8-bit"),
        INDUCTOR: made(None, "16-bit"),
    }
    return [
        _group(sizes[name], models, settings, args, last=name == settings.resolutions[-1])
        for name in settings.resolutions
    ]


def _group(
    size: Size, models: dict[str, Shared[Any]], settings: Settings, args: argparse.Namespace, *,
    last: bool,
) -> Group:
    device = settings.device
    inputs = Shared(
        lambda: model_inputs(
            size.config, size.grid, dtype=torch.bfloat16, device=device, seed=_SEED
        )
    )
    wanted = Shared(
        lambda: ours.reference_model(size.config, device, _SEED)(*inputs()[:3]).float()
    )
    tasks = []
    for name, model in models.items():
        ours_ = name != INDUCTOR
        if not ours_ and size.name != "480p":
            continue  # 11 s a forward, for what the block's table shows as well
        row = Row(
            size.name, name, required=ours_,
            flops=model_flops(size.tokens, size.config), peak="fp8" if ours_ else "bf16",
        )
        referred = wanted if size.name in args.references else None
        tasks.append(
            Task(row, _prepare(row, model, size, inputs, referred, settings, args, ours_=ours_))
        )
    # Ours serve the next resolution too; 28 GB in bf16 do not.
    return Group(
        size.name, tasks, [inputs, wanted, *(models.values() if last else [models[INDUCTOR]])]
    )


def _prepare(
    row: Row, made: Shared[tuple[WanModel, dict[str, Any]]], size: Size,
    inputs: Shared[ModelInputs], wanted: Shared[torch.Tensor] | None, settings: Settings,
    args: argparse.Namespace, *, ours_: bool,
) -> Callable[[], Prepared]:
    def prepare() -> Prepared:
        model, facts = made()
        mode = facts["attention mode"]
        row.figures |= facts | ours.measured_attention(mode, size, settings.device)
        given = inputs()[:3]
        if ours_:
            # Tracing with symbolic sizes takes twice as long; a smoke run of compile does it.
            dynamic = not (args.static or settings.smoke)
            ours.compile_blocks(model, settings, dynamic=dynamic, mode=None)
        else:
            backend = "eager" if settings.smoke else "inductor"
            model.compile_blocks(backend=backend, fullgraph=True, dynamic=False)
        began = time.perf_counter()
        result = model(*given)
        if settings.device == "cuda":
            torch.cuda.synchronize()
        row.figures["first forward s"] = time.perf_counter() - began

        def accuracy() -> dict[str, float]:
            if wanted is None:
                return {}
            exact = wanted()
            return {"cosine": cosine(result, exact), "relative L1": relative_l1(result, exact)}

        return Prepared(lambda: model(*given), accuracy, called=True)

    return prepare


COMMAND = Command(
    "model", "one forward of the whole 14B model", plan, rounds=3, options=options,
    columns=(
        "weights GB", "recipe", "attention", "first forward s", "prepare s",
    ),
)
