"""Every program of the fault table."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.faults import adversarial, attention, compiles, matmul, routes, subgraphs, training
from benchmarks.faults.program import Program


def catalogue() -> Iterator[Program]:
    """All programs, group by group."""
    yield from matmul.programs()
    yield from attention.programs()
    yield from adversarial.programs()
    yield from routes.programs()
    yield from subgraphs.programs()
    yield from training.programs()
    yield from compiles.programs()
