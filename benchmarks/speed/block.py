"""``python -m benchmarks block``: one Wan-14B block, ours beside its peers.

Our rows, the eager one, plain Inductor's and the hand fix share weights; their accuracy is against
the bf16 block in eager mode. diffusers' blocks have weights of their own and are held against
their own bf16 block in eager mode. "cosine" is of the output, "cosine of update" of what the block
adds to its input. A row is called three times right before each call that is timed, as a block of a
model comes after others like it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from torch import nn

from benchmarks.speed import ours, peers
from benchmarks.speed.accuracy import cosine
from benchmarks.speed.bars import (
    ACCURACY,
    COMPOSITION,
    EAGER,
    HAND_FIXED,
    INDUCTOR,
    OURS_4,
    OURS_8,
    OURS_16,
    OURS_16_WIDE,
    OURS_DYNAMIC,
    TORCHAO_ROW,
    TORCHAO_TENSOR,
)
from benchmarks.speed.command import Command
from benchmarks.speed.measure import Settings
from benchmarks.speed.profile import (
    ATTENTION,
    ELEMENTWISE,
    LINEARS,
    OPERANDS,
    PARTS,
    TEXT,
    by_part,
    summed,
)
from benchmarks.speed.profile import kernels as kernels_of
from benchmarks.speed.rows import OK, Group, Prepared, Row, Shared, Task
from benchmarks.speed.sizes import (
    PEAK_TBS,
    PEAK_TFLOPS,
    SIZES,
    SMOKE,
    Size,
    block_flops,
    elementwise_bytes,
    operand_bytes,
)
from wan_models import BlockInputs, block_inputs

_SEED = 0
_KERNELS_SHOWN = 25
Call = Callable[[], torch.Tensor]


class Inputs(NamedTuple):
    """A block's inputs, and what the bf16 block makes of them in eager mode."""

    block: BlockInputs
    wanted: torch.Tensor


def options(parser: argparse.ArgumentParser) -> None:
    """Of this command alone."""
    parser.add_argument("--fp8-recipe", metavar="NAME", help="of our FP8 rows")


def plan(settings: Settings, args: argparse.Namespace) -> list[Group]:
    """A group for each resolution."""
    sizes = SMOKE if settings.smoke else SIZES
    return [_group(sizes[name], settings, args) for name in settings.resolutions]


def _group(size: Size, settings: Settings, args: argparse.Namespace) -> Group:
    config, device = size.config, settings.device
    shared = Shared(lambda: _inputs(size, device))
    flops = sum(block_flops(size.tokens, config).values())
    tasks: list[Task] = []
    held: list[Shared[Any]] = [shared]

    def add(name: str, prepare: Callable[[Row], Prepared], peak: str, ours_: bool = False) -> None:
        limits = dict(ACCURACY["fp4 block" if name == OURS_4 else "block"]) if ours_ else {}
        row = Row(size.name, name, required=ours_, flops=flops, peak=peak, limits=limits)
        tasks.append(Task(row, lambda: prepare(row)))

    def same_weights(make: Callable[[], nn.Module], compile_: Callable[[Any], Any]) -> Callable:
        def prepare(row: Row) -> Prepared:
            block = compile_(make())
            inputs = shared()
            return _prepared(
                lambda: block(*inputs.block), inputs.block.x, inputs.wanted, settings
            )

        return prepare

    def plain() -> nn.Module:
        return ours.fresh_block(config, device, _SEED)

    def hand_fixed() -> nn.Module:
        return peers.hand_fixed(plain())

    def by_inductor(block: nn.Module) -> Any:
        return ours.inductor(block, settings)

    add(EAGER, same_weights(plain, lambda block: block), "bf16")
    add(INDUCTOR, same_weights(plain, by_inductor), "bf16")
    add(HAND_FIXED, same_weights(hand_fixed, by_inductor), "fp8")

    # One eager result for the four; dropped with the group.
    theirs = Shared(lambda: _diffusers_wanted(size, shared(), device))
    held.append(theirs)

    def diffusers(attend: peers.Attend, granularity: str | None) -> Callable:
        def prepare(row: Row) -> Prepared:
            if attend is peers.fa3_op:
                peers.fa3()
            block = peers.diffusers_block(config, attend, device, _SEED)
            if granularity is not None:
                peers.torchao_(block, granularity)
            inputs = peers.diffusers_inputs(shared().block)
            function = ours.inductor(block, settings)
            return _prepared(lambda: function(*inputs), inputs[0], theirs(), settings)

        return prepare

    add("diffusers, bf16, cuDNN", diffusers(peers.cudnn, None), "bf16")
    add(TORCHAO_ROW, diffusers(peers.cudnn, "row"), "fp8")
    add(TORCHAO_TENSOR, diffusers(peers.cudnn, "tensor"), "fp8")
    add(COMPOSITION, diffusers(peers.fa3_op, "row"), "fp8")

    def our_row(kind: str, attention: str, dynamic: bool = False) -> Callable:
        def prepare(row: Row) -> Prepared:
            mode = ours.mode(attention, config, device)
            recipe = ours.recipe(kind, args.fp8_recipe if kind == "FP8" else None)
            row.figures |= {"recipe": recipe, **ours.measured_attention(mode, size, device)}
            block, inputs = ours.block(config, recipe, mode, device, _SEED), shared()
            # Tracing with symbolic sizes takes three times as long; a smoke run of compile does it.
            function = ours.compiled(block, settings, dynamic=dynamic and not settings.smoke)
            prepared = _prepared(
                lambda: function(*inputs.block), inputs.block.x, inputs.wanted, settings
            )
            activation = prepared.figures

            def figures() -> dict[str, Any]:
                return {**activation(), **_profiled(prepared.call)}

            return prepared if dynamic else replace(prepared, figures=figures)

        return prepare

    add(OURS_16, our_row("FP8", "16-bit"), "fp8", ours_=True)
    add(OURS_16_WIDE, our_row("FP8", "16-bit, fp32 scores"), "fp8", ours_=True)
    add(OURS_8, our_row("FP8", "8-bit"), "fp8", ours_=True)
    add(OURS_4, our_row("FP4", "8-bit"), "fp8", ours_=True)
    add(OURS_DYNAMIC, our_row("FP8", "8-bit", dynamic=True), "fp8")
    tasks[-1].row.limits = dict(ACCURACY["block"])
    return Group(size.name, tasks, held)


def _inputs(size: Size, device: str) -> Inputs:
    inputs = block_inputs(
        size.config, size.grid, dtype=torch.bfloat16, device=device, seed=_SEED
    )
    block = ours.fresh_block(size.config, device, _SEED)
    return Inputs(inputs, block(*inputs))


def _diffusers_wanted(size: Size, inputs: Inputs, device: str) -> torch.Tensor:
    block = peers.diffusers_block(size.config, peers.cudnn, device, _SEED)
    return block(*peers.diffusers_inputs(inputs.block))


def _prepared(
    call: Call, x: torch.Tensor, wanted: torch.Tensor, settings: Settings
) -> Prepared:
    def accuracy() -> dict[str, float]:
        got = call()
        return {
            "cosine": cosine(got, wanted),
            "cosine of update": cosine(got.float() - x.float(), wanted.float() - x.float()),
        }

    return Prepared(call, accuracy, lambda: activation(call, settings.device))


def activation(call: Callable[[], Any], device: str) -> dict[str, float | str]:
    """What a call takes of memory beyond what lies there before it, in GiB, its result included."""
    if device != "cuda":
        return {}
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    del result
    return {"activation GiB": (peak - before) / 2**30}


def _profiled(call: Call) -> dict[str, Any]:
    launched = kernels_of(call)
    return {
        **{f"{part} ms": ms for part, ms in by_part(launched).items()},
        "kernels": [list(line) for line in summed(launched)],
    }


def floors(group: str, row: Row) -> dict[str, float]:
    """Milliseconds that each part takes at the peaks of :mod:`benchmarks.speed.sizes`."""
    size = SIZES[group]
    flops = block_flops(size.tokens, size.config)
    narrow = "FP8 attention" in row.name
    attention = PEAK_TFLOPS["fp8" if narrow else "bf16"]
    elementwise = elementwise_bytes(size.tokens, size.config, narrow_attention=narrow)
    operands = operand_bytes(size.tokens, size.config) if narrow else 0.0
    return {
        LINEARS: flops[LINEARS] / PEAK_TFLOPS["fp8"] / 1e9,
        ATTENTION: flops[ATTENTION] / attention / 1e9,
        TEXT: flops[TEXT] / attention / 1e9,
        OPERANDS: operands / PEAK_TBS / 1e9,
        ELEMENTWISE: elementwise / PEAK_TBS / 1e9,
    }


def finish(rows: list[Row]) -> str:
    """Time of our rows by part against the floor, and the kernels of each."""
    text = ""
    for row in rows:
        if row.status != OK or row.ms is None or "kernels" not in row.figures:
            continue
        floor = floors(row.group, row)
        lines = [
            (part, row.figures[f"{part} ms"], floor[part],
             row.figures[f"{part} ms"] / floor[part] if floor[part] else "")
            for part in PARTS
        ]
        busy = sum(row.figures[f"{part} ms"] for part in PARTS)
        row.figures["idle ms"] = max(0.0, row.ms - busy)
        lines.append(("all kernels; median of the row", busy, row.ms, ""))
        headers = (f"{row.name}: part", "ms", "at the peak, ms", "times the peak's")
        text += "\n" + tabulate(lines, headers, floatfmt=".3f") + "\n"
        shown = [(part, name[:90], count, ms) for part, name, count, ms in row.figures["kernels"]]
        text += tabulate(shown[:_KERNELS_SHOWN], ("part", "kernel", "launches", "ms"),
                         floatfmt=".3f") + "\n"
    return text


COMMAND = Command(
    "block", "one Wan-14B block beside its peers", plan, rounds=10, lead=3, options=options,
    columns=("activation GiB", "recipe", "attention", "prepare s"), finish=finish,
)
