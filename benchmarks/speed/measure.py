"""Run groups of rows: prepare each, measure its accuracy, then time all of them in turn."""

from __future__ import annotations

import contextlib
import gc
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.coverage.measure import one_line
from benchmarks.speed.clock import interleaved, watched
from benchmarks.speed.rows import (
    FAILED,
    NOT_RUN,
    OK,
    UNAVAILABLE,
    Group,
    Prepared,
    Row,
    Unavailable,
)

#: Every compiled row of a group adds an entry to the same code objects.
_RECOMPILE_LIMIT = 256
#: Of the budget, kept for timing what was prepared.
_SHARE_FOR_TIMING = 0.15


@dataclass
class Settings:
    """How a command runs.

    Attributes:
        device: ``"cuda"`` or ``"cpu"``.
        smoke: tiny sizes, nothing compiled by Inductor.
        rounds: timed calls of each row.
        budget: seconds after which no row is begun.
        row_limit: seconds that preparing one row may take.
        wanted: texts of which a row's label must contain one; empty: every row.
        resolutions: names of sizes.
        lead: calls of a row on a GPU right before each that is timed.
        started: ``time.perf_counter()`` at the start.
    """

    device: str
    smoke: bool = False
    rounds: int = 20
    budget: float = 600.0
    row_limit: float = 120.0
    wanted: Sequence[str] = ()
    resolutions: Sequence[str] = ("480p",)
    lead: int = 0
    started: float = field(default_factory=time.perf_counter)

    def spent(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.started

    def wants(self, label: str) -> bool:
        """Whether a row is asked for."""
        return not self.wanted or any(text.lower() in label.lower() for text in self.wanted)


def run_groups(
    groups: Sequence[Group], settings: Settings, after_each: Callable[[list[Row], Any], None]
) -> list[Row]:
    """Fill the rows of ``groups``.

    Args:
        groups: in order; a group's shared inputs are dropped after it.
        settings: of the run.
        after_each: called with all rows so far and the clocks by group after every group, so that
            a run that is ended from outside leaves what it has.
    """
    rows: list[Row] = []
    clocks: dict[str, dict[str, float]] = {}
    for group in groups:
        reset()
        clocks[group.title] = _run_group(group, settings)
        rows += [task.row for task in group.tasks]
        for shared in group.shared:
            shared.drop()
        after_each(rows, clocks)
    return rows


def _run_group(group: Group, settings: Settings) -> dict[str, float]:
    ready: list[tuple[Row, Prepared]] = []
    for task in group.tasks:
        row = task.row
        if settings.spent() > settings.budget * (1 - _SHARE_FOR_TIMING):
            row.status, row.reason = NOT_RUN, f"the {settings.budget:.0f} s were used up"
            continue
        began = time.perf_counter()
        prepared = _prepared(row, task.prepare, settings)
        row.figures["prepare s"] = time.perf_counter() - began
        progress(settings, f"{group.title}: {row.label}: {row.reason or 'ready'}")
        if prepared is not None and prepared.timed:
            ready.append((row, prepared))
    if not ready:
        return {}
    gc.collect()
    deadline = settings.started + settings.budget
    with watched() as seen, torch.no_grad():
        taken = interleaved(
            [p.call for _, p in ready], settings.rounds, settings.device, deadline, settings.lead
        )
    for (row, _), samples in zip(ready, taken, strict=True):
        if samples.error is not None or not samples.milliseconds:
            row.status, row.reason = FAILED, one_line(samples.error or RuntimeError("no sample"))
            continue
        row.ms = samples.median
        row.fastest, row.slowest = min(samples.milliseconds), max(samples.milliseconds)
        row.rounds = len(samples.milliseconds)
    return dict(seen)


def _prepared(
    row: Row, prepare: Callable[[], Prepared], settings: Settings
) -> Prepared | None:
    """The row made ready and its accuracy measured, or None and the row says why."""
    try:
        with within(settings.row_limit), torch.no_grad():
            prepared = prepare()
            if prepared.timed and not prepared.called:
                prepared.call()
            if prepared.accuracy is not None:
                row.accuracy = prepared.accuracy()
            if prepared.figures is not None:
                row.figures |= prepared.figures()
            if settings.device == "cuda":
                torch.cuda.synchronize()
    except Unavailable as missing:
        row.status, row.reason = UNAVAILABLE, str(missing)
        return None
    except Exception as error:
        row.status, row.reason = FAILED, one_line(error)
        return None
    row.status, row.reason = OK, ""
    problem = row.inaccurate()
    if problem:
        # Timed all the same: the figure is worth knowing, but it does not count.
        row.status, row.reason = FAILED, problem
    return prepared


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Ends Python code in the block after ``seconds`` by a TimeoutError, in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"not ready after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def reset() -> None:
    """Forget what was compiled, and give its memory back."""
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = _RECOMPILE_LIMIT
    torch._dynamo.config.accumulated_recompile_limit = 4 * _RECOMPILE_LIMIT
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def progress(settings: Settings, text: str) -> None:
    """One line on stderr."""
    print(f"[{settings.spent():.0f} s] {text}", file=sys.stderr, flush=True)
