"""One row: compile, call, compare, and count what the pass and the hand fix did."""

from __future__ import annotations

import contextlib
import itertools
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

import contig_pass
from benchmarks.coverage.cases import Case, Entry, backend_options
from benchmarks.coverage.hand_fix import HandCall, hand_fix
from wan_models.recorder import Received, recording

AOT_EAGER, INDUCTOR = "aot_eager", "inductor"
#: Largest difference to eager mode, as a part of the largest value, of one block; differences of
#: blocks in a row add up like random ones, with the root of their number. The graph as it stands
#: must be bit-equal; Inductor sums reductions in another order, so that a bf16 value may round to
#: its neighbour (2^-8), and one cast to FP8 after it to the next grid point (2^-3 of that value).
#: Measured for FP8, B = 2: 0.0065 in one block, 0.011 in two, 0.033 in forty.
TOLERANCE = {AOT_EAGER: 0.0, INDUCTOR: 0.03}
_MESSAGE = 300


@dataclass
class Row:
    """One entry, quantisation and batch.

    Attributes:
        kind, owner, variant: see :class:`benchmarks.coverage.cases.Entry`.
        quantisation: a recipe, or ``"bf16"``.
        batch: B.
        inner: what runs the repaired graph.
        graphs, graphs_allowed: compiled for all calls, and how many may be.
        calls: how often the compiled module was called.
        difference: largest one to eager mode, as a part of the largest value.
        tolerance: what is allowed of it.
        uses, fixes, skips, fix_bytes: of the reports.
        fixed: what was fixed, in words.
        least_fixes: how many the pass must find.
        operands, bad_operands: what ``_scaled_mm`` received in compiled code, and how many of
            those a Hopper kernel refuses or misreads.
        bad_in_eager: the same in eager mode.
        hand_calls, hand_no_ops: ``.contiguous()`` calls of the hand fix, and those that returned
            the memory they were given.
        hand_sites: the functions they are in.
        seconds: for all of it.
        error: what went wrong, in one line.
    """

    kind: str
    owner: str
    variant: str
    quantisation: str
    batch: int
    inner: str
    graphs: int = 0
    graphs_allowed: int = 1
    calls: int = 0
    difference: float | None = None
    tolerance: float = 0.0
    uses: int = 0
    fixes: int = 0
    skips: int = 0
    fix_bytes: int = 0
    fixed: list[str] = field(default_factory=list)
    least_fixes: int = 0
    operands: int = 0
    bad_operands: int = 0
    bad_in_eager: int = 0
    hand_calls: int = 0
    hand_no_ops: int = 0
    hand_sites: list[str] = field(default_factory=list)
    seconds: float = 0.0
    error: str = ""

    @property
    def name(self) -> str:
        """All that tells the row from others."""
        return f"{self.owner}: {self.variant}, {self.quantisation}, B={self.batch}, {self.inner}"

    @property
    def ok(self) -> bool:
        """Whether every requirement is met."""
        return self.failure() is None

    def failure(self) -> str | None:
        """What requirement is missed, in one line; ``None``: none."""
        if self.error:
            return self.error
        if self.graphs != self.graphs_allowed:
            return f"{self.graphs} graphs for {self.calls} calls, {self.graphs_allowed} wanted"
        if self.difference is None or not self.difference <= self.tolerance:
            return f"differs by {self.difference} from eager mode, {self.tolerance} allowed"
        if self.bad_operands:
            return f"{self.bad_operands} of {self.operands} operands reach the kernel misplaced"
        if self.fixes < self.least_fixes:
            return f"{self.fixes} fixes, at least {self.least_fixes} wanted: a fault was missed"
        return None


def measure(entry: Entry, row: Row) -> Row:
    """Fill ``row``; an exception becomes its error."""
    started = time.perf_counter()
    row.least_fixes = entry.fixes
    try:
        _fill(entry.build(row.quantisation, row.batch), row)
    except Exception as error:  # one row's fault must not end the table
        row.error = one_line(error)
    row.seconds = round(time.perf_counter() - started, 2)
    return row


def _fill(case: Case, row: Row) -> None:
    reports: list[contig_pass.Report] = []
    torch._dynamo.reset()
    with torch.no_grad(), _settings(), recording() as received:
        eager = [_called(case, case.run, number) for number in range(len(case.calls))]
        _check_eager(eager)
        row.bad_in_eager = sum(map(is_bad, received))
        _count_hand_fix(case, row)
        received.clear()
        compiled = case.compiled(**backend_options(row.inner, reports.append))
        row.graphs_allowed = case.graphs
        row.tolerance = round(TOLERANCE[row.inner] * case.depth**0.5, 4)
        outcomes = [_called(case, compiled, number) for number in range(len(case.calls))]
    row.calls = len(case.calls)
    row.graphs = len(reports)
    row.difference = max(
        _difference(got, want) for got, want in zip(outcomes, eager, strict=True)
    )
    row.operands, row.bad_operands = len(received), sum(map(is_bad, received))
    totals = [report.totals for report in reports]
    row.uses = sum(t.uses for t in totals)
    row.fixes = sum(t.fixes for t in totals)
    row.skips = sum(t.skips for t in totals)
    row.fix_bytes = sum(t.nbytes for t in totals)
    row.fixed = [
        f"{fix.op} {fix.operand} {fix.before.strides}: {fix.reason}"
        for report in reports
        for fix in report.fixes
    ]


def _called(case: Case, function: Any, number: int) -> list[torch.Tensor]:
    """The tensors that call ``number`` returns."""
    case.before(number)
    out = function(*case.calls[number])
    return [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]


def _count_hand_fix(case: Case, row: Row) -> None:
    with hand_fix() as made:
        _called(case, case.run, 0)
    row.hand_calls, row.hand_no_ops = len(made), sum(call.no_op for call in made)
    row.hand_sites = [_site(call) for call in made[:_SITES]]


#: A model of 40 blocks repeats itself.
_SITES = 12


def _site(call: HandCall) -> str:
    return call.site if call.no_op else f"{call.site}: copied from strides {call.strides}"


def _check_eager(results: list[list[torch.Tensor]]) -> None:
    """A row whose values are not finite, or do not depend on its inputs, would show nothing."""
    for tensors in results:
        if not all(bool(x.isfinite().all()) for x in tensors):
            raise ValueError("eager mode returns values that are not finite")
    for one, other in itertools.pairwise(results):
        if one[0].shape == other[0].shape and torch.equal(one[0], other[0]):
            raise ValueError("two calls with different arguments return the same values")


def _difference(got: list[torch.Tensor], want: list[torch.Tensor]) -> float:
    """Largest difference as a part of the largest value; infinite for another shape or type."""
    if [(x.shape, x.dtype) for x in got] != [(x.shape, x.dtype) for x in want]:
        return float("inf")
    worst = 0.0
    for ours, theirs in zip(got, want, strict=True):
        if torch.equal(ours, theirs):
            continue
        off = (ours.double() - theirs.double()).abs().max().item()
        largest = theirs.double().abs().max().item()
        # NaN compares as not larger, so it must not get into max().
        worst = max(worst, off / largest if off == off and largest else float("inf"))
    return worst


def is_bad(operand: Received) -> bool:
    """Whether a Hopper kernel refuses or misreads what ``_scaled_mm`` received."""
    if operand.address:
        return True
    if operand.operand == "bias":
        return operand.strides != (1,)
    pitch, unit = operand.strides if operand.operand == "a" else operand.strides[::-1]
    return unit != 1 or pitch * operand.itemsize % 16 != 0


def one_line(error: Exception) -> str:
    """The exception's type and the first line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:_MESSAGE]


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    """Every row compiles for itself, and rounds where eager mode rounds."""
    settings = {
        "force_disable_caches": True, "emulate_precision_casts": True, "compile_threads": 1,
    }
    with warnings.catch_warnings(), torch._inductor.config.patch(settings):
        warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")
        warnings.filterwarnings("ignore", message=r"(?s).*Overriding a previously registered")
        yield
