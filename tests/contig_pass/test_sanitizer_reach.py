"""Where the sanitizer looks: attention, autograd, threads, subclasses, kernels, whole models."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from contig_pass import AlignedPointer, UnitStrideLast, register_contract
from contig_pass.contracts import REGISTRY
from contig_pass.contracts.target import parse_target
from contig_pass.errors import LayoutViolation
from contig_pass.sanitizer import sanitize
from contig_pass.sanitizer.calls import EagerCall
from contig_pass.sanitizer.findings import SLOW
from contig_pass.sanitizer.operands import offences
from tests.kernels import contracts, rows
from tests.sanitizing import define, line_of, off, only, ops, strided


@pytest.fixture(autouse=True)
def _contracts() -> Iterator[None]:
    with contracts():
        yield


# -- attention -----------------------------------------------------------------------------------


class _Kernels(TorchDispatchMode):
    """Names of the ops that reach a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("position", [0, 1, 2])
def test_slow_attention_names_the_operand(position: int) -> None:
    given = [torch.randn(1, 2, 8, 16) for _ in range(3)]
    given[position] = strided(1, 2, 8, 16)
    with sanitize("warn", target="cpu") as sanitizer:
        expected = F.scaled_dot_product_attention(*given)  # slow
    finding = only(sanitizer)
    name = ("query", "key", "value")[position]
    assert (finding.kind, finding.operand) == (SLOW, name)
    assert finding.line.lineno == line_of(__file__, "slow")
    assert "slow math path" in str(finding)
    with _Kernels() as kernels, sanitize("fix", target="cpu"):
        torch.testing.assert_close(F.scaled_dot_product_attention(*given), expected)
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in kernels.names
    with sanitize(target="cpu"), pytest.raises(LayoutViolation, match=name):
        F.scaled_dot_product_attention(*given)


def test_two_operands_to_blame() -> None:
    q, k, v = strided(1, 2, 8, 16), strided(1, 2, 8, 16), torch.randn(1, 2, 8, 16)
    with sanitize("warn", target="cpu") as sanitizer:
        F.scaled_dot_product_attention(q, k, value=v, is_causal=True)
    assert [finding.operand for finding in sanitizer.findings] == ["query", "key"]


def test_attention_that_is_slow_for_another_reason_passes() -> None:
    q = torch.randn(1, 2, 8, 16)
    with sanitize():
        F.scaled_dot_product_attention(q, q, q, dropout_p=0.5)
        with sdpa_kernel(SDPBackend.MATH):
            F.scaled_dot_product_attention(strided(1, 2, 8, 16), q, q)


def test_a_call_that_no_allowed_kernel_takes_is_explained() -> None:
    q = torch.randn(1, 2, 8, 16)
    with sanitize(target="cpu"), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        F.scaled_dot_product_attention(q, q, q)
        with pytest.raises(LayoutViolation, match="query"):
            F.scaled_dot_product_attention(strided(1, 2, 8, 16), q, q)


def test_sizes_that_a_gpu_pads_by_itself_pass() -> None:
    q = torch.randn(1, 2, 8, 20).bfloat16()
    with sanitize():
        F.scaled_dot_product_attention(q, q, q)


def test_attention_under_autocast_and_vmap() -> None:
    q = torch.randn(3, 1, 2, 8, 16)
    with sanitize():
        with torch.autocast("cpu", torch.bfloat16):
            F.scaled_dot_product_attention(strided(1, 2, 8, 16), q[0], q[0])
        torch.func.vmap(F.scaled_dot_product_attention)(q, q, q)


def test_the_backends_own_op_is_checked() -> None:
    q = torch.randn(1, 2, 8, 16)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    with sanitize(), pytest.raises(LayoutViolation, match="for_cpu key"):
        flash(q, strided(1, 2, 8, 16), q)
    with sanitize(), torch.inference_mode(), pytest.raises(LayoutViolation):
        F.scaled_dot_product_attention(q, strided(1, 2, 8, 16), q)


def test_attention_composed_in_inference_mode_is_taken_apart() -> None:
    q = torch.randn(1, 2, 8, 16)
    op = "aten::_scaled_dot_product_flash_attention_for_cpu.default"
    REGISTRY.remove(op, "query")
    register_contract(op, "query", [AlignedPointer(64)])
    with sanitize(target="cpu"), torch.inference_mode(), pytest.raises(
        LayoutViolation, match="for_cpu query"
    ):
        F.scaled_dot_product_attention(off(1, 2, 8, 16, by=4), q, q)


def test_gradients_that_flash_attention_copies_by_itself_pass() -> None:
    op = torch.ops.aten._scaled_dot_product_flash_attention_backward.default
    dense, state = torch.randn(1, 2, 8, 16).bfloat16(), torch.zeros(2)

    def wrong(gradient: torch.Tensor) -> list[str]:
        given = (gradient, dense, dense, dense, dense, *[state] * 3, 8, 8, 0.0, False, state, state)
        return [o.tensor.name for o in offences(EagerCall(op, given, {}), parse_target("sm90"))]

    assert wrong(torch.ones(()).bfloat16().expand(1, 2, 8, 16)) == []
    misaligned = off(1, 8, 2, 16).bfloat16()
    flat = torch.randn(257).bfloat16()[1:]
    assert wrong(misaligned.transpose(1, 2)) == []
    assert wrong(flat.view(1, 8, 2, 16).transpose(1, 2)) == ["grad_out"]
    assert wrong(flat.view(1, 2, 8, 16)) == []


# -- where it looks ------------------------------------------------------------------------------


def test_no_grad_and_inference_mode() -> None:
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), sanitize(), pytest.raises(LayoutViolation, match="aten::slice"):
            rows(torch.randn(33)[1:].view(4, 8))
        with sanitize(), mode(), pytest.raises(LayoutViolation):
            rows(off(4, 8))


def test_backward_is_checked_at_the_line_that_runs_it() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
            return rows(grad)  # backward

    x = torch.randn(8, 4, requires_grad=True)
    with sanitize("warn") as sanitizer:
        Double.apply(x).t().contiguous().sum().backward()
        gradient = x.grad.clone()
    finding = only(sanitizer)
    assert finding.line.lineno == line_of(__file__, "backward")
    assert torch.equal(gradient, torch.full((8, 4), 2.0))


def test_training_is_left_as_it_is() -> None:
    def losses(active: bool) -> list[float]:
        torch.manual_seed(0)
        layers = [torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 4)]
        model = torch.nn.Sequential(*layers)
        optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
        found = []
        for _ in range(3):
            loss = model(torch.randn(8, 16)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    plain = losses(False)
    with sanitize():
        assert losses(True) == plain


class _Wrapped(torch.Tensor):
    """A subclass that holds a tensor and unwraps it for every op."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> _Wrapped:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        plain = [arg.inner if isinstance(arg, cls) else arg for arg in args]
        return func(*plain, **(kwargs or {}))


def test_subclasses_are_looked_into() -> None:
    with sanitize():
        rows(_Wrapped(torch.randn(4, 8)))
        with pytest.raises(LayoutViolation):
            rows(_Wrapped(off(4, 8)))
        rows(torch.nn.Parameter(torch.randn(4, 8)))
        with pytest.raises(LayoutViolation):
            rows(torch.nn.Parameter(off(4, 8)))


def test_kernels_of_custom_ops_are_looked_into() -> None:
    def outer(x: torch.Tensor) -> torch.Tensor:
        return rows(x[1:].view(4, 8)) + 1  # in the kernel

    define("outer(Tensor x) -> Tensor", outer, lambda x: x.new_empty(4, 8))
    x = torch.randn(33)
    with sanitize() as sanitizer, pytest.raises(LayoutViolation):
        ops.outer(x)
    assert only(sanitizer).line.lineno == line_of(__file__, "in the kernel")
    with sanitize("fix"):
        out = ops.outer(x)
    assert torch.equal(out, x[1:].view(4, 8) * 2 + 1)
    with sanitize(), _Kernels() as kernels, pytest.raises(LayoutViolation):
        ops.outer(x)
    assert "sanitizer_tests::outer" in kernels.names


def test_threads_started_inside_are_followed_until_the_end() -> None:
    caught = []

    def work() -> None:
        try:
            rows(off(4, 8))
        except LayoutViolation as error:
            caught.append(error)

    before = threading.getprofile()
    with ThreadPoolExecutor(1) as pool:
        with sanitize() as sanitizer:
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
            pool.submit(work).result()
            assert len(caught) == 2
        pool.submit(work).result()  # the thread lives on, the sanitizer does not
        assert len(caught) == 2
    assert threading.getprofile() is before
    assert len(sanitizer.findings) == 1


def test_what_would_be_compiled_runs_eagerly() -> None:
    compiled = torch.compile(lambda x: rows(x[1:].view(4, 8)), backend="eager", fullgraph=True)
    with sanitize(), pytest.raises(LayoutViolation):
        compiled(torch.randn(33))
    assert compiled(torch.randn(33)).shape == (4, 8)


def test_branches_and_loops_are_looked_into() -> None:
    def inside(x: torch.Tensor) -> torch.Tensor:
        return rows(x[1:].view(4, 8)).flatten()

    x = torch.randn(33)
    with sanitize("warn") as sanitizer:
        torch.cond(x.sum() > 1e9, lambda x: x[1:] * 1, inside, (x,))
    assert only(sanitizer).maker == "aten::slice"


def test_memoryless_tensors_pass() -> None:
    with sanitize():
        assert rows(torch.empty(33, device="meta")[1:].view(4, 8)).is_meta
        program = torch.export.export(_Export(), (torch.randn(33),))
        nested = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)])
        assert torch.nested.to_padded_tensor(nested, 0.0).shape == (2, 4, 3)
        assert torch.randn(3, 3).to_sparse().t().to_dense().shape == (3, 3)
        with pytest.raises(LayoutViolation):
            program.module()(torch.randn(33))


class _Export(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rows(x[1:].view(4, 8))


def test_one_inside_another_and_as_a_decorator() -> None:
    outer, inner = sanitize("warn"), sanitize()
    with outer, pytest.raises(LayoutViolation), inner:
        rows(off(4, 8))
    with outer, outer:
        rows(off(4, 8))
    assert len(inner.findings) == 1 == len(outer.findings)

    @sanitize("fix")
    def work() -> torch.Tensor:
        return rows(off(4, 8))

    assert work().shape == (4, 8)
    rows(off(4, 8))


def test_an_operand_that_is_never_read_may_lie_anywhere() -> None:
    register_contract(ops.faithful, "x", [UnitStrideLast(), AlignedPointer(64)])
    with sanitize():
        ops.faithful(torch.randn(9)[1:].view(2, 4)[:0])


# -- clean models --------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", [None, "fp8_e4m3fn_scaled", "fp8_e5m2_scaled"])
def test_clean_models_raise_nothing_and_change_nothing(quantization: str | None) -> None:
    from wan_models import zoo
    from wan_models.inputs import model_inputs

    torch.manual_seed(0)
    variant = zoo.variant("i2v-14b", "tiny")
    model = zoo.build("i2v-14b", "tiny", quantization)
    inputs = model_inputs(variant.config, (5, 4, 7), dtype=torch.bfloat16, addons=variant.addons)
    expected = model(*inputs)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), sanitize(audit_every=True) as sanitizer:
            assert torch.equal(model(*inputs), expected)
        assert not sanitizer.findings


def test_the_demo_s_planted_faults_are_found() -> None:
    from wan_models.demo import FAULTS, faulty_block

    block, inputs = faulty_block()
    with torch.no_grad(), sanitize("warn") as sanitizer:
        block(*inputs)
    assert {finding.module for finding in sanitizer.findings} == set(FAULTS)
    assert all(f.made.file.endswith("slab.py") for f in sanitizer.findings)
