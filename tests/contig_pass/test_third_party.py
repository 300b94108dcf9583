"""A contract for a stranger's op: torchao's, whose kernel reads past the strides of its scales."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import contig_pass
from tests import third_party

pytest.importorskip("torchao.kernel.intmm_triton", reason="torchao is not installed")


@pytest.fixture
def kernel() -> Iterator[None]:
    """A kernel for the CPU that reads memory as the Triton one does."""
    library = torch.library.Library("torchao", "IMPL")

    def multiply(a: torch.Tensor, b: torch.Tensor, scales1: torch.Tensor) -> torch.Tensor:
        read = scales1.as_strided((len(a), 1), (1, 1))
        return (a.double() @ b.double() * read).float()

    library.impl("int_scaled_matmul", multiply, "CPU")
    yield
    library._destroy()


@pytest.mark.usefixtures("kernel")
def test_without_a_contract_the_values_are_wrong_and_with_one_right() -> None:
    operands = third_party.operands("cpu")
    right = third_party.expected(*operands)
    for backend in ("inductor", contig_pass.contig_safe):
        torch._dynamo.reset()
        wrong = torch.compile(third_party.program, backend=backend)(*operands)
        assert not torch.equal(wrong, right)
    torch._dynamo.reset()
    third_party.register()
    compiled = torch.compile(third_party.program, backend=contig_pass.contig_safe)
    assert torch.equal(compiled(*operands), right)
    (row,) = contig_pass.last_reports()[-1].fixes
    assert (row.op, row.operand) == (f"{third_party.OP}.default", "scales1")
    assert row.rules == ("one after another along the rows",)
    assert row.before.strides == (3, 1)
    assert row.source == "torchao/kernel/intmm_triton.py"


@pytest.mark.usefixtures("kernel")
def test_expanded_scales_are_legal_as_they_are() -> None:
    third_party.register()

    def program(a: torch.Tensor, b: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return torch.ops.torchao.int_scaled_matmul(a, b, scales.expand(64, 64))

    a, b, statistics = third_party.operands("cpu")
    scales = statistics[:, 1:2].contiguous()
    compiled = torch.compile(program, backend=contig_pass.contig_safe)
    assert torch.equal(compiled(a, b, scales), third_party.expected(a, b, statistics))
    assert contig_pass.last_reports()[-1].fixes == ()
