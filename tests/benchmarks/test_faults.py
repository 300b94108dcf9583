"""The fault table: its emulated kernels against the measured rows, its verdicts, its exit code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch

from benchmarks.faults import worker
from benchmarks.faults.catalogue import catalogue
from benchmarks.faults.command import acceptable
from benchmarks.faults.program import Case, Program
from benchmarks.faults.reference import DenseOperands
from benchmarks.faults.worker import Result, run_program
from contig_pass.contracts import REGISTRY

PROGRAMS = {(p.group, p.name): p for p in catalogue()}
TENSOR, ROW = "_scaled_mm, tensor-wise", "_scaled_mm, row-wise"


def test_names_are_unique_and_the_catalogue_is_large() -> None:
    assert len(PROGRAMS) == sum(1 for _ in catalogue()) >= 300
    assert all(p.illegal is False for p in PROGRAMS.values() if p.group in (TENSOR, ROW))


#: What eager mode does with the real kernel on an H100, for rows of every kind.
MEASURED = {
    (TENSOR, "a off 1 B, input"): worker.CALL_ERROR,
    (TENSOR, "b off 8 B, view"): worker.CALL_ERROR,
    (TENSOR, "a off 16 B, input"): worker.RIGHT,
    (TENSOR, "a pitch K+1, input"): worker.CALL_ERROR,
    (TENSOR, "a pitch K+16, view"): worker.RIGHT,
    (TENSOR, "a column-major, input"): worker.CALL_ERROR,
    (TENSOR, "b row-major, view"): worker.CALL_ERROR,
    (TENSOR, "bias off 1 elements, input"): worker.CALL_ERROR,
    (TENSOR, "bias strided, view"): worker.WRONG,
    (ROW, "a pitch K+4, input"): worker.CALL_ERROR,
    (ROW, "scale_b off 1 element, input"): worker.CALL_ERROR,
    ("attention, flash", "q, k, v base off 2 B, views"): worker.LATER_ERROR,
    ("attention, cudnn", "q, k, v base off 2 B, inputs"): worker.WRONG,
    ("attention, efficient", "q, k, v pitch odd in elements, views"): worker.CALL_ERROR,
    ("attention, flash", "q, k, v pitch padded by 16 B, inputs"): worker.RIGHT,
}


@pytest.mark.parametrize("key", MEASURED, ids=lambda key: f"{key[0]}: {key[1]}")
def test_emulated_kernels_do_what_was_measured(key: tuple[str, str]) -> None:
    result = run_program(PROGRAMS[key], worker.EAGER, "cpu")
    assert result.outcome == MEASURED[key], result.message


@pytest.mark.parametrize(
    "key",
    [(TENSOR, "bias strided, view"), ("views", "fp8 weight at an odd byte"),
     ("attention, cudnn", "q, k, v base off 2 B, views"), ("routes", "misaligned input mutated"),
     ("memory placed elsewhere", "fp8 split, second part"),
     ("second calls", "empty inputs between, dynamic"),
     ("tied weights", "two parameters that overlap")],
    ids=lambda key: key[1],
)
def test_contig_safe_is_right(key: tuple[str, str]) -> None:
    result = run_program(PROGRAMS[key], worker.CONTIG_SAFE, "cpu")
    assert (result.outcome, result.message) == (worker.RIGHT, "")
    assert result.received


def test_what_no_layout_repairs_must_raise() -> None:
    program = PROGRAMS["_scaled_mm, shapes", "K not a multiple of 16"]
    result = run_program(program, worker.CONTIG_SAFE, "cpu")
    assert result.outcome in (worker.CALL_ERROR, worker.REFUSED)
    assert acceptable(program, result)


def test_which_outcomes_are_acceptable() -> None:
    program = Program("p", "g", lambda device: None)  # type: ignore[arg-type, return-value]
    illegal = Program("i", "g", program.build, illegal=True)

    def verdicts(program: Program, mode: str) -> Counter[bool]:
        outcomes = (worker.RIGHT, worker.WRONG, worker.CALL_ERROR, worker.LATER_ERROR,
                    worker.REFUSED, worker.TIMEOUT, worker.CRASH)
        return Counter(
            acceptable(program, Result(program.name, "g", mode, outcome)) for outcome in outcomes
        )

    assert verdicts(program, worker.CONTIG_SAFE) == {True: 1, False: 6}
    assert verdicts(illegal, worker.CONTIG_SAFE) == {True: 3, False: 4}
    assert verdicts(program, worker.INDUCTOR) == {True: 7}


def test_a_hook_prepares_every_mode_and_the_reference_needs_none() -> None:
    seen = []

    def prepare(function: Callable[..., object], mode: str) -> Callable[..., object]:
        seen.append(mode)
        return function

    def build(device: str) -> Case:
        return Case(lambda x: x + 1, [(torch.ones(4, device=device),)], prepare=prepare)

    for mode in worker.MODES:
        assert run_program(Program("p", "g", build), mode, "cpu").outcome == worker.RIGHT
    assert seen == list(worker.MODES)


def test_gradients_are_compared() -> None:
    program = PROGRAMS["training", "expanded gradient"]
    assert run_program(program, worker.EAGER, "cpu").outcome == worker.WRONG

    def build(device: str) -> Case:
        leaf = torch.ones(4, device=device, requires_grad=True)
        return Case(lambda x: torch.autograd.grad((x * 2).sum(), [x]), [(leaf,)], grad=True)

    assert run_program(Program("p", "g", build), worker.EAGER, "cpu").outcome == worker.RIGHT


def test_the_reference_gives_ops_aligned_memory_to_write_to() -> None:
    x, flat = torch.arange(64.0), torch.zeros(80)
    with DenseOperands():
        torch.ops.faults.fill(x, flat[1:65])
    assert torch.equal(flat[1:65], x)
    torch.ops.faults.fill(x, flat[1:65])
    assert not torch.equal(flat[1:65], x)


def test_every_program_has_a_reference() -> None:
    with REGISTRY.scope():  # one program registers a contract
        for program in PROGRAMS.values():
            if "cpu" in program.devices and not program.illegal:
                run_program(program, worker.EAGER, "cpu")  # raises where the reference does
