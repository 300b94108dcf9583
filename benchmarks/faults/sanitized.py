"""The fault table's programs in eager mode under the sanitizer, on the CPU."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.faults import emulate, recording, worker
from benchmarks.faults.catalogue import catalogue
from benchmarks.faults.program import EAGER, Case, Program, compiled
from benchmarks.faults.worker import CALL_ERROR, LATER_ERROR, RIGHT
from contig_pass.contracts import REGISTRY
from contig_pass.sanitizer import Finding, Sanitizer, sanitize

_HERE = os.path.dirname(os.path.abspath(__file__))


@dataclass(frozen=True)
class Verdict:
    """What became of one program.

    Attributes:
        group, program: which.
        illegal: no layout makes it legal.
        eager: its outcome without the sanitizer.
        findings: what ``mode="warn"`` told.
        raised: whether ``mode="raise"`` ended it.
        fixed: its outcome under ``mode="fix"``.
        message: of that outcome.
    """

    group: str
    program: str
    illegal: bool
    eager: str
    findings: tuple[Finding, ...]
    raised: bool
    fixed: str
    message: str

    @property
    def operands(self) -> tuple[str, ...]:
        """The operands named, each once, with their ops."""
        return tuple(sorted({f"{f.op.split('::')[1]} {f.operand}" for f in self.findings}))

    def problem(self) -> str:
        """What the sanitizer failed to do, or nothing."""
        if self.eager != RIGHT and not self.findings:
            return f"{self.eager}, and nothing was found"
        if bool(self.findings) != self.raised:
            return "modes warn and raise disagree"
        if not self.illegal and self.fixed != RIGHT:
            return f"not repaired: {self.fixed}: {self.message}"
        if self.illegal and self.fixed not in (CALL_ERROR, LATER_ERROR):
            return "no layout is legal, and no error came"
        strange = [f for f in self.findings if not f.line.file.startswith(_HERE)]
        return f"told at {strange[0].line}" if strange else ""


def verdicts(every: int = 1) -> Iterator[Verdict]:
    """The verdicts on each ``every``-th program that runs on a CPU."""
    fitting = (program for program in catalogue() if "cpu" in program.devices)
    with _quiet(), _emulated():
        for number, program in enumerate(fitting):
            if number % every == 0:
                yield verdict_on(program)


def verdict_on(program: Program) -> Verdict:
    """Run ``program`` plain and in each of the sanitizer's modes."""
    with torch.no_grad():
        case = worker._build(program, "cpu")
        expected = [] if program.illegal else worker._reference(case)
    eager, _ = _outcome(program, expected, lambda function: function)
    warning, raising, fixing = map(sanitize, ("warn", "raise", "fix"))
    _outcome(program, expected, warning)
    _outcome(program, expected, raising)
    fixed, message = _outcome(program, expected, fixing)
    return Verdict(
        program.group, program.name, program.illegal, eager, warning.findings,
        bool(raising.findings), fixed, message,
    )


def _outcome(
    program: Program, expected: list[Any], around: Sanitizer | Callable[..., Any]
) -> tuple[str, str]:
    recording.forget()
    with REGISTRY.scope(), torch.no_grad():  # one program registers a contract
        case = worker._build(program, "cpu")
        prepare = case.prepare or compiled

        def wrapped(function: Callable[..., Any], mode: str) -> Callable[..., Any]:
            return around(prepare(function, mode))

        watched: Case = replace(case, prepare=wrapped)
        return worker._judge(watched, EAGER, "cpu", expected)


@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("contig_pass")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _emulated() -> Iterator[None]:
    library = emulate.install()
    try:
        yield
    finally:
        library._destroy()
