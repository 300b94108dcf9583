"""``prepare``: what is left alone and why, and parameters that share their memory."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

import contig_pass
from contig_pass import prepare
from tests import kernels
from tests.contig_pass.prepared_models import (
    Reads,
    X,
    addresses,
    kernel_contracts,  # noqa: F401
    prepared,
    run_prepared,
    shifted,
)

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
