"""``python -m benchmarks clean``: what contig_safe costs where nothing is wrong.

A quantised Wan block without faults is compiled by plain Inductor and by contig_safe. Required:
no fix, the same kernels and allocations in the generated code, values equal bit by bit, and on a
GPU a time within noise (ratio at most 1.01). Values are compared between compiles in Inductor's
deterministic setting: otherwise it chooses the shape of each reduction by timing it, and two plain
compiles of one block may differ in the last bit.
"""

from __future__ import annotations

import argparse
import re
import statistics
import tempfile
from collections.abc import Callable

import torch
from tabulate import tabulate
from torch._inductor.utils import fresh_cache, run_and_get_code

import contig_pass
from benchmarks.machine import write_json
from benchmarks.wan import quantised_block

RATIO = 1.01
_COUNTED = {
    "allocations": r"= empty_strided_\w+\(",
    "fused kernels": r"^\s+(?:triton_\w+\.run|cpp_fused_\w+)\(",
    "extern kernels": r"extern_kernels\.\w+\(|torch\.ops\.\w+\.\w+\.\w+\(",
    "alignment checks": r"copy_if_misaligned\(",
}
#: Not required to be equal: Inductor checks a GPU's inputs only, contig_safe those of a contract.
_FREE = ("alignment checks",)


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser("clean", help="cost of contig_safe on a block without faults")
    parser.add_argument("--repeats", type=int, default=30, help="timed runs of each (GPU)")
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    parser.set_defaults(run=run)


def count_code(code: str) -> dict[str, int]:
    """Allocations, kernels and checks in the body of a generated module's ``call``."""
    body = code.split("def call(", 1)[-1].split("\ndef get_args", 1)[0]
    return {
        name: len(re.findall(pattern, body, re.MULTILINE)) for name, pattern in _COUNTED.items()
    }


def compiled(
    backend: str | Callable[..., object],
    block: torch.nn.Module,
    inputs: tuple,
    **settings: object,
) -> tuple[Callable[..., torch.Tensor], torch.Tensor, dict[str, int]]:
    """The block compiled from scratch, its output and the counts of its code."""
    torch._dynamo.reset()
    with (
        tempfile.TemporaryDirectory() as cache,
        fresh_cache(dir=cache),
        torch._inductor.config.patch(force_disable_caches=True, **settings),
    ):
        function = torch.compile(block, backend=backend, fullgraph=True)
        output, codes = run_and_get_code(function, *inputs)
    return function, output, count_code("\n".join(codes))


def times(
    functions: dict[str, Callable[..., torch.Tensor]], inputs: tuple, repeats: int
) -> dict[str, float]:
    """Median milliseconds of each function, run in turn after a warm-up."""
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        for _ in range(3):
            function(*inputs)
    for _ in range(repeats):
        for name, function in functions.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function(*inputs)
            end.record()
            end.synchronize()
            samples[name].append(start.elapsed_time(end))
    return {name: statistics.median(values) for name, values in samples.items()}


def run(args: argparse.Namespace) -> int:
    """Print the table; 1 if a requirement is missed."""
    on_gpu = torch.cuda.is_available()
    config, grid, device = ("t2v-14b", "480p", "cuda") if on_gpu else ("tiny", "tiny", "cpu")
    block, inputs = quantised_block(config, grid, device)
    backends = {"inductor": "inductor", "contig_safe": contig_pass.contig_safe}
    contig_pass.forget_reports()
    with torch.no_grad():
        plain, safe = (
            compiled(backend, block, inputs, deterministic=True)[1] for backend in backends.values()
        )
        equal = torch.equal(plain, safe)
        functions, counts = {}, {}
        for name, backend in backends.items():
            functions[name], _, counts[name] = compiled(backend, block, inputs)
        totals = contig_pass.last_reports()[-1].totals
        rows = [
            (what, counts["inductor"][what], counts["contig_safe"][what]) for what in _COUNTED
        ]
        passed = totals.fixes == 0 and equal and all(
            theirs == ours for what, theirs, ours in rows if what not in _FREE
        )
        ratio = None
        if on_gpu:
            medians = times(functions, inputs, args.repeats)
            rows.append(("median ms", medians["inductor"], medians["contig_safe"]))
            ratio = medians["contig_safe"] / medians["inductor"]
            passed &= ratio <= RATIO
    print(tabulate(rows, (f"{config} block, {grid}", "inductor", "contig_safe"), floatfmt=".3f"))
    if args.json:
        content = {
            "block": config,
            "grid": grid,
            "rows": {what: {"inductor": plain, "contig_safe": ours} for what, plain, ours in rows},
            "fixes": totals.fixes,
            "uses": totals.uses,
            "equal": equal,
            "ratio": ratio,
        }
        write_json(args.json, "clean", content)
    timed = "" if ratio is None else f", time ratio {ratio:.4f} (at most {RATIO})"
    print(
        f"clean: {totals.fixes} fixes in {totals.uses} uses, values "
        f"{'equal' if equal else 'DIFFERENT'}{timed}: {'ok' if passed else 'MISSED'}"
    )
    return 0 if passed else 1
