"""``python -m benchmarks coverage``: every attention class, variant and quantisation, one row each.

Each row compiles a class, a block or a model with ``fullgraph=True`` under contig_safe and calls it
with two sets of inputs. Required: no graph break, as many graphs as there are kinds of blocks, the
values of eager mode, no operand at the kernel that a Hopper GPU refuses, and, in the controls, that
the pass finds the planted fault. Beside it stands what the pass did (uses checked, fixes, their
bytes) and what fixing by hand would have done: its ``.contiguous()`` calls are made in eager mode
(:mod:`benchmarks.coverage.hand_fix`), and those that return the memory they are given do nothing.

It runs on the CPU, which the contracts judge as a rehearsal for an H100; ``torch._scaled_mm`` is
computed as a float product of what it receives, since the CPU's own takes minutes.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

import torch
from torch._inductor.utils import fresh_cache

from benchmarks.coverage.cases import Entry, catalogue
from benchmarks.coverage.measure import AOT_EAGER, INDUCTOR, TOLERANCE, Row, measure
from benchmarks.coverage.plan import full_rows, quick_rows
from benchmarks.coverage.table import table
from benchmarks.machine import write_json

_NOTES = [
    "hand_calls: .contiguous() calls of the hand fix, one behind each flatten(2) that merges heads "
    "and two more in HuMo's attention. Its list names them for five classes; for the SingleStream "
    "classes it lists no calls, and the same rule is applied.",
    "hand_no_ops: the calls that returned the memory they were given, measured in eager mode.",
    "difference: largest difference to eager mode as a part of the largest value.",
    "bad_operands, bad_in_eager: operands that reached _scaled_mm in a place or order that a "
    "Hopper GPU refuses or misreads, in compiled code and in eager mode.",
]


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser("coverage", help="every class, variant and quantisation")
    parser.add_argument("--quick", action="store_true", help="fewer recipes, mostly no Inductor")
    parser.add_argument(
        "--inner", choices=(INDUCTOR, AOT_EAGER), help="what compiles every row behind the pass"
    )
    parser.add_argument("--only", metavar="TEXT", help="only rows whose name contains this")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one row")
    parser.add_argument("--json", metavar="FILE", help="write every row there")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the table; 1 if a row fails."""
    groups = list(chosen(catalogue(), quick=args.quick, inner=args.inner, only=args.only))
    if not groups:
        print(f"coverage: no row's name contains {args.only!r}")
        return 1
    started = time.perf_counter()
    rows = run_all(groups, args.jobs, args.timeout)
    print(table(rows))
    failed = [row for row in rows if not row.ok]
    for row in failed:
        print(f"FAILED {row.name}: {row.failure()}")
    summary = summarise(rows, time.perf_counter() - started)
    if args.json:
        write_json(args.json, "coverage", content(rows, summary))
    print(summary)
    return 1 if failed else 0


def chosen(
    entries: Sequence[Entry], *, quick: bool, inner: str | None, only: str | None
) -> Iterator[tuple[Entry, list[Row]]]:
    """The entries of a run, each with its rows; ``inner`` stands for what would compile them."""
    for entry in entries:
        rows = (quick_rows if quick else full_rows)(entry)
        rows = [replace(row, inner=inner or row.inner) for row in rows]
        rows = [row for row in rows if only is None or only in row.name]
        if rows:
            yield entry, rows


def summarise(rows: Sequence[Row], seconds: float) -> str:
    """The last line."""
    calls, no_ops = (sum(getattr(row, n) for row in rows) for n in ("hand_calls", "hand_no_ops"))
    return (
        f"coverage: {sum(row.ok for row in rows)} of {len(rows)} rows ok, "
        f"{sum(row.uses for row in rows)} uses checked, {sum(row.fixes for row in rows)} fixes, "
        f"{no_ops} of {calls} calls of the hand fix do nothing, {seconds:.0f} s"
    )


def content(rows: Sequence[Row], summary: str) -> dict[str, Any]:
    """Everything, for JSON; fields of a row that are empty are left out."""
    listed = []
    for row in rows:
        fields = {name: value for name, value in asdict(row).items() if value not in ("", [])}
        listed.append({**fields, "ok": row.ok})
        if not row.ok:
            listed[-1]["failure"] = row.failure()
    return {"summary": summary, "tolerance": TOLERANCE, "notes": _NOTES, "rows": listed}


# -- processes -----------------------------------------------------------------------------------

#: Fork handlers of some packages refuse a second fork while they run.
_forking = threading.Lock()


def run_all(
    groups: Sequence[tuple[Entry, list[Row]]], jobs: int, timeout: float
) -> list[Row]:
    """The rows of each entry in a process of their own; progress goes to stderr."""
    # Forked from a process that has imported the compiler: quick, and with no compiled code yet.
    importlib.import_module("torch._inductor.compile_fx")
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    total, done = sum(len(rows) for _, rows in groups), 0

    def one(group: tuple[Entry, list[Row]]) -> list[Row]:
        nonlocal done
        finished = []
        for row in run_in_process(context, *group, timeout):
            finished.append(row)
            done += 1
            verdict = "ok" if row.ok else row.failure()
            print(f"[{done}/{total}] {row.name}: {verdict}", file=sys.stderr, flush=True)
        return finished

    with (
        tempfile.TemporaryDirectory() as cache,
        fresh_cache(dir=cache),
        ThreadPoolExecutor(jobs) as pool,
    ):
        return [row for rows in pool.map(one, groups) for row in rows]


def run_in_process(
    context: multiprocessing.context.BaseContext, entry: Entry, rows: list[Row], timeout: float
) -> Iterator[Row]:
    """The filled rows, one after the other; a crash or a timeout is the error of the rest."""
    receiver, sender = context.Pipe(duplex=False)

    def work() -> None:
        torch.set_num_threads(1)
        for row in rows:
            sender.send(measure(entry, row))

    process = context.Process(target=work)
    with _forking:
        process.start()
    sender.close()
    trouble = ""
    try:
        for row in rows:
            if not trouble and not receiver.poll(timeout):
                trouble = f"no result after {timeout:.0f} s"
            if trouble:
                yield replace(row, error=trouble)
                continue
            try:
                yield receiver.recv()
            except EOFError:
                process.join()
                trouble = f"the process ended with exit code {process.exitcode}"
                yield replace(row, error=trouble)
    finally:
        process.kill()
        process.join()
