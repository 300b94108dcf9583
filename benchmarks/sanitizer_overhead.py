"""``python -m benchmarks sanitizer``: what the sanitizer costs, and what it finds.

Small ops, where the price of standing between Python and torch shows, and a Wan block, where it
should not: each is timed plain and under ``contig_pass.sanitize()`` in turn, so that other work on
the machine falls on both alike. The price of small ops is reported beside that of a mode that does
nothing, which no sanitizer of this kind can be under. Required: the block takes at most 1.05 of
its plain time.

With ``--faults`` every program of the fault table runs under the sanitizer instead, on the CPU with
emulated kernels. Required: each that is not right in eager mode has a finding, and with
``mode="fix"`` each that any layout makes legal is right.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from tabulate import tabulate
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.faults.sanitized import Verdict, verdicts
from benchmarks.machine import write_json
from benchmarks.wan import quantised_block
from contig_pass.sanitizer import sanitize

BLOCK_RATIO = 1.05
AIM = 2.0
_WARM_UP = 20


class _Nothing(TorchDispatchMode):
    """Looks at every op and does nothing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class _NothingAbove(TorchFunctionMode):
    """Looks at every function and does nothing."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser("sanitizer", help="cost of the sanitizer, or what it finds")
    parser.add_argument("--faults", action="store_true", help="run the fault table instead")
    parser.add_argument("--every", type=int, default=1, help="with --faults: each n-th program")
    parser.add_argument("--repeats", type=int, default=2_000, help="timed calls of a small op")
    parser.add_argument("--config", default="t2v-14b", help="of the block on a GPU")
    parser.add_argument("--grid", default="480p", help="tokens of the block on a GPU")
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the tables; 1 if a requirement is missed."""
    return _faults(args) if args.faults else _overhead(args)


# -- overhead ------------------------------------------------------------------------------------


def small_ops(device: str) -> dict[str, Callable[[], object]]:
    """Calls whose kernels take next to no time."""
    x = torch.randn(64, 64, device=device)
    f8 = torch.randn(64, 64, device=device).to(torch.float8_e4m3fn)
    one, q = torch.ones((), device=device), torch.randn(1, 2, 64, 64, device=device).bfloat16()
    layer = torch.nn.Linear(64, 64, device=device)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    return {
        "add": lambda: x + x,
        "slice": lambda: x[1:],
        "view chain": lambda: x.view(8, 8, 64).transpose(0, 1).reshape(64, 64),
        "linear": lambda: layer(x),
        "attention": lambda: sdpa(q, q, q),
        "_scaled_mm": lambda: torch._scaled_mm(f8, f8.t(), one, one, out_dtype=torch.bfloat16),
    }


def time_modes(
    call: Callable[[], object],
    modes: dict[str, Callable[[], AbstractContextManager]],
    device: str,
    repeats: int,
    batch: int = 10,
) -> dict[str, float]:
    """Median microseconds of ``call`` under each mode, in turn, in batches.

    Args:
        call: what to time.
        modes: name to a maker of a context manager.
        device: waited for after each batch if it is a GPU.
        repeats: timed calls for each mode.
        batch: calls between two looks at the clock.
    """
    entered = {name: make() for name, make in modes.items()}
    samples: dict[str, list[float]] = {name: [] for name in modes}
    for step in range(_WARM_UP + max(1, repeats // batch)):
        for name, mode in entered.items():
            with mode:
                started = time.perf_counter_ns()
                for _ in range(batch):
                    call()
                if device == "cuda":
                    torch.cuda.synchronize()
                spent = time.perf_counter_ns() - started
            if step >= _WARM_UP:
                samples[name].append(spent / batch / 1_000)
    return {name: statistics.median(taken) for name, taken in samples.items()}


class _NothingAtAll(AbstractContextManager):
    """Both modes that do nothing; may be entered again and again."""

    def __enter__(self) -> None:
        self._modes = (_Nothing(), _NothingAbove())
        for mode in self._modes:
            mode.__enter__()

    def __exit__(self, *raised: object) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*raised)


def _overhead(args: argparse.Namespace) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    modes = {"plain": nullcontext, "nothing": _NothingAtAll, "sanitize": sanitize}
    rows = []
    with torch.no_grad():
        for name, call in small_ops(device).items():
            took = time_modes(call, modes, device, args.repeats)
            ratio = took["sanitize"] / took["plain"]
            met = "met" if ratio < AIM else "not met"
            rows.append((name, *took.values(), ratio, took["nothing"] / took["plain"], met))
        config, grid = (args.config, args.grid) if device == "cuda" else ("tiny", "tiny")
        block, inputs = quantised_block(config, grid, device)
        only = {"plain": nullcontext, "sanitize": sanitize}
        repeats = 30 if device == "cuda" else 3
        took = time_modes(lambda: block(*inputs), only, device, repeats, batch=1)
    ratio = took["sanitize"] / took["plain"]
    ok = ratio <= BLOCK_RATIO
    headers = (
        f"small op on {device}", "plain, µs", "empty modes, µs", "sanitize, µs", "ratio",
        "ratio of empty modes", f"aim: < {AIM:.0f}",
    )
    print(tabulate(rows, headers, floatfmt=".2f"))
    block_row = (f"{config} {grid}", took["plain"] / 1e3, took["sanitize"] / 1e3, ratio)
    verdict = "ok" if ok else "MISSED"
    columns = ("FP8 block", "plain, ms", "sanitize, ms", "ratio")
    print(tabulate([block_row], columns, floatfmt=".3f"))
    if args.json:
        columns = ["op", "plain", "empty modes", "sanitize", "ratio", "empty ratio", "aim"]
        content = {"device": device, "columns": columns, "rows": rows, "block": block_row}
        write_json(args.json, "sanitizer", {**content, "verdict": verdict})
    print(f"sanitizer on {device}: block ratio {ratio:.3f} (<= {BLOCK_RATIO}): {verdict}")
    return 0 if ok else 1


# -- faults --------------------------------------------------------------------------------------


def _faults(args: argparse.Namespace) -> int:
    found = list(verdicts(args.every))
    rows = [(v.group, v.program, v.eager, ", ".join(v.operands), v.fixed) for v in found]
    headers = ("group", "program", "eager", "operands named", "mode fix")
    print(tabulate(rows, headers))
    failed = list(_failed(found))
    for verdict in failed:
        print(f"FAILED {verdict.group}: {verdict.program}: {verdict.problem()}")
    if args.json:
        rows_of = [dict(zip(headers, row, strict=True)) for row in rows]
        write_json(args.json, "sanitizer-faults", {"results": rows_of})
    counted = Counter((v.eager == "right", bool(v.operands)) for v in found)
    print(
        f"sanitizer: {counted[False, True]} of {counted[False, True] + counted[False, False]} "
        f"faulty programs found, {counted[True, True]} right ones told as well, "
        f"{len(failed)} failed"
    )
    return 1 if failed else 0


def _failed(found: list[Verdict]) -> Iterator[Verdict]:
    return (verdict for verdict in found if verdict.problem())
