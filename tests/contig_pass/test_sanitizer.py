"""The sanitizer: what it says, what its modes do, what it finds out about custom ops."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F

from contig_pass import AlignedPointer, register_contract
from contig_pass.contracts import REGISTRY
from contig_pass.errors import ContractError, LayoutViolation, OptionError
from contig_pass.sanitizer import sanitize
from contig_pass.sanitizer.findings import FAKE, LAYOUT, WRITE
from tests.kernels import bad, contracts, received, rows
from tests.sanitizing import define, line_of, off, only, ops

E4M3 = torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def _contracts() -> Iterator[None]:
    with contracts():
        yield


def scaled_mm(bias: torch.Tensor) -> torch.Tensor:
    a, w, one = torch.ones(32, 64).to(E4M3), torch.ones(48, 64).to(E4M3), torch.ones(())
    return torch._scaled_mm(a, w.t(), one, one, bias, out_dtype=torch.bfloat16)  # product


# -- what it says --------------------------------------------------------------------------------


def test_a_misaligned_bias_is_one_exact_sentence() -> None:
    buffer = torch.arange(97.0).bfloat16()
    with sanitize() as sanitizer:
        bias = buffer[49:]  # bias made
        with pytest.raises(LayoutViolation) as caught:
            scaled_mm(bias.detach().view(1, 48)[0])
    finding = only(sanitizer)
    assert (finding.kind, finding.op, finding.operand) == (LAYOUT, "aten::_scaled_mm", "bias")
    assert finding.rules == ("pointer aligned to 16 bytes",)
    assert (finding.line.file, finding.line.lineno) == (__file__, line_of(__file__, "product"))
    assert (finding.made.file, finding.made.lineno) == (__file__, line_of(__file__, "bias made"))
    assert finding.maker == "aten::slice"
    address = buffer.data_ptr() + 98
    text = str(caught.value)
    assert text == str(finding)
    assert "\n" not in text
    for part in (
        "not pointer aligned to 16 bytes", "bfloat16[48] strides (1)", f"{address:#x} (2 mod 16)",
        "byte 98 of its storage", "bias.clone(memory_format=torch.contiguous_format)",
    ):
        assert part in text


def test_the_kernel_is_not_launched() -> None:
    received.clear()
    with pytest.raises(LayoutViolation), sanitize():
        rows(off(4, 8))
    assert not received
    rows(off(4, 8))
    assert len(received) == 1


def test_the_remedy_it_names_is_one() -> None:
    weight = torch.ones(64, 48).to(E4M3)
    a, one = torch.ones(32, 64).to(E4M3), torch.ones(())
    with sanitize("warn") as sanitizer:
        torch._scaled_mm(a, weight, one, one, out_dtype=torch.bfloat16)
    expression = only(sanitizer).remedy.removeprefix("pass a fresh copy: ")
    copy = eval(expression, {"mat2": weight, "torch": torch})
    with sanitize():
        torch._scaled_mm(a, copy, one, one, out_dtype=torch.bfloat16)


def test_the_view_to_blame_is_the_one_that_broke_the_rule() -> None:
    with sanitize("warn") as sanitizer:
        parts = torch.randn(2, 8, 97)[..., 1:]  # first
        q = parts.chunk(3, -1)[0].unflatten(-1, (2, 16)).transpose(1, 2)
        F.scaled_dot_product_attention(q, torch.randn(2, 2, 8, 16), torch.randn(2, 2, 8, 16))
    finding = only(sanitizer)
    assert finding.operand == "query"
    assert finding.made.lineno == line_of(__file__, "first")


def test_a_view_made_outside_has_no_maker() -> None:
    x = off(4, 8)
    with sanitize("warn") as sanitizer:
        rows(x.view(8, 4).view(4, 8))
    assert only(sanitizer).maker == ""
    assert "made it so" not in str(only(sanitizer))


def test_memory_that_was_given_away_tells_no_tales() -> None:
    with sanitize("warn") as sanitizer:
        storage = torch.randn(64)
        views = sanitizer._checker.views
        view = storage[1:33].view(4, 8)
        assert next(views.chain(view)).op._schema.name == "aten::view"
        strange = torch.randn(64)
        assert not list(views.chain(strange[:32].view(4, 8).detach().clone()))
        reference = torch.multiprocessing.reductions.StorageWeakRef(storage.untyped_storage())
        del storage, view
        gc.collect()
        assert reference.expired()
        for _ in range(3000):
            torch.randn(4)[1:]
        assert len(views._of_storage) <= 1100


def test_a_window_that_slides_is_remembered_within_bounds() -> None:
    flat = torch.randn(2000)
    with sanitize() as sanitizer:
        for start in range(1900):
            flat[start : start + 4]
        view = flat
        for _ in range(100):
            view = view[1:]
    ((_, records),) = sanitizer._checker.views._of_storage.values()
    assert len(records) <= 256
    assert len(list(sanitizer._checker.views.chain(view))) <= 32


def test_modules_are_named() -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return rows(x)

    model = torch.nn.Sequential(Layer(), torch.nn.Sequential(Layer(), Layer()))
    with sanitize("warn") as sanitizer:
        model[1](off(4, 8))
        model(off(4, 8))
    assert [finding.module for finding in sanitizer.findings] == ["0"]  # the rest is fresh memory
    with sanitize("warn") as sanitizer:
        model[1][1](off(4, 8))
    assert only(sanitizer).module == "Layer"


# -- modes ---------------------------------------------------------------------------------------


@pytest.fixture
def told() -> Iterator[list[str]]:
    """What the logger of the package was told."""
    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler, logger = Keep(logging.WARNING), logging.getLogger("contig_pass")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


def test_warn_tells_once_for_a_line_and_operand(told: list[str]) -> None:
    with sanitize("warn") as sanitizer:
        for _ in range(3):
            out = rows(off(4, 8))
        rows(off(4, 8))
    assert out.shape == (4, 8)
    assert told == [str(finding) for finding in sanitizer.findings]
    assert len(told) == 2


def test_fix_runs_the_op_on_a_copy() -> None:
    x = torch.randn(8, 8).t()
    received.clear()
    with sanitize("fix") as sanitizer:
        out = rows(x)
    assert torch.equal(out, (x * 2).float())
    assert received
    assert not bad()
    assert only(sanitizer).operand == "x"


def test_fix_puts_back_what_the_op_writes() -> None:
    register_contract(ops.swap, "x", [AlignedPointer(16)])
    register_contract(ops.double, "x", [AlignedPointer(16)])
    x, y = off(4), torch.randn(4)
    before = x.clone(), y.clone()
    with sanitize("fix"):
        ops.swap(x, y)
        assert torch.equal(x, before[1])
        assert torch.equal(y, before[0])
        versions = x._version, y._version
        out = ops.double(x)
        ops.double(y)
    assert torch.equal(x, before[1] * 2)
    assert out.data_ptr() == x.data_ptr()
    assert x._version - versions[0] == y._version - versions[1]


def test_fix_refuses_what_a_copy_would_lose() -> None:
    register_contract(ops.swap, "x", [AlignedPointer(16)])
    register_contract(ops.whole, "x", [AlignedPointer(16)])
    flat = torch.randn(9)
    with sanitize("fix"):
        with pytest.raises(LayoutViolation, match="shares with y"):
            ops.swap(flat[1:5], flat[2:6])
        ops.swap(flat[1:5], flat[5:])  # side by side
        with pytest.raises(LayoutViolation, match="result shares"):
            ops.whole(flat[1:])


def test_fix_raises_where_no_copy_helps() -> None:
    a, w, one = torch.ones(32, 72).to(E4M3), torch.ones(48, 72).to(E4M3), torch.ones(())
    with sanitize("fix"), pytest.raises(LayoutViolation, match="a multiple of 16"):
        torch._scaled_mm(a, w.t(), one, one, out_dtype=torch.bfloat16)


def test_bad_options() -> None:
    for options in ({"mode": "shout"}, {"target": "gpu"}, {"audit_bytes": -1}):
        with pytest.raises(OptionError, match="use"):
            sanitize(**options)


def test_the_target_decides() -> None:
    bias = torch.ones(49).bfloat16()[1:]
    with sanitize(target="cpu"):
        scaled_mm(bias)
    with sanitize(target="sm90"), pytest.raises(LayoutViolation):
        scaled_mm(bias)


def test_contracts_registered_inside_count() -> None:
    x = off(4, 8)
    with sanitize() as sanitizer:
        ops.faithful(x)
        with REGISTRY.scope():
            register_contract(ops.faithful, "x", [AlignedPointer(16)])
            with pytest.raises(LayoutViolation):
                ops.faithful(x)
        ops.faithful(x)
        with pytest.raises(ContractError):
            register_contract(ops.faithful, "z", [AlignedPointer(16)])
    assert len(sanitizer.findings) == 1


def test_the_same_shape_elsewhere_is_judged_anew() -> None:
    flat = torch.randn(64)
    with sanitize() as sanitizer:
        for _ in range(3):
            rows(flat[:32].view(4, 8))
        with pytest.raises(LayoutViolation):
            rows(flat[1:33].view(4, 8))
    assert len(sanitizer.findings) == 1


# -- custom ops ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "what"),
    [("turned", "strides (4, 1), and it is (1, 3)"), ("shifted", "storage offset 0, and it is 1"),
     ("narrowed", "dtype torch.float32, and it is torch.float16"),
     ("fewer", "2 tensors, and there are 1")],
)
def test_a_kernel_that_returns_another_layout_than_its_fake_says(op: str, what: str) -> None:
    with pytest.raises(LayoutViolation) as caught, sanitize() as sanitizer:
        getattr(ops, op)(torch.randn(3, 4))  # dishonest
    finding = only(sanitizer)
    assert (finding.kind, finding.operand) == (FAKE, "result")
    assert finding.line.lineno == line_of(__file__, "dishonest")
    assert what in str(caught.value)


def test_honest_ops_and_ops_without_a_fake_pass() -> None:
    with sanitize(audit_every=True) as sanitizer:
        for x in (torch.randn(3, 4), torch.randn(4, 3).t(), torch.randn(3, 1), torch.empty(0, 4)):
            ops.faithful(x)
            ops.fakeless(x)
            ops.turned(x.reshape(1, -1))  # a size-1 dimension's stride is no difference
    assert not sanitizer.findings


def test_an_operand_written_without_being_declared() -> None:
    with pytest.raises(LayoutViolation) as caught, sanitize() as sanitizer:
        ops.sneaky(torch.zeros(4), torch.zeros(4))
    assert (only(sanitizer).kind, only(sanitizer).operand) == (WRITE, "y")
    assert "the op's schema does not say so" in str(caught.value)
    assert "mutates_args={'y'}" in str(caught.value)


def test_what_the_audit_leaves_out() -> None:
    x, y = torch.zeros(400), torch.zeros(400)
    with sanitize(audit_bytes=1599):
        ops.sneaky(x, y)
    with sanitize(audit_bytes=0):
        ops.sneaky(torch.zeros(4), torch.zeros(4))
        ops.turned(torch.randn(3, 4))
    with sanitize(audit_bytes=1600), pytest.raises(LayoutViolation):
        ops.sneaky(x, y)
    with sanitize():  # declared
        ops.swap(x, y)
        ops.double(x)


def test_one_audit_for_each_way_in_which_operands_lie() -> None:
    runs = []
    define("counted(Tensor x) -> Tensor", lambda x: x * 2,
            lambda x: runs.append(x.shape) or torch.empty_like(x))
    x = torch.randn(8)
    with sanitize():
        for shape in ((2, 4), (4, 2), (2, 4)):
            ops.counted(x.view(shape))
    assert len(runs) == 2
    with sanitize(audit_every=True):
        ops.counted(x)
        ops.counted(x)
    assert len(runs) == 4
