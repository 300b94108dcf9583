"""Run one program in one mode and say what happened. Called in a process of its own."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from benchmarks.faults import recording
from benchmarks.faults.program import (
    AOT_EAGER,
    CONTIG_SAFE,
    EAGER,
    INDUCTOR,
    MODES,
    Case,
    Program,
    compiled,
)
from benchmarks.faults.reference import DenseAttention, DenseOperands

RIGHT = "right"
WRONG = "WRONG VALUE"
CALL_ERROR = "error at the call"
LATER_ERROR = "error later"
REFUSED = "refused while tracing"
TIMEOUT = "timeout"
CRASH = "crash"

__all__ = ["AOT_EAGER", "CONTIG_SAFE", "EAGER", "INDUCTOR", "MODES", "Result", "run_program"]

SEED = 20240
#: Precision casts as eager mode makes them, so that values can be compared bit by bit.
SETTINGS = {
    "emulate_precision_casts": True,
    "compile_threads": 1,
}


@dataclass
class Result:
    """What one mode did with one program.

    Attributes:
        program, group, mode: which.
        outcome: one of the constants of this module.
        message: the error in one line, or what was wrong with the value.
        received: facts of every operand that a recording or emulated kernel received.
    """

    program: str
    group: str
    mode: str
    outcome: str
    message: str = ""
    received: list[Any] = field(default_factory=list)


def run_program(program: Program, mode: str, device: str) -> Result:
    """Run ``program`` in ``mode`` and compare every call with the reference, bit by bit."""
    library = None
    if device == "cpu":
        from benchmarks.faults import emulate

        library = emulate.install()
    try:
        with torch.no_grad():
            expected = [] if program.illegal else _reference(_build(program, device))
            recording.forget()
            outcome, message = _judge(_build(program, device), mode, device, expected)
    finally:
        if library is not None:
            library._destroy()
    return Result(
        program.name, program.group, mode, outcome, message, list(recording.received)
    )


def _build(program: Program, device: str) -> Case:
    torch.manual_seed(SEED)
    return program.build(device)


def _reference(case: Case) -> list[Any]:
    """Outputs, aliases and inputs after each call, as dense aligned operands give them."""
    results = []
    with torch.set_grad_enabled(case.grad), DenseAttention(), DenseOperands():
        for args in case.calls:
            results.append(_observed(case.function(*args), args))
    return results


def _observed(outputs: Any, args: tuple) -> tuple[list[torch.Tensor], list[Any], list[Any]]:
    tensors = [t for t in tree_leaves(outputs) if isinstance(t, torch.Tensor)]
    inputs = [t for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
    aliases = [
        [t.data_ptr() - i.data_ptr() for i in inputs if _shares(t, i)] for t in tensors
    ]
    return (
        [t.detach().clone() for t in tensors], aliases, [i.detach().clone() for i in inputs]
    )


def _shares(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _judge(case: Case, mode: str, device: str, expected: list[Any]) -> tuple[str, str]:
    settings = SETTINGS | {"force_disable_caches": not case.caches}
    with (
        torch.set_grad_enabled(case.grad),
        tempfile.TemporaryDirectory() as cache,
        torch._inductor.config.patch(settings),
        torch._inductor.utils.fresh_cache(dir=cache),
    ):
        try:
            function = _prepared(case, mode)
            for number, args in enumerate(case.calls):
                outputs = function(*args)
                later = _synchronise(device)
                if later:
                    return LATER_ERROR, later
                if not expected:
                    continue
                wrong = _difference(_observed(outputs, args), expected[number])
                if wrong:
                    return WRONG, f"call {number + 1}: {wrong}"
        except Exception as error:
            return _outcome_of(error), _one_line(error)
    return RIGHT, ""


def _prepared(case: Case, mode: str) -> Any:
    if case.prepare is not None:
        return case.prepare(case.function, mode)
    return compiled(case.function, mode, dynamic=case.dynamic)


def _synchronise(device: str) -> str:
    if device == "cuda":
        try:
            torch.cuda.synchronize()
        except Exception as error:
            return _one_line(error)
    return recording.pending[0] if recording.pending else ""


def _difference(observed: Any, expected: Any) -> str:
    outputs, aliases, inputs = observed
    want_outputs, want_aliases, want_inputs = expected
    if len(outputs) != len(want_outputs):
        return f"{len(outputs)} outputs instead of {len(want_outputs)}"
    for name, got, want in (("output", outputs, want_outputs), ("input", inputs, want_inputs)):
        for i, (g, w) in enumerate(zip(got, want, strict=True)):
            if not _bit_equal(g, w):
                return f"{name} {i} differs by {_largest(g, w):.3g}"
    if aliases != want_aliases:
        return "an output no longer aliases the input that it is a view of"
    return ""


def _bit_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    one, other = (t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
    return torch.equal(one, other)


def _largest(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one.double() - other.double()).abs().max().item()


def _outcome_of(error: Exception) -> str:
    """Whether Dynamo refused the program, before any backend saw it, or something later did."""
    from torch._dynamo import exc

    traced = (exc.TorchRuntimeError, exc.Unsupported, exc.UserError)
    return REFUSED if isinstance(error, traced) else CALL_ERROR


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # A backend's failure names the backend first and the cause second.
    text = " ".join(lines[:2]) if lines and lines[0].startswith("backend=") else "".join(lines[:1])
    return f"{type(error).__name__}: {text}"[:300]
