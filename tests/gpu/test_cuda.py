"""On a GPU, with the real kernels: misaligned operands under contig_safe, and what is free."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import contig_pass

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
M, K, N = 256, 512, 384
F8, BF16 = torch.float8_e4m3fn, torch.bfloat16
MODES = (None, "max-autotune-no-cudagraphs")


def _needs_fp8() -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("FP8 products need compute capability 8.9")


def _values() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    a = torch.randn(M, K, device="cuda").to(F8)
    w = torch.randn(N, K, device="cuda").to(F8)
    return a, w, torch.ones((), device="cuda"), torch.randn(N, device="cuda", dtype=BF16)


def _product(a: torch.Tensor, w: torch.Tensor, one: torch.Tensor, bias: torch.Tensor):
    return torch._scaled_mm(a, w.t(), one, one, bias, out_dtype=BF16)


def _compiled(function: Callable, mode: str | None = None) -> Callable:
    return torch.compile(function, backend=contig_pass.contig_safe, mode=mode, fullgraph=True)


@pytest.mark.parametrize("elements", [0, 1, 2, 3, 8])
@pytest.mark.parametrize("mode", MODES)
def test_a_bias_sliced_from_a_fused_buffer(elements: int, mode: str | None) -> None:
    _needs_fp8()
    a, w, one, bias = _values()
    fused = torch.zeros(N + 64, device="cuda", dtype=BF16)
    fused[elements : elements + N] = bias

    def function(a: torch.Tensor, w: torch.Tensor, one: torch.Tensor, fused: torch.Tensor):
        return _product(a, w, one, fused[elements : elements + N])

    out = _compiled(function, mode)(a, w, one, fused)
    torch.cuda.synchronize()
    reference = _product(a, w, one, bias)
    if mode is None:
        assert torch.equal(out, reference)
    else:  # a Triton template may sum in another order
        torch.testing.assert_close(out, reference, atol=0.5, rtol=2e-2)
    assert contig_pass.last_reports()[-1].totals.fixes == (elements % 8 != 0)


@pytest.mark.parametrize("offset", [1, 8])
def test_a_weight_in_a_flat_buffer(offset: int) -> None:
    _needs_fp8()
    a, w, one, bias = _values()
    flat = torch.zeros(N * K + 64, device="cuda", dtype=torch.uint8)
    flat[offset : offset + N * K] = w.view(torch.uint8).view(-1)

    def function(a: torch.Tensor, flat: torch.Tensor, one: torch.Tensor, bias: torch.Tensor):
        return _product(a, flat[offset : offset + N * K].view(F8).view(N, K), one, bias)

    out = _compiled(function)(a, flat, one, bias)
    torch.cuda.synchronize()
    assert torch.equal(out, _product(a, w, one, bias))


@pytest.mark.parametrize(
    "backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION,
                SDPBackend.EFFICIENT_ATTENTION], ids=lambda backend: backend.name,
)
def test_attention_on_misaligned_views(backend: SDPBackend) -> None:
    torch.manual_seed(0)
    shape = (2, 3, 192, 64)
    dense = [torch.randn(shape, device="cuda", dtype=BF16) for _ in range(3)]
    buffers = [torch.zeros(dense[0].numel() + 8, device="cuda", dtype=BF16) for _ in range(3)]
    for buffer, value in zip(buffers, dense, strict=True):
        buffer[1:-7] = value.view(-1)

    def function(*buffers: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*(b[1:-7].view(shape) for b in buffers))

    out = _compiled(function)(*buffers)
    torch.cuda.synchronize()
    with sdpa_kernel(backend):
        assert torch.equal(out, F.scaled_dot_product_attention(*dense))
    assert contig_pass.last_reports()[-1].totals.fixes == 3


def test_a_misaligned_input_at_a_later_call() -> None:
    _needs_fp8()
    a, w, one, bias = _values()
    function = _compiled(_product)
    fused = torch.zeros(N + 8, device="cuda", dtype=BF16)
    for elements in (0, 1, 4, 0, 3):
        view = fused[elements : elements + N]
        view.copy_(bias)
        out = function(a, w, one, view)
        torch.cuda.synchronize()
        assert torch.equal(out, _product(a, w, one, bias))
    assert len(contig_pass.last_reports()) == 1


class _Layer(torch.nn.Module):
    """An FP8 linear whose bias starts ``elements`` into a fused buffer."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        _, w, one, bias = _values()
        fused = torch.zeros(N + 64, device="cuda", dtype=BF16)
        fused[elements : elements + N] = bias
        self.register_buffer("w", w)
        self.register_buffer("one", one)
        self.bias = torch.nn.Parameter(fused[elements : elements + N], requires_grad=False)

    def forward(self, a: torch.Tensor) -> torch.Tensor:
        return _product(a, self.w, self.one, self.bias)


def test_cuda_graphs_replay_with_a_misaligned_parameter() -> None:
    """Its aligned copy stays at one address, and what is written to it between calls counts."""
    _needs_fp8()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    a, w, one, bias = _values()
    layer = _Layer(1)
    assert layer.bias.data_ptr() % 16
    compiled = _compiled(layer, "reduce-overhead")
    with torch.no_grad():
        for step in range(5):
            layer.bias.copy_(bias + step)
            torch.compiler.cudagraph_mark_step_begin()
            assert torch.equal(compiled(a), _product(a, w, one, bias + step))
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
    manager = torch._inductor.cudagraph_trees.get_container(a.device.index or 0).tree_manager
    assert manager is not None
    assert manager.new_graph_id().id > 0  # graphs were recorded


@pytest.mark.parametrize("first", ["inductor", "contig_safe"])
def test_a_program_that_torch_refuses(first: str) -> None:
    """Inductor keeps refusing a row-major B, whichever backend compiles first."""
    _needs_fp8()
    a, w, one, _ = _values()
    wrong_order = w.t().contiguous()

    def function(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch._scaled_mm(a, b, one, one, out_dtype=BF16)

    expected = function(a, w.t())
    for backend in ("inductor", "contig_safe")[:: 1 if first == "inductor" else -1]:
        torch._dynamo.reset()
        chosen = backend if backend == "inductor" else contig_pass.contig_safe
        compiled = torch.compile(function, backend=chosen)
        if backend == "inductor":
            with pytest.raises((torch._dynamo.exc.TorchRuntimeError, RuntimeError)):
                compiled(a, wrong_order)
        else:
            assert torch.equal(compiled(a, wrong_order), expected)
