"""``prepare``: what is relaid once, what is left alone and why.

Judged by addresses and strides of the tensors, by what the kernels receive, and by the values.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

import contig_pass
from contig_pass import prepare
from contig_pass.errors import ContigPassError, OptionError
from tests import kernels


@pytest.fixture(autouse=True)
def kernel_contracts() -> Iterator[None]:
    with kernels.contracts():
        kernels.received.clear()
        yield


def shifted(*shape: int, by: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A dense tensor whose first element lies ``by`` elements beyond an aligned address."""
    count = torch.Size(shape).numel()
    return torch.arange(float(count + by)).to(dtype)[by:].view(shape)


def frozen(tensor: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad=False)


class Reads(torch.nn.Module):
    """``read(module, x)`` on the tensors that it is given, as parameters."""

    def __init__(self, read: object, **tensors: torch.Tensor) -> None:
        super().__init__()
        self.read = read
        for name, tensor in tensors.items():
            self.register_parameter(
                name, tensor if isinstance(tensor, torch.nn.Parameter) else frozen(tensor)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.read(self, x)


X = torch.ones(())


def run_prepared(model: torch.nn.Module, *args: torch.Tensor) -> contig_pass.Report:
    """Compile and run the prepared model: no fix, legal memory, and the parameters' own."""
    expected = model(*args)
    kernels.received.clear()
    out = torch.compile(model, backend="contig_safe", fullgraph=True)(*args)
    assert torch.equal(out, expected)
    assert kernels.bad() == []
    report = contig_pass.last_reports()[-1]
    assert report.fixes == ()
    return report


def addresses() -> list[int]:
    return [seen.address for seen in kernels.received]


def prepared(model: torch.nn.Module, *args: torch.Tensor, **kwargs: object) -> contig_pass.Report:
    """``prepare``; names, values, identities and flags stay, a second time finds nothing."""
    before = {name: (value, value.clone()) for name, value in model.state_dict(
        keep_vars=True).items()}
    flags = {name: (type(p), p.requires_grad, p.dtype) for name, p in model.named_parameters()}
    report = prepare(model, *args, **kwargs)
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    for name, (tensor, value) in before.items():
        assert after[name] is tensor
        assert torch.equal(tensor, value)
        assert tensor.shape == value.shape
    assert flags == {
        name: (type(p), p.requires_grad, p.dtype) for name, p in model.named_parameters()
    }
    again = prepare(model, *args, **kwargs)
    assert again.fixes == ()
    assert len(again.skips) == len(report.skips)
    return report


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


# -- what is left alone --------------------------------------------------------------------------


def test_a_slice_at_an_odd_offset_cannot_be_helped() -> None:
    def read(m: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return kernels.several([m.b[:16], m.b[17:]]) * x

    model = Reads(read, b=torch.randn(33))
    place = (model.b.data_ptr(), model.b.stride())
    (row,) = prepared(model, X).rows
    assert (model.b.data_ptr(), model.b.stride()) == place
    assert (row.kind, row.parameter, row.after, row.copy) == ("skip", "b", None, None)
    assert "no dense copy of the whole tensor repairs it" in row.reason
    assert "offset 68 B" in row.reason
    assert row.rules == ("pointer aligned to 16 bytes",)


def test_uses_that_disagree_leave_the_clean_one_clean() -> None:
    def read(m: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return (kernels.matrix(m.w) + kernels.columns(m.w)) * x

    model = Reads(read, w=torch.randn(16, 32))
    (row,) = prepared(model, X).rows
    assert model.w.stride() == (32, 1)
    assert "it would break" in row.reason
    assert "row-major" in row.reason


def test_what_one_layout_cannot_repair_is_told() -> None:
    def read(m: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return (kernels.matrix(m.w) + kernels.columns(m.w)) * x

    model = Reads(read, w=shifted(16, 32))
    report = prepare(model, X)
    (fix,), (skip,) = report.fixes, report.skips
    assert model.w.data_ptr() % 64 == 0
    assert model.w.stride() == (32, 1)
    assert fix.parameter == skip.parameter == "w"
    assert skip.op == "layout_tests::columns.default"
    assert "not column-major" in skip.reason
    assert (report.totals.uses, report.totals.fixed_uses) == (2, 1)
    again = prepare(model, X)
    assert again.fixes == ()
    assert len(again.skips) == 1


def test_a_view_that_would_fail_rules_an_order_out() -> None:
    def read(m: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return kernels.columns(m.w) * x + m.w.view(-1).sum()

    model = Reads(read, w=torch.randn(16, 32))
    (row,) = prepared(model, X).skips
    assert model.w.stride() == (32, 1)
    assert "a view of it would fail" in row.reason


def test_a_view_by_address_keeps_the_tensor_where_it_is() -> None:
    def read(m: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return kernels.columns(m.w) * x + torch.as_strided(m.w, (4,), (3,), 2).sum()

    model = Reads(read, w=torch.randn(16, 32))
    expected = model(X)
    (row,) = prepared(model, X).skips
    assert "picks elements by address" in row.reason
    assert torch.equal(model(X), expected)


def test_an_op_without_a_contract_keeps_the_strides_that_it_knows() -> None:
    def read(m: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return (kernels.columns(m.w) + kernels.rows(m.w)) * x

    contig_pass.unregister_contract("layout_tests::rows", "x")
    model = Reads(read, w=shifted(16, 32))
    report = prepare(model, X)
    assert model.w.stride() == (32, 1)
    assert "no contract says which strides layout_tests.rows.default takes" in (
        report.skips[-1].reason
    )


def test_sizes_are_beyond_any_layout() -> None:
    contig_pass.register_contract(
        "layout_tests::rows", "x", [contig_pass.Multiple(16)], source="a test",
        when=lambda call: True,
    )
    model = Reads(lambda m, x: kernels.rows(m.w) * x, w=torch.randn(16, 24))
    (row,) = prepared(model, X).skips
    assert row.rules == ("size of dim -1 a multiple of 16",)


def test_audit_changes_nothing() -> None:
    model = Reads(lambda m, x: kernels.rows(m.w) * x, w=shifted(16, 32))
    where = model.w.data_ptr()
    (row,) = prepared(model, X, policy="audit").skips
    assert model.w.data_ptr() == where
    assert row.reason == "policy audit: nothing is changed"


class Marked(torch.Tensor):
    """A subclass of no consequence."""


def test_subclasses_are_told() -> None:
    model = torch.nn.Module()
    model.register_buffer("w", shifted(4, 8).as_subclass(Marked))
    where = model.w.data_ptr()
    (row,) = prepare(model).rows
    assert (row.kind, row.parameter) == ("skip", "w")
    assert row.reason.startswith("a Marked")
    assert model.w.data_ptr() == where

    model = Reads(lambda m, x: kernels.columns(m.w) * x + kernels.rows(m.v), v=shifted(4, 8))
    model.register_buffer("w", TwoTensor(torch.randn(4, 8), torch.randn(4, 8)))
    report = prepare(model, torch.ones(4, 8))
    assert [row.parameter for row in report.fixes] == ["v"]
    (row,) = report.skips
    assert (row.parameter, row.op) == ("w", "layout_tests::columns.default")
    assert row.reason.startswith("a TwoTensor")
    assert type(model.w) is TwoTensor


def test_meta_tensors_are_told() -> None:
    model = Reads(lambda m, x: x, w=torch.randn(64, 32, device="meta")[1:, 2:])
    (row,) = prepare(model).rows
    assert (row.kind, row.parameter, row.before.strides) == ("skip", "w", (32, 1))
    assert "meta" in row.reason


def test_memory_of_other_processes_is_left_alone() -> None:
    model = Reads(lambda m, x: kernels.rows(m.w) * x, w=shifted(16, 32)).share_memory()
    where = model.w.data_ptr()
    (row,) = prepare(model, X).rows
    assert row.reason.startswith("shared with other processes")
    assert model.w.data_ptr() == where


def test_contiguous_in_the_program_keeps_the_order() -> None:
    model = Reads(lambda m, x: kernels.columns(m.w.contiguous()) * x, w=torch.randn(16, 32))
    (row,) = prepared(model, X).skips
    assert model.w.stride() == (32, 1)
    assert "contiguous(), which the program calls on it, would copy" in row.reason


def test_sparse_tensors_are_passed_over() -> None:
    model = Reads(lambda m, x: kernels.rows(m.w) * x, w=shifted(4, 8))
    model.register_buffer("s", torch.eye(4).to_sparse())
    report = prepare(model, X)
    assert [row.copy for row in report.rows] == ["w"]
    assert prepare(model).rows == ()


# -- shared memory -------------------------------------------------------------------------------


def test_one_parameter_in_two_modules() -> None:
    first = Reads(lambda m, x: kernels.rows(m.w) * x, w=shifted(4, 8))
    second = Reads(lambda m, x: kernels.matrix(m.w) * x, w=first.w)
    model = torch.nn.Sequential(first, second)
    (row,) = prepared(model, X).fixes
    assert first.w is second.w
    assert row.copy == "0.w"
    assert first.w.data_ptr() % 64 == 0


def test_two_parameters_of_the_same_memory_stay_tied() -> None:
    data = shifted(16, 32)
    model = Reads(lambda m, x: (kernels.rows(m.a) + kernels.matrix(m.b)) * x, a=data, b=data)
    assert model.a is not model.b
    report = prepared(model, X)
    assert model.a.data_ptr() == model.b.data_ptr()
    assert model.a.data_ptr() % 64 == 0
    assert [(row.copy, row.nbytes) for row in report.fixes] == [("a", 4096), ("b", 0)]
    model.a.data[0, 0] = 7.0
    assert model.b[0, 0] == 7.0
    run_prepared(model, X)
    assert addresses()[-2:] == [model.a.data_ptr()] * 2


@pytest.mark.parametrize("example", [(X,), ()])
def test_partial_overlap_is_left_alone(example: tuple) -> None:
    base = torch.arange(600.0)
    model = Reads(
        lambda m, x: (kernels.rows(m.a).sum() + kernels.rows(m.b).sum()) * x,
        a=base[1:257].view(16, 16), b=base[129:385].view(16, 16),
    )
    places = model.a.data_ptr(), model.b.data_ptr()
    report = prepared(model, *example)
    assert places == (model.a.data_ptr(), model.b.data_ptr())
    assert [row.parameter for row in report.skips] == ["a", "b"]
    assert all("a and b share" in r.reason or "b and a share" in r.reason for r in report.skips)


def test_a_transposed_twin_is_left_alone() -> None:
    data = torch.randn(16, 32)
    model = Reads(lambda m, x: (kernels.columns(m.a).t() + m.b) * x, a=data, b=data.t())
    (row,) = prepared(model, X).skips
    assert "a and b share a part of their memory" in row.reason
    assert model.a.data_ptr() == model.b.data_ptr() == data.data_ptr()


def test_memory_shared_with_an_attribute_or_an_argument_is_left_alone() -> None:
    model = Reads(lambda m, x: kernels.rows(m.w) * x.sum(), w=shifted(16, 32))
    model.flat = model.w.detach().view(-1)
    (row,) = prepared(model, X).skips
    assert "w and flat share" in row.reason
    del model.flat
    (row,) = prepared(model, model.w.detach()[2:]).skips
    assert "w and an argument share" in row.reason
    assert len(prepared(model, X).fixes) == 1


def test_slices_of_one_buffer_move_one_by_one() -> None:
    flat = torch.arange(1 + 3 * 512.0)
    storage = weakref.ref(flat.untyped_storage())
    parts = {name: flat[1 + i * 512 : 513 + i * 512].view(16, 32) for i, name in enumerate("abc")}
    model = Reads(
        lambda m, x: (kernels.rows(m.a) + kernels.rows(m.b) + kernels.rows(m.c)) * x, **parts
    )
    del flat, parts
    report = prepared(model, X)
    assert [row.copy for row in report.fixes] == ["a", "b", "c"]
    assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == 3
    gc.collect()
    assert storage() is None
    run_prepared(model, X)


def test_columns_of_one_matrix_do_not_share_memory() -> None:
    base = torch.randn(16, 64)
    model = Reads(
        lambda m, x: (kernels.columns(m.a) + kernels.columns(m.b)) * x,
        a=base[:, :32], b=base[:, 32:],
    )
    assert len(prepared(model, X).fixes) == 2
    assert model.a.stride() == model.b.stride() == (1, 16)


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
