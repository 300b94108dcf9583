"""On a GPU, with torchao's own Triton kernel: the contract for a stranger's op."""

from __future__ import annotations

import pytest
import torch

import contig_pass
from tests import third_party

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_strided_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = pytest.importorskip("torchao.kernel.intmm_triton", reason="torchao is not installed")
    # One configuration: timing all of them takes minutes, and changes no value.
    one = kernel.int8_mm_kernel_configs[:1]
    monkeypatch.setattr(kernel, "int8_mm_kernel_configs", one)
    operands = third_party.operands("cuda")
    right = third_party.expected(*operands)
    for backend in ("eager", "inductor", contig_pass.contig_safe):
        torch._dynamo.reset()
        wrong = torch.compile(third_party.program, backend=backend)(*operands)
        assert not torch.equal(wrong, right)
    torch._dynamo.reset()
    third_party.register()
    compiled = torch.compile(third_party.program, backend=contig_pass.contig_safe)
    assert torch.equal(compiled(*operands), right)
    (row,) = contig_pass.last_reports()[-1].fixes
    assert (row.operand, row.before.strides) == ("scales1", (3, 1))
