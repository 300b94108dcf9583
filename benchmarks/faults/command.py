"""``python -m benchmarks faults``: the fault table.

Every program of the catalogue runs in a process of its own, under eager mode, aot_eager, Inductor
and contig_safe (``--modes``), on the CPU with emulated kernels or on a GPU with the real ones.
Required: contig_safe is right in every program, bit-equal to dense aligned copies of the operands,
and an error in the few that no layout makes legal.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import torch
from tabulate import tabulate

from benchmarks.faults import worker
from benchmarks.faults.catalogue import catalogue
from benchmarks.faults.program import Program
from benchmarks.faults.worker import CONTIG_SAFE, MODES, REFUSED, RIGHT, Result
from benchmarks.machine import write_json

_OUTCOMES = (
    RIGHT, worker.WRONG, worker.CALL_ERROR, worker.LATER_ERROR, REFUSED, worker.TIMEOUT,
    worker.CRASH,
)


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser("faults", help="programs with faulty layouts, and who is right")
    default = "cuda" if torch.cuda.device_count() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--group", help="only groups whose name contains this")
    parser.add_argument("--only", help="only programs whose name contains this")
    parser.add_argument("--quick", action="store_true", help="every seventh program")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--timeout", type=float, default=240, help="seconds for one process")
    parser.add_argument("--json", metavar="FILE", help="write every result there")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the table; 1 if a required row fails."""
    programs = list(chosen(args))
    if not programs:
        print("faults: no program matches")
        return 1
    started = time.perf_counter()
    tasks = [(program, mode) for program in programs for mode in args.modes]
    results = run_all(tasks, args.device, args.jobs, args.timeout)
    print(table(programs, args.modes, results))
    print(counts(args.modes, results))
    failed = [r for r in results if not acceptable(_by_name(programs)[_key(r)], r)]
    for result in failed:
        print(f"FAILED {result.group}: {result.program}: {result.outcome}: {result.message}")
    if args.json:
        write_json(args.json, "faults", {"results": [asdict(result) for result in results]})
    right = sum(r.outcome == RIGHT for r in results if r.mode == CONTIG_SAFE)
    print(
        f"faults on {args.device}: contig_safe right in {right} of {len(programs)} programs, "
        f"{len(failed)} required rows failed, {time.perf_counter() - started:.0f} s"
    )
    return 1 if failed else 0


def chosen(args: argparse.Namespace) -> Iterable[Program]:
    """The programs that the command line asks for."""
    fitting = (p for p in catalogue() if args.device in p.devices)
    for number, program in enumerate(fitting):
        if args.group and args.group not in program.group:
            continue
        if args.only and args.only not in program.name:
            continue
        if args.quick and number % 7:
            continue
        yield program


def acceptable(program: Program, result: Result) -> bool:
    """Whether ``result`` is what the project promises of ``program``."""
    if result.mode != CONTIG_SAFE:
        return True
    if program.illegal:
        return result.outcome in (worker.CALL_ERROR, worker.LATER_ERROR, REFUSED)
    return result.outcome == RIGHT


# -- processes -----------------------------------------------------------------------------------

#: Fork handlers of some packages refuse a second fork while they run.
_forking = threading.Lock()


def run_all(
    tasks: Sequence[tuple[Program, str]], device: str, jobs: int, timeout: float
) -> list[Result]:
    """Run each task in a process of its own, ``jobs`` at a time; progress goes to stderr."""
    # Forked from a process that has imported the compiler and touched no device: quick and clean.
    importlib.import_module("torch._inductor.compile_fx")
    context = multiprocessing.get_context("fork")
    done = 0

    def one(task: tuple[Program, str]) -> Result:
        nonlocal done
        result = run_in_process(context, *task, device, timeout)
        done += 1
        print(
            f"[{done}/{len(tasks)}] {result.mode}: {result.group}: {result.program}: "
            f"{result.outcome}",
            file=sys.stderr, flush=True,
        )
        return result

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(one, tasks))


def run_in_process(
    context: multiprocessing.context.BaseContext,
    program: Program,
    mode: str,
    device: str,
    timeout: float,
) -> Result:
    """One task in one process; a crash or a timeout is an outcome as well."""
    receiver, sender = context.Pipe(duplex=False)

    def work() -> None:
        torch.set_num_threads(1)
        try:
            sender.send(worker.run_program(program, mode, device))
        except Exception as error:  # in the reference or the harness: no verdict on the program
            text = f"{type(error).__name__}: {error}"[:300]
            sender.send(Result(program.name, program.group, mode, worker.CRASH, text))

    process = context.Process(target=work)
    with _forking:
        process.start()
    sender.close()
    result = None
    try:
        if receiver.poll(timeout):
            result = receiver.recv()
        else:
            result = Result(program.name, program.group, mode, worker.TIMEOUT)
    except EOFError:
        process.join()
        result = Result(
            program.name, program.group, mode, worker.CRASH, f"exit code {process.exitcode}"
        )
    finally:
        process.kill()
        process.join()
    return result


# -- output --------------------------------------------------------------------------------------


def _key(item: Program | Result) -> tuple[str, str]:
    return (item.group, item.name if isinstance(item, Program) else item.program)


def _by_name(programs: Iterable[Program]) -> dict[tuple[str, str], Program]:
    return {_key(program): program for program in programs}


def table(programs: Sequence[Program], modes: Sequence[str], results: Sequence[Result]) -> str:
    """Programs as rows, modes as columns."""
    outcomes = {(*_key(r), r.mode): r.outcome for r in results}
    rows, group = [], None
    for program in programs:
        if program.group != group:
            group = program.group
            rows.append((f"-- {group}", *("" for _ in modes)))
        mark = " (*)" if program.illegal else ""
        rows.append((program.name + mark, *(outcomes[*_key(program), mode] for mode in modes)))
    legend = "(*) no layout is legal: an error is right"
    return f"{tabulate(rows, ('program', *modes))}\n{legend}\n"


def counts(modes: Sequence[str], results: Sequence[Result]) -> str:
    """How often each mode had each outcome."""
    rows = []
    for mode in modes:
        counter = Counter(r.outcome for r in results if r.mode == mode)
        rows.append((mode, *(counter[outcome] for outcome in _OUTCOMES)))
    return tabulate(rows, ("mode", *_OUTCOMES)) + "\n"
