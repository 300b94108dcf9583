"""Exported programs: ``apply``, after save and load, and packages of AOTInductor."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import contig_pass
from contig_pass.errors import ContigPassError, OptionError
from tests import kernels


class Model(torch.nn.Module):
    """A misaligned parameter, one in the wrong order, and views of inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.randn(513)[1:].view(16, 32), requires_grad=False)
        self.v = torch.nn.Parameter(torch.randn(16, 32), requires_grad=False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (
            kernels.rows(self.w) + kernels.columns(self.v), kernels.rows((x + 1)[:, 1:]),
            kernels.rows(y[1:]),
        )


@pytest.fixture(autouse=True)
def contracts() -> Iterator[None]:
    with kernels.contracts(), torch.no_grad():
        yield


def _misaligned(rows: int) -> torch.Tensor:
    return torch.randn(rows * 16 + 1)[1:].view(rows, 16)


def _check(program: object, model: Model) -> None:
    args = (_misaligned(8), _misaligned(9))
    expected = model(*args)
    kernels.received.clear()
    actual = program(*args)
    for got, want in zip(actual, expected, strict=True):
        assert torch.equal(got, want)
    assert len(kernels.received) == 4
    assert kernels.bad() == []


@pytest.mark.parametrize("decomposed", [False, True])
def test_apply(decomposed: bool) -> None:
    model = Model()
    exported = torch.export.export(model, (torch.randn(8, 16), torch.randn(9, 16)))
    if decomposed:
        exported = exported.run_decompositions()
    before = str(exported.graph)
    repaired = contig_pass.apply(exported)
    assert str(exported.graph) == before
    assert contig_pass.last_reports()[-1].totals.fixes == 4
    _check(repaired.module(), model)
    _check(torch.compile(repaired.module(), backend="inductor"), model)
    _check(torch.compile(repaired.module(), backend="contig_safe"), model)
    file = io.BytesIO()
    torch.export.save(repaired, file)
    file.seek(0)
    _check(torch.export.load(file).module(), model)


def test_apply_with_a_promise_and_with_a_policy() -> None:
    exported = torch.export.export(Model(), (torch.randn(8, 16), torch.randn(9, 16)))
    contig_pass.apply(exported, aligned_inputs=True)
    # y[1:] starts 64 bytes after y, which the caller promises to be aligned.
    assert contig_pass.last_reports()[-1].totals.fixes == 3
    contig_pass.apply(exported, policy="audit")
    assert contig_pass.last_reports()[-1].totals.fixes == 0


@pytest.mark.parametrize("decomposed", [False, True])
def test_an_exported_program_that_writes_to_its_input(decomposed: bool) -> None:
    @torch.library.custom_op("export_tests::fill", mutates_args={"out"})
    def fill(x: torch.Tensor, out: torch.Tensor) -> None:
        kernels.note("several", out)
        out.add_(x.sum())

    contig_pass.register_contract("export_tests::fill", "out", [contig_pass.AlignedPointer(16)])

    class Writer(torch.nn.Module):
        def forward(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
            fill(x, out[3:])
            return x + 1

    exported = torch.export.export(Writer(), (torch.ones(4), torch.zeros(8)))
    repaired = contig_pass.apply(exported.run_decompositions() if decomposed else exported)
    kernels.received.clear()
    out = torch.zeros(8)
    repaired.module()(torch.ones(4), out)
    assert out.tolist() == [0, 0, 0, 4, 4, 4, 4, 4]
    assert kernels.received
    assert kernels.bad() == []


def test_a_copy_does_not_outlive_a_write_to_what_was_copied() -> None:
    """The graph of an exported program may write in place, even before decompositions."""

    class Twice(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            part = x[:, 1:]
            first = kernels.rows(part)
            x.add_(1)
            return first, kernels.rows(part), kernels.rows(x), kernels.rows(part)

    repaired = contig_pass.apply(torch.export.export(Twice(), (torch.ones(4, 8),)))
    # Both parts before and after the write; the input itself, which nobody promises aligned.
    assert contig_pass.last_reports()[-1].totals.fixes == 3
    x, same = torch.zeros(33)[1:].view(4, 8), torch.zeros(4, 8)
    expected = Twice()(same)
    kernels.received.clear()
    for got, want in zip(repaired.module()(x), expected, strict=True):
        assert torch.equal(got, want)
    assert torch.equal(x, same)
    assert kernels.received
    assert kernels.bad() == []


def test_what_is_no_exported_program() -> None:
    with pytest.raises(ContigPassError, match=r"apply takes an ExportedProgram.*this is a Model"):
        contig_pass.apply(Model())
    exported = torch.export.export(Model(), (torch.randn(8, 16), torch.randn(9, 16)))
    with pytest.raises(OptionError, match="policy='x'"):
        contig_pass.apply(exported, policy="x")


def test_package(tmp_path: Path) -> None:
    model = Model()
    exported = torch.export.export(model, (torch.randn(8, 16), torch.randn(9, 16)))
    path = contig_pass.aoti_compile_and_package(exported, package_path=str(tmp_path / "m.pt2"))
    assert contig_pass.last_reports()[-1].totals.fixes >= 3
    _check(torch._inductor.aoti_load_package(path), model)
