"""``python -m benchmarks compile``: what compiling the 14B model costs, and when it is repeated.

Every row is a process of its own. "cold" has fresh cache directories, Triton's included, "warm"
the ones that the cold process left. Compile time is that of the first forward less a later one:
importing torch and making weights are not in it. The process of the cold start then runs a second
resolution, and with a LoRA two strengths of it, counting the graphs that Dynamo compiles.
Modes of ``torch.compile`` are compared on one block, each with fresh caches.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.speed.bars import COLD, SECOND_RESOLUTION, STRENGTH, WARM
from benchmarks.speed.command import Command
from benchmarks.speed.measure import Settings
from benchmarks.speed.rows import Group, Prepared, Row, Shared, Task, Unavailable

_ROOT = Path(__file__).parents[2]
_WORKER = "benchmarks.speed.worker"
_MODES = {
    "default": None,
    "max-autotune-no-cudagraphs": "max-autotune-no-cudagraphs",
    "reduce-overhead (CUDA graphs)": "reduce-overhead",
}
MODEL = "14B model"
BLOCK = "one block, 480p, by mode"


def options(parser: argparse.ArgumentParser) -> None:
    """Of this command alone."""
    parser.add_argument("--fp8-recipe", metavar="NAME", help="of all rows")


def plan(settings: Settings, args: argparse.Namespace) -> list[Group]:
    """The model's group, and the block's by mode."""
    caches = Shared(tempfile.TemporaryDirectory)

    def spawn(*given: str, cache: str | None = None) -> dict[str, Any]:
        recipe = ["--recipe", args.fp8_recipe] if args.fp8_recipe else []
        smoke = ["--smoke"] if settings.smoke else []
        return run_worker([*given, *recipe, *smoke], cache, _seconds_left(settings))

    cold = Shared(lambda: spawn("model", "--steps", cache=caches().name))

    def warm() -> dict[str, Any]:
        cold()
        return spawn("model", cache=caches().name)

    def task(
        title: str, name: str, figures: Callable[[Row], dict[str, Any]], *, required: bool = True
    ) -> Task:
        row = Row(title, name, required=required)
        return Task(row, lambda: Prepared(_nothing, None, lambda: figures(row), timed=False))

    def second(row: Row) -> dict[str, Any]:
        got = cold()
        return {
            "recompiles": got["second resolution recompiles"],
            "first s": got["second resolution first s"],
        }

    def strength(row: Row) -> dict[str, Any]:
        got = cold()
        if not got["LoRA strength changed the output"]:
            raise RuntimeError("the strength of the LoRA changed nothing")
        return {
            "recompiles": got["LoRA strength recompiles"],
            "graphs": got["LoRA attached graphs"], "first s": got["LoRA attached first s"],
        }

    def by_mode(mode: str | None) -> Callable[[Row], dict[str, Any]]:
        def figures(row: Row) -> dict[str, Any]:
            if mode and settings.smoke:
                raise Unavailable("a smoke run compiles without Inductor, whose mode this is")
            got = spawn("block", *(["--mode", mode] if mode else []))
            row.ms = row.fastest = row.slowest = got.pop("ms")
            return got

        return figures

    model = [
        task(MODEL, COLD, lambda row: cold()),
        task(MODEL, WARM, lambda row: warm()),
        task(MODEL, SECOND_RESOLUTION, second),
        task(MODEL, STRENGTH, strength),
    ]
    modes = [
        task(BLOCK, name, by_mode(mode), required=False) for name, mode in _MODES.items()
    ]
    return [Group(MODEL, model, [cold, caches]), Group(BLOCK, modes)]


def _nothing() -> None:
    """These rows are measured by their processes."""


def _seconds_left(settings: Settings) -> float:
    return max(10.0, min(settings.row_limit, settings.budget - settings.spent()))


def run_worker(given: Sequence[str], cache: str | None, seconds: float) -> dict[str, Any]:
    """A process of :mod:`benchmarks.speed.worker`, and the figures that it printed.

    Args:
        given: its arguments.
        cache: directory of its caches; None for fresh ones, deleted afterwards.
        seconds: after which it is ended.

    Raises:
        RuntimeError: it failed; the message is its last line.
        TimeoutError: it was ended.
    """
    with tempfile.TemporaryDirectory() as fresh:
        folder = cache or fresh
        environment = {
            **os.environ, "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
            "TRITON_CACHE_DIR": f"{folder}/triton",
        }
        environment["PYTHONPATH"] = f"{_ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        command = [sys.executable, "-m", _WORKER, *given]
        try:
            ended = subprocess.run(
                command, capture_output=True, text=True, check=False, cwd=_ROOT,
                env=environment, timeout=seconds,
            )
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"ended after {seconds:.0f} s: {' '.join(given)}") from None
    if ended.returncode:
        lines = [line for line in ended.stderr.splitlines() if line.strip()] or ["no message"]
        raise RuntimeError(f"exit code {ended.returncode}: {lines[-1]}")
    return json.loads(ended.stdout.splitlines()[-1])


COMMAND = Command(
    "compile", "compile time of the 14B model, cold and warm, and recompiles", plan, rounds=1,
    options=options,
    columns=(
        "compile s", "first s", "later s", "recompiles", "graphs", "weights s", "recipe",
        "attention",
    ),
)
