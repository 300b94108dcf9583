"""``prepare``: what is relaid once, what of the run stays behind, and errors."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import contig_pass
from contig_pass import prepare
from contig_pass.errors import ContigPassError, OptionError
from tests import kernels
from tests.contig_pass.prepared_models import (
    Reads,
    X,
    addresses,
    frozen,
    kernel_contracts,  # noqa: F401
    prepared,
    run_prepared,
    shifted,
)

# -- what is relaid ------------------------------------------------------------------------------


def test_a_misaligned_weight_is_relaid_once() -> None:
    model = Reads(lambda m, x: kernels.rows(m.w) * x, w=shifted(16, 32))
    assert model.w.data_ptr() % 16 == 4
    report = prepared(model, X)
    assert model.w.data_ptr() % 64 == 0
    assert model.w.stride() == (32, 1)
    assert model.w.storage_offset() == 0
    (row,) = report.rows
    assert (row.kind, row.copy, row.parameter, row.order) == ("fix", "w", "w", "row")
    assert row.reason == "not pointer aligned to 16 bytes"
    assert (row.op, row.operand) == ("layout_tests::rows.default", "x")
    assert (row.before.strides, row.before.offset, row.before.alignment) == ((32, 1), 4, 4)
    assert (row.after.strides, row.after.offset, row.after.alignment) == ((32, 1), 0, 64)
    assert row.nbytes == 2 * 16 * 32 * 4 == report.totals.nbytes
    assert row.lineno > 0
    assert row.file.endswith("test_prepare.py")
    assert (report.totals.uses, report.totals.clean, report.totals.fixed_uses) == (1, 0, 1)
    assert "not pointer aligned" in " ".join(str(report).split())
    run_prepared(model, X)
    assert addresses()[-1] == model.w.data_ptr()


def test_a_row_major_weight_becomes_column_major() -> None:
    model = Reads(lambda m, x: kernels.columns(m.w) * x, w=torch.randn(16, 32))
    (row,) = prepared(model, X).rows
    assert model.w.stride() == (1, 16)
    assert (row.reason, row.order) == ("not column-major", "column")
    run_prepared(model, X)
    assert addresses()[-1] == model.w.data_ptr()


def test_a_transposed_use_asks_for_the_other_order() -> None:
    model = Reads(lambda m, x: kernels.rows(m.w.t()) * x, w=torch.randn(16, 32))
    (row,) = prepared(model, X).fixes
    assert model.w.stride() == (1, 16)
    assert row.order == "column"
    run_prepared(model, X)
    (seen,) = kernels.received[-1:]
    assert (seen.address, seen.strides) == (model.w.data_ptr(), (16, 1))


def test_a_clean_transposed_use_keeps_the_order() -> None:
    model = Reads(lambda m, x: kernels.columns(m.w.t()) * x, w=shifted(16, 32))
    prepared(model, X)
    assert model.w.stride() == (32, 1)
    assert model.w.data_ptr() % 64 == 0
    run_prepared(model, X)


def test_three_dimensions_take_any_order() -> None:
    model = Reads(lambda m, x: kernels.matrix(m.w.permute(2, 0, 1)) * x, w=torch.randn(4, 8, 16))
    (row,) = prepared(model, X).fixes
    assert model.w.stride()[1] == 1
    assert row.order not in (None, "row")
    run_prepared(model, X)
    assert addresses()[-1] == model.w.data_ptr()


def test_gaps_are_closed_under_dense_only_where_a_rule_asks() -> None:
    wide = torch.randn(16, 40)[:, :32]
    model = Reads(lambda m, x: kernels.rows(m.w) * x, w=wide)
    assert prepared(model, X).clean
    assert model.w.stride() == (40, 1)
    model = Reads(lambda m, x: kernels.block(m.w) * x, w=torch.randn(16, 40)[:, :32])
    prepare(model, X)
    assert model.w.stride() == (32, 1)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.bfloat16,
                                   torch.int8])
def test_types(dtype: torch.dtype) -> None:
    w = torch.randint(1, 100, (16 * 32 + 1,), dtype=torch.int16).to(torch.uint8)
    w = w.view(dtype) if dtype.itemsize == 1 else w.to(dtype)
    model = Reads(lambda m, x: kernels.columns(m.w) * x, w=w[1:].view(16, 32))
    before = model(X)
    prepare(model, X)
    assert model.w.stride() == (1, 16)
    assert model.w.data_ptr() % 64 == 0
    assert torch.equal(model(X), before)
    run_prepared(model, X)


def test_packed_type() -> None:
    w = torch.randint(1, 100, (513,), dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    model = Reads(lambda m, x: kernels.rows(m.w) * x, w=w[1:].view(16, 32))
    bits = model.w.view(torch.uint8).clone()
    prepare(model, X)
    assert model.w.data_ptr() % 64 == 0
    assert torch.equal(model.w.view(torch.uint8), bits)


def test_scaled_mm_weight() -> None:
    f8 = torch.float8_e4m3fn
    one = torch.ones(())

    def read(m: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return torch._scaled_mm(x, m.w, one, one, out_dtype=torch.bfloat16)

    model = Reads(read, w=torch.randn(64, 32).to(f8))
    (row,) = prepare(model, torch.randn(32, 64).to(f8)).fixes
    assert row.op == "aten::_scaled_mm.default"
    assert model.w.stride() == (1, 64)


def test_a_buffer_and_a_nested_module_have_their_paths() -> None:
    inner = Reads(lambda m, x: kernels.rows(m.w) * x, w=shifted(4, 8))
    inner.register_buffer("b", shifted(4, 8))
    inner.read = lambda m, x: (kernels.rows(m.w) + kernels.rows(m.b)) * x
    model = torch.nn.Sequential(torch.nn.Sequential(inner))
    report = prepared(model, X)
    assert [(row.copy, row.module) for row in report.fixes] == [("0.0.w", "0.0"), ("0.0.b", "0.0")]
    run_prepared(model, X)
    assert addresses()[-2:] == [inner.w.data_ptr(), inner.b.data_ptr()]


def test_training_parameters_and_their_gradients() -> None:
    def read(m: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return x @ m.w + kernels.columns(m.w.detach()).sum()

    model = Reads(read, w=torch.nn.Parameter(torch.randn(16, 32)))
    x = torch.randn(4, 16)
    model(x).sum().backward()
    expected = model.w.grad.clone()
    prepared(model, x)
    assert model.w.requires_grad
    assert model.w.is_leaf
    assert model.w.stride() == (1, 16)
    model.w.grad = None
    model(x).sum().backward()
    torch.testing.assert_close(model.w.grad, expected)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.step()


def test_graph_breaks_are_followed() -> None:
    def read(m: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = kernels.rows(m.a) * x
        torch._dynamo.graph_break()
        return y + kernels.columns(m.b)

    model = Reads(read, a=shifted(16, 32), b=torch.randn(16, 32))
    report = prepared(model, X)
    assert [row.copy for row in report.fixes] == ["a", "b"]
    torch.compile(model, backend="contig_safe")(X)
    assert all(not r.fixes for r in contig_pass.last_reports())
    assert addresses()[-2:] == [model.a.data_ptr(), model.b.data_ptr()]


def test_symbolic_sizes_and_a_backward_graph() -> None:
    def read(m: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return m.linear(x) + kernels.rows(m.w).sum() + kernels.columns(m.linear.weight.detach())

    model = Reads(read, w=shifted(16, 32))
    model.linear = torch.nn.Linear(8, 8)
    x = torch.randn(4, 8, 8)
    torch._dynamo.mark_dynamic(x, 0)
    report = prepared(model, x)
    assert [row.copy for row in report.rows] == ["w", "linear.weight"]
    assert model.linear.weight.stride() == (1, 8)
    assert len(prepare(model, torch.randn(2, 8, 8)).rows) == 0


def test_an_operand_of_control_flow() -> None:
    def read(m: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        double = lambda w: kernels.rows(w) * 2  # noqa: E731
        return torch.cond(x > 0, lambda w: kernels.rows(w), double, (m.w,))

    model = Reads(read, w=shifted(16, 32))
    (row,) = prepared(model, X).rows
    assert (row.kind, row.op) == ("fix", "subgraph")
    assert model.w.data_ptr() % 64 == 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: type) -> None:
    model = Reads(lambda m, x: kernels.columns(m.w) * x, w=torch.nn.Parameter(torch.randn(16, 32)))
    with mode():
        prepared(model, X)
    assert model.w.stride() == (1, 16)
    assert not model.w.is_inference()
    with mode():
        run_prepared(model, X)
        assert addresses()[-1] == model.w.data_ptr()


def test_a_compiled_module_and_keywords() -> None:
    model = Reads(lambda m, x: kernels.rows(m.w) * x, w=shifted(4, 8))
    report = prepare(torch.compile(model, backend="contig_safe"), x=X)
    assert [row.copy for row in report.fixes] == ["w"]
    assert model.w.data_ptr() % 64 == 0


# -- without arguments ---------------------------------------------------------------------------


def test_without_arguments_only_what_always_holds() -> None:
    model = torch.nn.Module()
    model.good = frozen(torch.randn(8, 16))
    model.turned = frozen(torch.randn(8, 16).t())
    model.shifted = frozen(shifted(8, 16).t())
    model.padded = frozen(torch.randn(8, 20)[:, :16])
    model.register_buffer("spread", torch.randn(16).expand(8, 16))
    model.register_buffer("empty", torch.empty(0, 3))
    good, turned = model.good.data_ptr(), model.turned.data_ptr()
    report = prepared(model)
    assert (model.good.data_ptr(), model.turned.data_ptr()) == (good, turned)
    assert model.shifted.stride() == (1, 16)
    assert model.shifted.data_ptr() % 64 == 0
    assert model.padded.stride() == (16, 1)
    assert model.spread.is_contiguous()
    reasons = {row.copy: row.reason for row in report.fixes}
    assert reasons == {
        "shifted": "not pointer aligned to 16 bytes",
        "padded": "not dense",
        "spread": "not no overlapping elements; not dense",
    }
    assert all(row.op == row.operand == "parameter" for row in report.fixes)
    assert (report.totals.uses, report.totals.clean) == (6, 3)
    assert "3 fixed by 3 copies" in str(report)


# -- the run leaves nothing behind ---------------------------------------------------------------


def test_buffers_that_the_run_writes_to_are_put_back() -> None:
    class Counting(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = frozen(shifted(4, 8))
            self.norm = torch.nn.BatchNorm1d(8)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return self.norm(x.add_(kernels.rows(self.w)))

    model, x = Counting(), torch.zeros(4, 8)
    report = prepared(model, x)
    assert [row.copy for row in report.fixes] == ["w"]
    assert model.calls == 0
    assert model.norm.num_batches_tracked == 0
    assert torch.equal(x, torch.zeros(4, 8))


def test_the_state_loads_into_a_fresh_model() -> None:
    model = Reads(lambda m, x: kernels.columns(m.w) * x, w=shifted(16, 32))
    twin = copy.deepcopy(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    prepare(model, X)
    assert list(model.state_dict()) == list(state)
    twin.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(twin.w, state["w"])
    model.load_state_dict(state)
    assert model.w.stride() == (1, 16)


class Live(TorchDispatchMode):
    """Bytes of storages allocated under it that are alive, and the most at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                self.track(tensor.untyped_storage())
        return out

    def track(self, storage: torch.UntypedStorage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        if address in self.seen:
            return
        self.seen.add(address)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.forget, address, size)

    def forget(self, address: int, size: int) -> None:
        self.seen.discard(address)
        self.now -= size


@pytest.mark.parametrize("example", [(X,), ()])
def test_extra_memory_is_one_tensor_at_a_time(
    example: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 12
    live = Live()
    with live:
        tensors = {f"w{i}": shifted(64, 64).clone() for i in range(count)}
    one = 64 * 64 * 4
    assert live.now == count * one
    with live:
        wide = {name: torch.empty(64 * 64 + 1)[1:].view(64, 64).copy_(t)
                for name, t in tensors.items()}
    del tensors
    assert count * one <= live.now < (count + 1) * one
    model = Reads(lambda m, x: sum(kernels.rows(p).sum() for p in m.parameters()) * x, **wide)
    del wide
    module = __import__("contig_pass.preparing.relay", fromlist=["_relay"])
    relay = module._relay

    def watched(*args: object) -> None:
        with live:
            relay(*args)

    monkeypatch.setattr(module, "_relay", watched)
    held = live.most = live.now
    report = prepare(model, *example)
    assert len(report.fixes) == count
    assert live.most <= held + one + 64
    assert live.now == count * one


# -- errors --------------------------------------------------------------------------------------


def test_errors_are_one_clear_line() -> None:
    model = Reads(lambda m, x: kernels.rows(m.w) * x, w=shifted(4, 8))
    with pytest.raises(OptionError, match="did you mean 'dense'"):
        prepare(model, X, policy="dens")
    with pytest.raises(OptionError, match="target='sm'"):
        prepare(model, X, target="sm")
    with pytest.raises(ContigPassError, match=r"takes a torch\.nn\.Module; this is a function"):
        prepare(run_prepared)
    with pytest.raises(ContigPassError, match="ReLU has no parameters and no buffers"):
        prepare(torch.nn.ReLU(), X)
    with pytest.raises(ContigPassError, match="nothing of Reads was traced"):
        prepare(Reads(lambda m, x: None, w=shifted(4, 8)), X)


def test_many_models_in_one_process() -> None:
    for i in range(12):
        model = Reads(lambda m, x: kernels.rows(m.w) * x, w=shifted(4, 8 + i))
        assert len(prepare(model, X).fixes) == 1
