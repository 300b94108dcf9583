"""Block swap on a GPU: order of copies and kernels, fixed addresses, memory, compiled blocks."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import contig_pass
from wan_models import TINY, WanModel, model_inputs
from wan_models.block_swap import BlockSwap, copier, swap
from wan_models.checkpoint import load, save
from wan_models.quant import attach_lora, quantize_, set_lora_strength

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GRID = (2, 4, 4)
CONFIG = replace(TINY, dim=1024, ffn_dim=4096, num_heads=8, num_layers=6)
MIB = 1 << 20
#: Clock cycles of a kernel that does nothing, about 10 ms: longer than any copy here.
WAIT = 20_000_000


def _model(recipe: str | None = None, device: str = "cuda") -> WanModel:
    if recipe is not None and "fast" in recipe and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("FP8 products need compute capability 8.9")
    torch.manual_seed(0)
    with torch.device(device):
        made = WanModel(CONFIG).eval().requires_grad_(False).bfloat16()
    if recipe is not None:
        quantize_(made, recipe)
    return made


def _inputs(made: WanModel):
    return model_inputs(CONFIG, GRID, dtype=made.dtype, device="cuda")


@torch.no_grad()
def _run(made: nn.Module, *args: object) -> torch.Tensor:
    return made(*args)


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())


def _largest(made: WanModel) -> int:
    return max(sum(t.nbytes for t in _tensors(each).values()) for each in made.blocks)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("recipe", [None, "fp8_e4m3fn_scaled_fast", "fp4_scaled"])
def test_results_are_those_without_swap(count: int, recipe: str | None) -> None:
    made = _model(recipe)
    given = _inputs(made)
    expected = _run(made, *given)
    before = {name: (t.clone(), t.stride()) for name, t in _tensors(made).items()}
    with BlockSwap(made, count, "cuda") as swapped:
        addresses = {name: t.data_ptr() for name, t in _tensors(made.blocks).items()}
        for _ in range(4):
            assert torch.equal(_run(made, *given), expected)
        assert {name: t.data_ptr() for name, t in _tensors(made.blocks).items()} == addresses
        assert all(t.is_cuda for t in _tensors(made).values())
        assert all(t.data_ptr() % 16 == 0 for t in _tensors(made.blocks).values() if t.dim())
        assert swapped.buffer_bytes < min(count, 2) * (_largest(made) + MIB)
    for name, tensor in _tensors(made).items():
        assert tensor.is_cuda
        assert tensor.stride() == before[name][1]
        assert torch.equal(tensor.flatten().view(torch.uint8),
                           before[name][0].flatten().view(torch.uint8)), name
    assert torch.equal(_run(made, *given), expected)


@pytest.mark.parametrize("stream", ["default", "own"])
def test_a_buffer_is_not_filled_before_its_kernels_have_run(stream: str) -> None:
    """Kernels lag far behind the host, which has asked for the next copies long before."""
    made = _model()
    given = _inputs(made)
    expected = _run(made, *given)
    for each in made.blocks:
        each.self_attn.register_forward_pre_hook(lambda *_: torch.cuda._sleep(WAIT))
    chosen = torch.cuda.current_stream() if stream == "default" else torch.cuda.Stream()
    torch.cuda.synchronize()
    with BlockSwap(made, 6, "cuda"), torch.cuda.stream(chosen):
        results = [_run(made, *given) for _ in range(3)]
        torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in results)


def test_kernels_wait_for_the_copy_into_their_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies lag far behind the kernels that are to read them."""

    class Slow(copier.Copier):
        def fill(self, buffer, host, slab):  # type: ignore[no-untyped-def]
            with torch.cuda.stream(self.stream):
                torch.cuda._sleep(WAIT)
            super().fill(buffer, host, slab)

    monkeypatch.setattr(swap, "Copier", Slow)
    made = _model()
    given = _inputs(made)
    expected = _run(made, *given)
    with BlockSwap(made, 6, "cuda"):
        results = [_run(made, *given) for _ in range(3)]
        torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in results)


def test_without_the_events_the_two_tests_above_would_fail(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Unordered(copier.Copier):
        def acquire(self, buffer: int) -> None:
            pass

        def fill(self, buffer, host, slab):  # type: ignore[no-untyped-def]
            with torch.cuda.stream(self.stream):
                torch.cuda._sleep(WAIT)
            super().fill(buffer, host, slab)

    monkeypatch.setattr(swap, "Copier", Unordered)
    made = _model()
    given = _inputs(made)
    expected = _run(made, *given)
    swapped = BlockSwap(made, 6, "cuda").attach()
    result = _run(made, *given)
    torch.cuda.synchronize()
    swapped.detach()
    assert not torch.equal(result, expected)


@pytest.mark.parametrize("home", ["cuda", "cpu"])
def test_memory(home: str) -> None:
    warm = _model()
    _run(warm, *_inputs(warm))  # libraries keep workspaces
    del warm
    gc.collect()  # modules lie in reference cycles
    torch.cuda.empty_cache()
    made = _model(device=home)
    block = _largest(made)
    rest = sum(t.nbytes for t in _tensors(made).values()) - 6 * block
    torch.cuda.synchronize()
    start = torch.cuda.memory_allocated()
    with BlockSwap(made, 6, "cuda") as swapped:
        held = torch.cuda.memory_allocated() - start
        expected = 2 * block + rest if home == "cpu" else -4 * block
        assert abs(held - expected) < 2 * MIB
        assert all(piece.is_pinned() for each in swapped._swapped for piece in each.host._pieces)
        assert 0 <= swapped.host_bytes - 6 * block < 6 * MIB
        given = _inputs(made)
        once = _run(made, *given)
        assert torch.equal(_run(made, *given), once)
    del given, once
    assert all(t.device.type == home for t in _tensors(made).values())
    assert abs(torch.cuda.memory_allocated() - start) < 2 * MIB


@pytest.mark.parametrize("recipe", [None, "fp8_e4m3fn_scaled_fast"])
def test_compiled_blocks_are_compiled_once(recipe: str | None) -> None:
    made = _model(recipe)
    given = _inputs(made)
    expected = _run(made, *given)
    counter = CompileCounterWithBackend(contig_pass.contig_safe)
    with (
        BlockSwap(made, 5, "cuda"),
        torch._dynamo.config.patch(error_on_recompile=True),
    ):
        made.compile_blocks(backend=counter, fullgraph=True, dynamic=False)
        first = _run(made, *given)
        for _ in range(3):
            assert torch.equal(_run(made, *given), first)
    assert counter.frame_count == 1
    error = (first.float() - expected.float()).norm() / expected.float().norm()
    assert error < 0.05


def test_lora_strength_changes_while_swapped() -> None:
    made, whole = _model(), _model()
    for each in (made, whole):
        torch.manual_seed(1)
        for block in each.blocks:
            down, up = torch.randn(8, 1024), torch.randn(1024, 8)
            attach_lora(block.self_attn.q, down, up, strength=0.1)
    given = _inputs(made)
    with BlockSwap(made, 5, "cuda"):
        for strength in (0.1, 0.5, -0.2):
            for each in (made, whole):
                set_lora_strength(each, strength)
            assert torch.equal(_run(made, *given), _run(whole, *given))


def test_layers_attached_on_the_cpu_while_swapped() -> None:
    made, whole = _model(), _model()
    given = _inputs(made)
    with BlockSwap(made, 6, "cuda"):
        _run(made, *given)
        for each, device in ((made, "cpu"), (whole, "cuda")):
            for i, block in enumerate(each.blocks):
                torch.manual_seed(i)
                block.late = nn.Linear(1024, 1024, bias=False).bfloat16().to(device)
                block.register_forward_hook(lambda block, _, out: out + block.late(out))
        expected = _run(whole, *given)
        assert torch.equal(_run(made, *given), expected)
        assert torch.equal(_run(made, *given), expected)


@pytest.mark.parametrize("recipe", [None, "fp8_e4m3fn_scaled", "fp4_scaled"])
def test_loading_straight_to_where_the_swap_wants_tensors(
    recipe: str | None, tmp_path: Path
) -> None:
    made = _model(recipe)
    given = _inputs(made)
    expected = _run(made, *given)
    save(made, tmp_path / "model.safetensors")
    with torch.device("meta"):
        loaded = WanModel(CONFIG).eval()
    swapped = BlockSwap(loaded, 4, "cuda")
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    start = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    load(loaded, tmp_path / "model.safetensors", device=swapped.device_of)
    on_gpu = sum(t.nbytes for t in loaded.state_dict().values() if t.is_cuda)
    assert abs(torch.cuda.max_memory_allocated() - start - on_gpu) < 2 * MIB
    with swapped:
        assert torch.equal(_run(loaded, *given), expected)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor.flatten().view(torch.uint8).cpu(),
                           made.state_dict()[name].flatten().view(torch.uint8).cpu()), name
