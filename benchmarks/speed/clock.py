"""Medians of calls timed in turn, and what the GPU's clock and power did meanwhile."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch

#: Written before every timed call: more than the 50 MB of an H100's L2, so that no row finds its
#: inputs there, and long enough (0.1 ms) for the CPU to get ahead of the GPU.
FLUSH_BYTES = 256 << 20
#: Rounds before those that count; 1 where few rounds of long calls are timed.
WARM_UP = 2
#: Rounds that are timed even when the time is up.
LEAST_ROUNDS = 3
_QUERY = "clocks.sm,power.draw,temperature.gpu"
_SAMPLE_MS = 100


@dataclass
class Samples:
    """Milliseconds of one call, one for each round, or the error that ended it."""

    milliseconds: list[float] = field(default_factory=list)
    error: Exception | None = None

    @property
    def median(self) -> float:
        """Of all rounds."""
        return statistics.median(self.milliseconds)


def interleaved(
    calls: Sequence[Callable[[], Any]], rounds: int, device: str, deadline: float, lead: int = 0
) -> list[Samples]:
    """Times of each call: in every round each is timed once, in order.

    Args:
        calls: what to time; what they return is dropped.
        rounds: how often.
        device: ``"cuda"``: CUDA events; else the wall clock.
        deadline: of ``time.perf_counter()``; no round begins after it but the first
            :data:`LEAST_ROUNDS`.
        lead: calls of the same on a GPU right before the one that is timed. A GPU at its power
            limit sets its clock by what it did in the tenths of a second before: without them a
            row is timed at the clock that the row before it left.
    """
    samples = [Samples() for _ in calls]
    warm_up = min(WARM_UP, max(1, rounds // 3))
    timed = _timed_on_gpu if device == "cuda" else _timed_on_cpu
    flush = torch.empty(FLUSH_BYTES if device == "cuda" else 0, dtype=torch.int8, device=device)
    for step in range(warm_up + rounds):
        if step >= warm_up + LEAST_ROUNDS and time.perf_counter() > deadline:
            break
        taken = timed(calls, samples, flush, lead)
        for sample, milliseconds in zip(samples, taken, strict=True):
            if step >= warm_up and milliseconds is not None:
                sample.milliseconds.append(milliseconds)
    return samples


def _timed_on_gpu(
    calls: Sequence[Callable[[], Any]], samples: Sequence[Samples], flush: torch.Tensor, lead: int
) -> list[float | None]:
    """One round: everything is launched before anything is waited for."""
    events: list[tuple[Any, Any] | None] = []
    for call, sample in zip(calls, samples, strict=True):
        if sample.error is not None:
            events.append(None)
            continue
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        try:
            for _ in range(lead):
                call()
            flush.zero_()
            start.record()
            call()
        except Exception as error:
            sample.error = error
            events.append(None)
            continue
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return [None if pair is None else pair[0].elapsed_time(pair[1]) for pair in events]


def _timed_on_cpu(
    calls: Sequence[Callable[[], Any]], samples: Sequence[Samples], *_: object
) -> list[float | None]:
    taken: list[float | None] = []
    for call, sample in zip(calls, samples, strict=True):
        if sample.error is not None:
            taken.append(None)
            continue
        started = time.perf_counter()
        try:
            call()
        except Exception as error:
            sample.error = error
        spent = (time.perf_counter() - started) * 1e3
        taken.append(None if sample.error is not None else spent)
    return taken


def gpu_facts() -> dict[str, float | str]:
    """Name, limits and present state of the GPU by ``nvidia-smi``; empty where there is none."""
    query = f"name,driver_version,clocks.max.sm,power.limit,{_QUERY}"
    lines = _smi(query)
    if not lines:
        return {}
    return dict(zip(query.split(","), lines[0], strict=False))


@contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Samples the GPU within the block; afterwards the dictionary holds what was seen.

    Its keys: SM clock in MHz ``before`` (the first sample), ``median``, ``lowest`` and ``after``
    (the last one), ``power W`` (median) and ``temperature C`` (last). Empty without
    ``nvidia-smi``.
    """
    seen: dict[str, float] = {}
    command = [
        "nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits",
        f"--loop-ms={_SAMPLE_MS}", "--id=0",
    ]
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
    except OSError:
        yield seen
        return
    try:
        yield seen
    finally:
        process.terminate()
        output = process.communicate()[0]
        seen.update(_summary(output))


def _summary(output: str) -> dict[str, float]:
    """What :func:`watched` reports of the lines that ``nvidia-smi`` printed."""
    lines = []
    for line in output.splitlines():
        # The last line may be cut off, and a value may be "[N/A]".
        with suppress(ValueError):
            values = [float(part) for part in line.split(",")]
            if len(values) == len(_QUERY.split(",")):
                lines.append(values)
    if not lines:
        return {}
    clocks = [line[0] for line in lines]
    return {
        "before": clocks[0],
        "median": statistics.median(clocks),
        "lowest": min(clocks),
        "after": clocks[-1],
        "power W": statistics.median(line[1] for line in lines),
        "temperature C": lines[-1][2],
    }


def _smi(query: str) -> list[list[str]]:
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        printed = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    if printed.returncode:
        return []
    return [[part.strip() for part in line.split(",")] for line in printed.stdout.splitlines()]
