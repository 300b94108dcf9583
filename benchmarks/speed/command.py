"""What the seven commands share: options, tables, JSON, plots, verdicts and the exit code."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tabulate import tabulate

from benchmarks.machine import write_json
from benchmarks.speed.bars import Verdict, judge
from benchmarks.speed.clock import gpu_facts
from benchmarks.speed.measure import Settings, run_groups
from benchmarks.speed.rows import FAILED, NOT_RUN, OK, Group, Row
from benchmarks.speed.sizes import PEAK_TBS, PEAK_TFLOPS

NO_GPU = 2


@dataclass(frozen=True)
class Command:
    """One subcommand.

    Attributes:
        name, summary: for the parser.
        plan: the groups of a run.
        rounds: timed calls of each row by default.
        lead: calls of a row right before each that is timed.
        resolutions: by default.
        options: adds arguments of its own.
        without_gpu: whether these arguments need no GPU.
        columns: figures shown as columns, by name.
        finish: given the rows of a group once they are timed: adds figures, returns text to print.
    """

    name: str
    summary: str
    plan: Callable[[Settings, argparse.Namespace], list[Group]]
    rounds: int = 20
    lead: int = 0
    resolutions: tuple[str, ...] = ("480p", "720p")
    options: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    without_gpu: Callable[[argparse.Namespace], bool] = lambda args: False
    columns: tuple[str, ...] = ()
    finish: Callable[[list[Row]], str] = lambda rows: ""


def register(command: Command, subparsers: argparse._SubParsersAction) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(command.name, help=command.summary)
    parser.add_argument("--rows", nargs="+", metavar="TEXT", default=[],
                        help="only rows whose name contains one of these")
    parser.add_argument("--resolutions", nargs="+", choices=("480p", "720p"),
                        help=f"default: {' '.join(command.resolutions)}")
    parser.add_argument("--rounds", type=int, help=f"timed calls, default: {command.rounds}")
    parser.add_argument("--budget", type=float, default=600,
                        help="seconds after which no row is begun; required ones then fail")
    parser.add_argument("--row-limit", type=float, default=150,
                        help="seconds that preparing one row may take")
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    parser.add_argument("--plots", metavar="DIR", help="write PNG plots there (needs matplotlib)")
    parser.add_argument("--redraw", metavar="FILE",
                        help="measure nothing: tables and plots of an earlier run's JSON")
    parser.add_argument("--smoke", action="store_true",
                        help="every row at tiny sizes on the CPU, no bar checked")
    command.options(parser)
    parser.set_defaults(run=lambda args: run(command, args))


def run(command: Command, args: argparse.Namespace) -> int:
    """Measure, print and judge: 0, 1 where a required row or a bar fails, 2 without a GPU."""
    if args.redraw:
        return _redraw(command, args)
    on_gpu = torch.cuda.is_available() and not args.smoke
    if not on_gpu and not args.smoke and not command.without_gpu(args):
        print(f"{command.name}: needs an NVIDIA GPU, and torch sees none (--smoke runs without)")
        return NO_GPU
    rounds = (2 if args.smoke else command.rounds) if args.rounds is None else args.rounds
    if rounds < 1:
        print(f"{command.name}: --rounds {rounds}: use at least 1")
        return 1
    if args.plots:
        from benchmarks.speed.plots import missing

        problem = missing()
        if problem:
            print(f"{command.name}: {problem}")
            return 1
    settings = Settings(
        device="cuda" if on_gpu else "cpu", smoke=args.smoke, rounds=rounds,
        budget=args.budget, row_limit=args.row_limit, wanted=args.rows,
        resolutions=args.resolutions or command.resolutions[: 1 if args.smoke else None],
        lead=command.lead,
    )
    if args.smoke:
        torch.set_num_threads(1)
    groups = chosen(command.plan(settings, args), settings)
    if not groups:
        print(f"{command.name}: no row's name contains {' or '.join(map(repr, args.rows))}")
        return 1
    gpu = gpu_facts() if on_gpu else {}
    _print_head(command, gpu)

    clocks: dict[str, Any] = {}

    def after_each(rows: list[Row], seen: dict[str, Any]) -> None:
        title = rows[-1].group
        group = [row for row in rows if row.group == title]
        clocks.update(seen)
        text = command.finish(group)
        print(table(title, group, command.columns) + text + clock_line(seen[title]), flush=True)
        if args.json:
            write_json(args.json, command.name, content(rows, clocks, gpu, settings, []))

    rows = run_groups(groups, settings, after_each)
    verdicts = [] if args.smoke else judge(command.name, rows)
    if args.json:
        write_json(args.json, command.name, content(rows, clocks, gpu, settings, verdicts))
    if args.plots:
        _plot(command, args.plots, rows)
    return conclude(command.name, rows, verdicts, settings.spent())


def chosen(groups: Sequence[Group], settings: Settings) -> list[Group]:
    """The groups with the rows that were asked for; empty ones are left out."""
    kept = []
    for group in groups:
        tasks = [t for t in group.tasks if settings.wants(f"{group.title}: {t.row.label}")]
        if tasks:
            kept.append(Group(group.title, tasks, group.shared))
    return kept


def table(title: str, rows: Sequence[Row], columns: Sequence[str]) -> str:
    """A group as text."""
    measures = list(dict.fromkeys(m for row in rows for m in row.accuracy if ", " not in m))
    figures = [name for name in columns if any(name in row.figures for row in rows)]
    has = {
        "TFLOPS": any(row.tflops for row in rows),
        "TB/s": any(row.tbs and not row.flops for row in rows),
    }
    headers = [title, "median ms", "range"]
    headers += [name for name, there in has.items() if there] + ["% of peak"]
    headers += [*measures, *figures, "verdict"]
    lines = []
    for row in rows:
        line: list[Any] = [row.label, _number(row.ms, 3)]
        line.append("" if row.ms is None else f"{row.fastest:.3f}-{row.slowest:.3f}")
        line += [_number(row.tflops, 0)] if has["TFLOPS"] else []
        line += [_number(row.tbs, 2)] if has["TB/s"] else []
        line.append(_number(row.percent, 1))
        line += [_number(row.accuracy.get(m), 5) for m in measures]
        line += [_figure(row.figures.get(name)) for name in figures]
        line.append(row.status if not row.reason else f"{row.status}: {row.reason}"[:110])
        lines.append(line)
    return "\n" + tabulate(lines, headers, disable_numparse=True) + "\n"


def clock_line(seen: dict[str, float]) -> str:
    """What the GPU did while a group was timed."""
    if not seen:
        return ""
    return (
        f"SM clock {seen['before']:.0f} MHz before, {seen['after']:.0f} after, median "
        f"{seen['median']:.0f}, lowest {seen['lowest']:.0f}; {seen['power W']:.0f} W, "
        f"{seen['temperature C']:.0f} C\n"
    )


def conclude(
    name: str, rows: Sequence[Row], verdicts: Sequence[Verdict], seconds: float
) -> int:
    """Print the bars and the summary; the exit code."""
    if verdicts:
        lines = [
            (v.bar.text, _number(v.value, 3), "" if v.bar.aim is None else f"{v.bar.aim:g}",
             f"{v.verdict}: {v.reason}"[:110] if v.reason else v.verdict)
            for v in verdicts
        ]
        print("\n" + tabulate(lines, ("bar", "measured", "aim", "verdict"), disable_numparse=True))
    failed = [row for row in rows if row.required and row.status in (FAILED, NOT_RUN)]
    for row in rows:
        if row.status != OK:
            kind = "required" if row.required else "not required"
            print(f"{row.status.upper()} ({kind}) {row.group}: {row.label}: {row.reason}")
    missed = [v for v in verdicts if v.verdict == "MISSED"]
    unchecked = [v for v in verdicts if v.verdict == "not checked"]
    statuses = [row.status for row in rows]
    counts = {status: statuses.count(status) for status in dict.fromkeys(statuses)}
    print(
        f"{name}: {', '.join(f'{n} rows {status}' for status, n in counts.items())}; "
        f"{len(verdicts) - len(missed) - len(unchecked)} bars reached, {len(missed)} missed, "
        f"{len(unchecked)} not checked; {len(failed)} required rows failed; {seconds:.0f} s: "
        f"{'FAILED' if failed or missed else 'ok'}"
    )
    return 1 if failed or missed else 0


def content(
    rows: Sequence[Row], clocks: dict[str, Any], gpu: dict[str, Any], settings: Settings,
    verdicts: Sequence[Verdict],
) -> dict[str, Any]:
    """Everything, for JSON."""
    return {
        "gpu": gpu,
        "peaks": {"tflops": PEAK_TFLOPS, "tbs": PEAK_TBS},
        "smoke": settings.smoke,
        "rounds": settings.rounds,
        "lead": settings.lead,
        "clocks": clocks,
        "rows": [row.as_dict() for row in rows],
        "bars": [
            {**asdict(v.bar), "value": v.value, "verdict": v.verdict, "reason": v.reason}
            for v in verdicts
        ],
    }


def _redraw(command: Command, args: argparse.Namespace) -> int:
    try:
        with open(args.redraw, encoding="utf-8") as file:
            loaded = json.load(file)
        rows = [Row.from_dict(row) for row in loaded["rows"]]
        name = loaded["benchmark"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"{command.name}: {args.redraw} is no result of this command: {error}")
        return 1
    if name != command.name:
        print(f"{command.name}: {args.redraw} is a result of {name!r}")
        return 1
    for title in dict.fromkeys(row.group for row in rows):
        print(table(title, [row for row in rows if row.group == title], command.columns))
    if args.plots:
        _plot(command, args.plots, rows)
    return conclude(name, rows, [] if loaded["smoke"] else judge(name, rows), 0.0)


def _plot(command: Command, folder: str, rows: Sequence[Row]) -> None:
    from benchmarks.speed.plots import draw

    for path in draw(command.name, rows, folder):
        print(f"wrote {path}")


def _print_head(command: Command, gpu: dict[str, Any]) -> None:
    from benchmarks.machine import machine

    facts = {**machine(), **gpu}
    print(f"{command.name}: " + ", ".join(f"{k} {v}" for k, v in facts.items() if v is not None))


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _figure(value: float | str | None) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:,.3f}".rstrip("0").rstrip(".") if value else "0"
