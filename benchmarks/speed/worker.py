"""One process of ``python -m benchmarks compile``: compiles, counts, prints one line of JSON.

    python -m benchmarks.speed.worker model|block [--smoke] [--mode M] [--recipe R] [--steps]

Caches are wherever ``TORCHINDUCTOR_CACHE_DIR`` and ``TRITON_CACHE_DIR`` say; the command makes
them fresh or hands on the ones of an earlier process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._dynamo.utils import counters

from benchmarks.speed import ours
from benchmarks.speed.clock import interleaved
from benchmarks.speed.measure import Settings
from benchmarks.speed.sizes import SIZES, SMOKE, one_layer
from wan_models import block_inputs, model_inputs
from wan_models.quant import attach_lora, set_lora_strength

_RANK = 16
_ROUNDS = 3


def main(given: Sequence[str] | None = None) -> int:
    """Run, and print the figures as the last line.

    Args:
        given: arguments; None for those of the process.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("model", "block"))
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--mode", help="of torch.compile")
    parser.add_argument("--kind", choices=("FP8", "FP4"), default="FP8")
    parser.add_argument("--recipe")
    parser.add_argument("--steps", action="store_true",
                        help="then a second resolution, a LoRA, and another strength of it")
    args = parser.parse_args(given)
    device = "cpu" if args.smoke else "cuda"
    settings = Settings(device=device, smoke=args.smoke)
    if args.smoke:
        torch.set_num_threads(1)
    with torch.no_grad():
        figures = (_model if args.what == "model" else _block)(args, settings)
    print(json.dumps(figures))
    return 0


def graphs() -> int:
    """Graphs that Dynamo has compiled in this process."""
    return int(counters["stats"]["unique_graphs"])


def _timed(call: Callable[[], Any], device: str) -> float:
    began = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _compile_seconds(call: Callable[[], Any], device: str) -> dict[str, float]:
    """Seconds that the first call takes longer than later ones."""
    first = _timed(call, device)
    later = statistics.median(_timed(call, device) for _ in range(2))
    return {"compile s": first - later, "first s": first, "later s": later, "graphs": graphs()}


def _model(args: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    sizes, device = SMOKE if args.smoke else SIZES, settings.device
    config = one_layer(sizes["480p"]) if args.smoke else sizes["480p"].config
    recipe = ours.recipe(args.kind, args.recipe)
    attention = ours.mode("8-bit", config, device)
    began = time.perf_counter()
    model = ours.model(config, recipe, attention, device)
    figures: dict[str, Any] = {
        "recipe": recipe, "weights s": time.perf_counter() - began,
        "weights GB": ours.stored_bytes(model) / 1e9,
    }
    figures |= ours.measured_attention(attention, sizes["480p"], device)
    given = {
        name: model_inputs(config, size.grid, dtype=torch.bfloat16, device=device)[:3]
        for name, size in sizes.items()
    }
    ours.compile_blocks(model, settings, dynamic=True, mode=args.mode)
    figures |= _compile_seconds(lambda: model(*given["480p"]), device)
    if args.steps:
        figures |= _steps(model, given, device)
    return figures


def _steps(model: Any, given: dict[str, Any], device: str) -> dict[str, Any]:
    """Graphs that a second resolution and another LoRA strength add."""
    before = graphs()
    second = _timed(lambda: model(*given["720p"]), device)
    after = graphs()
    for block in model.blocks:
        linear = block.self_attn.o
        width_in, width_out = linear.in_features, linear.out_features
        down = torch.randn(_RANK, width_in, device=device) / width_in**0.5
        up = torch.randn(width_out, _RANK, device=device) / _RANK
        attach_lora(linear, down, up)
    attached = _timed(lambda: model(*given["480p"]), device)
    with_lora = graphs()
    results = []
    for strength in (0.25, 0.75):
        set_lora_strength(model, strength)
        results.append(model(*given["480p"]))
    return {
        "second resolution recompiles": after - before,
        "second resolution first s": second,
        "LoRA attached graphs": with_lora - after,
        "LoRA attached first s": attached,
        "LoRA strength recompiles": graphs() - with_lora,
        "LoRA strength changed the output": not torch.equal(*results),
    }


def _block(args: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    size, device = (SMOKE if args.smoke else SIZES)["480p"], settings.device
    recipe = ours.recipe(args.kind, args.recipe)
    attention = ours.mode("8-bit", size.config, device)
    block = ours.block(size.config, recipe, attention, device)
    inputs = block_inputs(size.config, size.grid, dtype=torch.bfloat16, device=device)
    function = ours.compiled(block, settings, mode=args.mode)

    def call() -> Any:
        if args.mode == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        return function(*inputs)

    figures: dict[str, Any] = {
        "recipe": recipe, **ours.measured_attention(attention, size, device),
    }
    figures |= _compile_seconds(call, device)
    samples = interleaved([call], _ROUNDS * 3, device, time.perf_counter() + 60)[0]
    if samples.error is not None:
        raise samples.error
    return figures | {"ms": samples.median}


if __name__ == "__main__":
    sys.exit(main())
