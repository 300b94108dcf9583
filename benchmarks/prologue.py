"""``python -m benchmarks prologue``: what looking at a graph's inputs costs on every call.

A graph that does nothing is called with 1,000 aligned tensors, plain and behind the check that
realigns inputs. Both are timed call by call in turn, so that other work on the machine falls on
both alike. Required: the check takes at most 100 µs, inputs on the CPU or on a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from tabulate import tabulate

from benchmarks.machine import write_json
from contig_pass.inputs import realigning

INPUTS = 1_000
MICROSECONDS = 100.0
_WARM_UP = 200

Graph = Callable[[list[Any]], Any]


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser("prologue", help="cost of checking inputs on every call")
    parser.add_argument("--repeats", type=int, default=3_000, help="timed calls (median)")
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    parser.set_defaults(run=run)


def nothing(inputs: list[Any]) -> list[Any]:
    """The graph."""
    return inputs


def time_call(device: str, count: int, repeats: int) -> tuple[float, float]:
    """Median microseconds of the plain call and of the checked one.

    Args:
        device: where the inputs lie.
        count: of the inputs, all aligned.
        repeats: timed calls of each.
    """
    inputs: list[Any] = [torch.zeros(16, device=device) for _ in range(count)]
    checked = realigning(nothing, range(count))
    if checked(inputs) is not inputs:
        raise AssertionError("an aligned input was taken for a misaligned one")
    samples: dict[Graph, list[int]] = {nothing: [], checked: []}
    for step in range(_WARM_UP + repeats):
        for graph, taken in samples.items():
            started = time.perf_counter_ns()
            graph(inputs)
            spent = time.perf_counter_ns() - started
            if step >= _WARM_UP:
                taken.append(spent)
    plain, ours = (statistics.median(taken) / 1_000 for taken in samples.values())
    return plain, ours


def run(args: argparse.Namespace) -> int:
    """Print the table; 1 if a requirement is missed."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    rows = []
    for device in devices:
        plain, ours = time_call(device, INPUTS, args.repeats)
        ok = ours - plain <= MICROSECONDS
        rows.append((device, INPUTS, plain, ours, ours - plain, "ok" if ok else "MISSED"))
    headers = (
        "inputs on", "inputs", "plain call, µs", "checked call, µs", "check, µs",
        f"<= {MICROSECONDS:.0f} µs",
    )
    print(tabulate(rows, headers, floatfmt=".2f"))
    if args.json:
        columns = [
            "device", "inputs", "plain microseconds", "checked microseconds",
            "check microseconds", "verdict",
        ]
        content = {"columns": columns, "rows": rows, "repeats": args.repeats}
        write_json(args.json, "prologue", content)
    passed = all(row[-1] == "ok" for row in rows)
    checks = ", ".join(f"{row[0]} {row[4]:.1f} µs" for row in rows)
    print(f"prologue: {checks} for {INPUTS:,} inputs: {'ok' if passed else 'MISSED'}")
    return 0 if passed else 1
