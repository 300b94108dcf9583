"""Try one layout of one operand, in a process that may not survive it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from contig_pass.contracts.registry import resolve_op
from contig_pass.doctor.layouts import dense_like, plant
from contig_pass.doctor.planning import Trial, arguments_of, synchronise
from contig_pass.doctor.processes import one_line
from contig_pass.doctor.programs import Arguments, Program, replaced
from contig_pass.inductor.examining import compile_alone

RIGHT = "right value"
WRONG = "wrong value"
CALL_ERROR = "error at the call"
LATER_ERROR = "error later"
#: A value came back where no layout gives one to compare it with.
ACCEPTED = "a value"
REFUSED = "refused while tracing"
UNCOMPILED = "refused by Inductor"


@dataclass(frozen=True)
class Observed:
    """What happened.

    Attributes:
        outcome: in eager mode; one of the constants of this module or of ``processes``.
        message: the error in one line, or by how much the value is wrong.
        compiled: what tracing and Inductor made of a broken layout that gave the right value.
        compiled_message: of that.
    """

    outcome: str
    message: str = ""
    compiled: str = ""
    compiled_message: str = ""


def observe(program: Program, trial: Trial, device: torch.device, compiling: bool) -> Observed:
    """Run ``program`` with its operand as ``trial`` has it, and compare.

    The reference is the op on dense aligned copies of the same values, or, where all operands are
    dense, the program's own float64 computation.

    Args:
        program, trial, device: what to try, and where.
        compiling: look at tracing and Inductor too where a broken layout gives the right value.
    """
    given, values = arguments_of(program, trial, device)
    if trial.lie is None:
        wanted = _expected(program, given, trial)
        tried = given
    else:
        value = values[trial.operand]
        planted = plant(value, trial.lie)
        wanted = _kept(program.run(replaced(given, trial.operand, dense_like(planted, value))))
        tried = replaced(given, trial.operand, planted)
        _blank(given)
    synchronise(device)
    seen = _outcome(program, lambda: program.run(tried), wanted, device)
    if seen.outcome not in (RIGHT, ACCEPTED) or trial.legal or not compiling:
        return seen
    compiled, message = _compiled(program, tried, wanted, device)
    return Observed(seen.outcome, seen.message, compiled, message)


def _expected(program: Program, given: Arguments, trial: Trial) -> list[torch.Tensor] | None:
    if not trial.legal and trial.sizes:
        return None
    if program.expected is not None:
        return [program.expected(given)]
    return _kept(program.run(given))


def _kept(results: list[torch.Tensor]) -> list[torch.Tensor]:
    """Copies, so that nothing written later changes them.

    They hold memory of their own, and the caller holds the results: a kernel that writes nothing
    then finds no right value in the memory it is given.
    """
    _HELD.extend(results)
    return [result.clone() for result in results]


_HELD: list[torch.Tensor] = []


def _blank(given: Arguments) -> None:
    """What an ``out=`` form writes to, as if it had never been called."""
    out = given.get("out")
    # An attention backward has an operand of that name, which it reads.
    if isinstance(out, torch.Tensor) and "logsumexp" not in given:
        out.zero_()


def _outcome(
    program: Program,
    run: Callable[[], list[torch.Tensor]],
    wanted: list[torch.Tensor] | None,
    device: torch.device,
) -> Observed:
    try:
        results = run()
    except Exception as error:
        return Observed(CALL_ERROR, one_line(error))
    try:
        synchronise(device)
        if wanted is None:
            return Observed(ACCEPTED)
        wrong = _difference(results, wanted, program.tolerance)
    except Exception as error:
        return Observed(LATER_ERROR, one_line(error))
    return Observed(WRONG, wrong) if wrong else Observed(RIGHT)


def _difference(
    results: list[torch.Tensor], wanted: list[torch.Tensor], tolerance: float
) -> str:
    for number, (got, want) in enumerate(zip(results, wanted, strict=False)):
        if got.shape != want.shape:
            return f"result {number} has shape {tuple(got.shape)} instead of {tuple(want.shape)}"
        got, want = got.cpu().double(), want.cpu().double()
        error = float((got - want).norm() / want.norm().clamp(min=1e-30))
        if not error <= tolerance:  # NaN is wrong as well
            return f"result {number} has a relative error of {error:.2g}"
    return ""


# -- the compiled side ---------------------------------------------------------------------------


def _compiled(
    program: Program, tried: Arguments, wanted: list[torch.Tensor] | None, device: torch.device
) -> tuple[str, str]:
    """A contract binds compiled calls as well, whose compiler may refuse what a kernel takes."""
    try:
        with FakeTensorMode() as mode:
            program.run(tree_map_only(torch.Tensor, mode.from_tensor, tried))
    except Exception as error:
        return REFUSED, one_line(error)
    _blank(tried)
    op = resolve_op(program.op)

    @compile_alone
    def run(given: Arguments) -> Any:
        with program.around():
            return op(**given)

    seen = _outcome(program, lambda: program.counted(run(tried)), wanted, device)
    return (UNCOMPILED if seen.outcome == CALL_ERROR else seen.outcome), seen.message


def refused(observed: Observed) -> bool:
    """Whether the layout gave no right value in some way of running the op."""
    eager = observed.outcome not in (RIGHT, ACCEPTED)
    return eager or observed.compiled not in ("", RIGHT, ACCEPTED)


