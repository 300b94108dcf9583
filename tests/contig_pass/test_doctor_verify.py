"""``contig-pass doctor --verify``: contracts against this CPU, right ones and wrong ones."""

from __future__ import annotations

import os
import time

import pytest
import torch

from contig_pass.contracts.judging import judge
from contig_pass.contracts.registry import REGISTRY, Contract
from contig_pass.contracts.rules import AlignedPointer, ColumnMajor, RowMajor
from contig_pass.contracts.target import Target
from contig_pass.doctor import processes, programs
from contig_pass.doctor import verify as verifying
from contig_pass.doctor.catalogue import catalogue
from contig_pass.doctor.errors import DoctorError
from contig_pass.doctor.layouts import Lie, dense_like, lies, plant
from contig_pass.doctor.planning import _dense_trial
from contig_pass.doctor.programs import Program
from contig_pass.doctor.stricter import STRICTER, stricter
from contig_pass.doctor.verify import AGREES, DISAGREES, verify
from contig_pass.layout import Layout

_FLASH = "aten::_scaled_dot_product_flash_attention_for_cpu.default"


def _program(call, **more) -> Program:
    """A program of ``aten::mm`` that does ``call`` before it hands over its arguments."""

    def build(device, sizes):
        call()
        torch.manual_seed(0)
        return {"self": torch.randn(8, 16), "mat2": torch.randn(16, 4)}

    return Program("aten::mm.default", "plain", build, kinds=("cpu",), tolerance=1e-5, **more)


# -- the real contracts --------------------------------------------------------------------------


def test_every_contract_of_this_cpu_agrees() -> None:
    started = time.monotonic()
    found = verify("cpu", jobs=2, timeout=200)
    assert time.monotonic() - started < 400
    assert [row for row in found.rows if row.agrees == DISAGREES] == []
    tried = {(row.op, row.operand.split("[")[0]) for row in found.rows if row.broken}
    scaled = ("_scaled_mm.default", "_scaled_mm.out", "_scaled_mm_v2.default", "_scaled_mm_v2.out")
    if torch.__version__ < "2.12":  # whose CPU has no rows of scales, and no second form
        scaled = scaled[:1]
    assert found.count(AGREES) > 20 + 10 * len(scaled)
    for name in scaled:
        assert {(f"aten::{name}", "self"), (f"aten::{name}", "mat2")} <= tried
    assert {(_FLASH, name) for name in ("query", "key", "value")} <= tried
    # Inductor refuses the other order, which the kernels take.
    swapped = [r for r in found.rows if r.layout == "inner two dimensions swapped"]
    # Before 2.13 it has no lowering for the second form, and so no check.
    checked = "aten::_scaled_mm." if torch.__version__ < "2.13" else "aten::_scaled_mm"
    refused = [r for r in swapped if r.op.startswith(checked)]
    assert {(r.outcome, r.compiled) for r in refused} == {("right value", "refused by Inductor")}
    # Every contract is either tried or listed with the reason.
    idle = {(i.op, i.operand, i.when) for i in found.idle}
    for contract in REGISTRY.contracts():
        known = (contract.op, contract.operand, contract.when.text)
        assert known in idle or (contract.op, contract.operand) in tried
    assert ("triton kernel", "pointer", "always") in idle
    assert all(i.reason for i in found.idle)


def test_a_contract_that_asks_too_much_disagrees() -> None:
    with REGISTRY.scope() as registry:
        wrong = Contract(_FLASH, "key", (AlignedPointer(16),), "made up", family="made up")
        registry.remove(_FLASH, "key")
        registry.add(wrong)
        found = verify("cpu", only="for_cpu", timeout=120)
    against = [row for row in found.rows if row.agrees == DISAGREES]
    # Off by 4 and 8 bytes is forbidden and right; strided is allowed and wrong, before 2.14.
    expected = {
        ("key", "pointer off by 4 B", "right value"),
        ("key", "pointer off by 8 B", "right value"),
    }
    if torch.__version__ < "2.14":
        strided = ("inner stride 2", "inner two dimensions swapped")
        expected |= {("key", layout, "wrong value") for layout in strided}
    assert {(r.operand, r.layout, r.outcome) for r in against} == expected
    forbidden = next(r for r in against if r.layout == "pointer off by 4 B")
    assert (forbidden.broken, forbidden.source) == (("pointer aligned to 16 bytes",), "made up")
    assert forbidden.compiled == "right value"


def test_a_contract_that_forbids_the_dense_layout_disagrees() -> None:
    with REGISTRY.scope() as registry:
        registry.add(Contract("aten::mm.default", "self", (ColumnMajor(),), "made up"))
        found = verify("cpu", programs=[_program(lambda: None)], timeout=120)
    dense = found.rows[0]
    assert (dense.operand, dense.layout) == ("(all)", "dense, aligned")
    assert dense.outcome == "right value"
    assert (dense.broken, dense.agrees) == (("column-major",), DISAGREES)


# -- cases that end badly ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "outcome", "message"),
    [
        (lambda: os._exit(3), "crash", "exit code 3"),
        (lambda: os.kill(os.getpid(), 11), "crash", "killed by SIGSEGV"),
        (lambda: time.sleep(60), "timeout", "did not end in time"),
        (lambda: 1 / 0, "failed", "ZeroDivisionError"),
    ],
)
def test_a_case_that_ends_badly_is_a_row(
    action, outcome: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def observe(program, trial, device, compiling):
        return action()

    monkeypatch.setattr(verifying, "observe", observe)
    with REGISTRY.scope() as registry:
        registry.add(Contract("aten::mm.default", "self", (RowMajor(),), "made up"))
        found = verify(
            "cpu", programs=[_program(lambda: None)], jobs=20,
            timeout=3 if outcome == "timeout" else 60,
        )
    assert {(row.outcome, message in row.message) for row in found.rows} == {(outcome, True)}
    agrees = {row.agrees for row in found.rows if row.broken}
    # A crash is what an illegal layout may end in; the others settle nothing.
    assert agrees == ({AGREES} if outcome == "crash" else {DISAGREES})
    assert {row.agrees for row in found.rows if not row.broken} == {DISAGREES}


def test_a_program_that_does_not_run_leaves_its_contracts_untried() -> None:
    def broken() -> None:
        raise RuntimeError("no such unit")

    with REGISTRY.scope() as registry:
        registry.add(Contract("aten::mm.default", "self", (RowMajor(),), "made up"))
        registry.add(Contract("aten::bmm.default", "self", (RowMajor(),), "made up"))
        found = verify("cpu", programs=[_program(broken)], timeout=60)
    assert found.rows == ()
    why = {(i.op, i.operand): i.reason for i in found.idle}
    assert "plain: RuntimeError: no such unit" in why["aten::mm.default", "self"]
    assert why["aten::bmm.default", "self"] == "the doctor knows no call of this op"


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(DoctorError, match="--only 'flsh': no program's name contains it"):
        verify("cpu", only="flsh")


def test_a_used_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(DoctorError, match="this process has used a GPU already"):
        processes.run_one(lambda: 1, 10)


def test_processes_keep_their_order_and_their_limit() -> None:
    running = [lambda n=n: time.sleep(0.2 * (3 - n)) or n for n in range(4)]
    order: list[int] = []
    ends = processes.run_all(
        running, jobs=4, timeout=60, ended=lambda number, end: order.append(number)
    )
    assert [end.value for end in ends] == [0, 1, 2, 3]
    assert sorted(order) == [0, 1, 2, 3]
    assert order[-1] == 0


# -- layouts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(24, 32), (2, 3, 24, 32), (48,), (24, 1)])
@pytest.mark.parametrize("turned", [False, True])
def test_planted_values_lie_as_they_should(
    dtype: torch.dtype, shape: tuple[int, ...], turned: bool
) -> None:
    value = torch.randn(shape).to(dtype)
    if turned and value.dim() > 1:
        value = value.transpose(-1, -2).contiguous().transpose(-1, -2)
    rules = (AlignedPointer(16),)
    tried = list(lies(value, rules))
    assert len({lie.words for lie in tried}) == len(tried)
    for lie in tried:
        planted = plant(value, lie)
        layout = Layout.of(planted)
        assert planted.stride() == lie.strides
        assert layout.byte_offset % 512 == lie.offset
        assert judge(rules, layout) == judge(rules, lie.layout(value))
        copy = dense_like(planted, value)
        assert copy.stride() == value.stride()
        assert torch.equal(copy.float(), planted.float())
        if not layout.overlaps():
            assert torch.equal(planted.float(), value.float())


def test_what_lies_between_the_elements_is_zero() -> None:
    value = torch.ones(4, 32)
    planted = plant(value, Lie("wide", (40, 1)))
    assert planted.as_strided((4, 40), (40, 1))[:3, 32:].abs().sum() == 0


# -- what a GPU is going to be asked, as far as it can be checked without one --------------------


def test_every_program_is_legal_as_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "judged_by", lambda device: Target("cuda", (9, 0)))
    bound = set()
    for program in catalogue():
        if "cuda" not in program.kinds:
            continue
        # Attention's forward ops, which the backward ones need, run on meta tensors alone here.
        device = torch.device("meta" if "dot_product" in program.op else "cpu")
        given = program.arguments(device, {})
        call = program.call(given, {})
        chosen = REGISTRY.for_call(call)
        assert chosen, program.name
        assert _dense_trial(call, chosen).broken == (), program.name
        if program.expected is not None and device.type == "cpu":
            assert torch.isfinite(program.expected(given)).all(), program.name
        bound |= {
            (c.op, c.operand, c.when.text) for c in REGISTRY.contracts()
            if c.op == program.op and c.when.holds(call)
        }
    cuda = {
        (c.op, c.operand, c.when.text) for c in REGISTRY.contracts() if "CUDA" in c.when.text
    }
    # Forms with out= are called with two recipes alone.
    assert {name for name in cuda - bound if not name[0].endswith(".out")} == set()


def test_every_excuse_is_of_a_standing_contract() -> None:
    for entry in STRICTER:
        fitting = [
            rule
            for contract in REGISTRY.contracts()
            if stricter(
                entry.device, contract.op, contract.operand, entry.layouts[0],
                tuple(r.describe() for r in contract.rules if r.describe().startswith(entry.rule)),
            )
            for rule in contract.rules if rule.describe().startswith(entry.rule)
        ]
        assert fitting, entry


def test_an_excuse_covers_no_other_rule() -> None:
    pitch, pointer = ("pitch aligned to 16 bytes",), ("pointer aligned to 16 bytes",)
    op = "aten::_scaled_mm.default"
    assert stricter("cuda", op, "self", "pitch 4 B longer", pitch)
    assert not stricter("cuda", op, "self", "pointer off by 4 B", pointer)
    assert not stricter("cuda", op, "self", "inner stride 2", (*pitch, "row-major"))
    assert not stricter("cpu", op, "self", "pitch 4 B longer", pitch)
    assert not stricter("cuda", op, "self", "dense, aligned", ())
