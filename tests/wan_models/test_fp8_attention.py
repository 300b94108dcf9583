"""Our 8-bit attention: its arithmetic on the CPU, its kernels under Triton, its layouts."""

from __future__ import annotations

import pytest
import torch

from tests.wan_models import attention_cases as cases
from tests.wan_models.attention_cases import exact, relative_error
from tests.wan_models.triton_kernels import (
    compiled,
    interpreted,
    needs_interpreter,
    needs_triton,
)
from wan_models.attention import fp8
from wan_models.attention.kernels import attention

#: e4m3 keeps three bits of mantissa: about 2^-4 / sqrt(3) in each of q, k, v and the weights.
BOUND = 0.06


def operands(
    queries: int, keys: int, size: int = 64, batch: int = 2, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(batch, n, 2, size).to(dtype) for n in (queries, keys, keys)]


@pytest.mark.parametrize("size", fp8.HEAD_DIMS)
@pytest.mark.parametrize(
    ("queries", "keys"), [(20, 1), (30, 127), (130, 128), (30, 129), (40, 300)]
)
def test_values_at_any_length(size, queries, keys):
    q, k, v = operands(queries, keys, size)
    assert relative_error(attention(q, k, v, mode="fp8"), exact(q, k, v)) < BOUND


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_result_is_dense_and_of_the_type_of_q(dtype):
    views = [cases.head_major(x) for x in operands(6, 140, dtype=dtype)]
    out = attention(*views, mode="fp8")
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert relative_error(out, exact(*views)) < BOUND


@pytest.mark.parametrize("lengths", [(300, 299), (128, 127), (1, 256)])
def test_padding_counts_nowhere(lengths):
    """Not in the mean of k, not in a scale, not in the sum: even NaN is not seen. (Sums over other
    shapes are taken in another order, which can tip a value over to the next e4m3 number.)"""
    q, k, v = operands(9, 300)
    lens = torch.tensor(lengths)
    for b, length in enumerate(lengths):
        k[b, length:], v[b, length:] = torch.nan, torch.nan
    out = attention(q, k, v, mode="fp8", k_lens=lens)
    for b, length in enumerate(lengths):
        part = slice(b, b + 1)
        alone = attention(q[part], k[part, :length], v[part, :length], mode="fp8")
        assert relative_error(out[part], alone.double()) < 5e-3


def test_a_sample_without_keys_gives_zeros():
    q, k, v = operands(4, 130)
    out = torch.ops.wan_models.fp8_attention(q, k, v, torch.tensor([130, 0]))
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert out[0].abs().amax() > 0


def test_a_mean_of_the_keys_costs_no_precision():
    """Softmax does not see it, and after its removal neither does the rounding."""
    q, k, v = operands(40, 200)
    shifted = k + 20 * torch.randn(1, 1, 2, 64)
    assert relative_error(attention(q, shifted, v, mode="fp8"), exact(q, k, v)) < BOUND
    plain, _ = fp8.quantise(shifted, shifted.abs().amax((1, 3), keepdim=True))
    smooth, _ = fp8.quantise(k, k.abs().amax((1, 3), keepdim=True))
    assert plain.unique().numel() < smooth.unique().numel()


def test_scales_are_by_row_and_channel():
    """Rows of q and channels of v that are a thousand times larger than others."""
    q, k, v = operands(64, 256)
    q[:, ::2] *= 1e-3
    v[..., ::2] *= 1e3
    out, expected = attention(q, k, v, mode="fp8"), exact(q, k, v)
    for rows in (slice(0, None, 2), slice(1, None, 2)):
        for channels in (slice(0, None, 2), slice(1, None, 2)):
            part = (slice(None), rows, slice(None), channels)
            assert relative_error(out[part], expected[part]) < BOUND


@pytest.mark.parametrize("blocks", [1, 2])
def test_scales_of_k_are_by_block(blocks):
    """A channel that q does not see, large in the first block: it must spoil no other block."""
    q, k, v = operands(64, 256)
    signs = torch.tensor([1.0, -1.0]).repeat(64 * blocks)[:, None]
    q[..., 0] = 0
    k[:, : 128 * blocks, :, 0] = 1e7 * signs  # beyond what e4m3 spans
    v[:, :128] = 0  # what comes out is the second block's, up to one factor for each query
    out, expected = (
        torch.nn.functional.normalize(x.double(), dim=-1)
        for x in (attention(q, k, v, mode="fp8"), exact(q, k, v))
    )
    error = relative_error(out, expected)
    assert error < BOUND if blocks == 1 else error > 3 * BOUND


def test_zeros_stay_zeros():
    q, k, v = operands(3, 5)
    out = attention(q * 0, k * 0, v * 0, mode="fp8")
    assert torch.equal(out, torch.zeros_like(out))
    out = attention(q * 0, k, v, mode="fp8")
    torch.testing.assert_close(out, v.mean(1, keepdim=True).expand_as(out), rtol=0.06, atol=0.02)


def test_arithmetic_of_quantisation():
    x = torch.tensor([[1.0, -3.5, 0.0, 448.0], [0.0, 0.0, 0.0, 0.0]])
    values, scale = fp8.quantise(x, x.abs().amax(-1, keepdim=True))
    assert values[0].tolist() == [1.0, -3.5, 0.0, 448.0]
    assert scale[0].item() == 1.0
    assert values[1].tolist() == [0.0] * 4
    values, scale = fp8.quantise(x * 2, (x * 2).abs().amax(-1, keepdim=True))
    assert values[0].tolist() == [1.0, -3.5, 0.0, 448.0]
    assert scale[0].item() == 2.0


@needs_interpreter
def test_the_kernels_do_the_arithmetic_of_the_reference():
    """Under Triton's interpreter. What differs is the rounding of sums in another order, which
    can tip a value over to the next e4m3 number."""
    results = interpreted("fp8")
    assert len(results) == 5
    for result in results:
        assert result["error"] < 5e-3
        assert result["dense"]
        assert result["finite"]


@needs_triton
@pytest.mark.parametrize("size", fp8.HEAD_DIMS)
@pytest.mark.parametrize("sm", [89, 90, 120])
def test_the_kernels_compile_and_fit(sm, size):
    """For GPUs that need not be here: 8-bit tensor cores, 16-byte copies, shared memory enough."""
    from wan_models.attention import fp8_triton as kernels

    pointers = {"q": "*fp8e4nv", "k": "*fp8e4nv", "v": "*fp8e4nv", "out": "*bf16",
                "lengths": "*i32", "q_scales": "*fp32", "k_scales": "*fp32", "v_scales": "*fp32"}
    numbers = dict.fromkeys(("out_b", "out_t", "out_h", "heads", "q_padded", "k_padded"), "i")
    stages = 3 if sm == 90 else 2
    kernel = compiled(
        kernels.attention, {**pointers, **numbers, "queries": "i32"},
        {"BLOCK_M": kernels.BLOCK_M, "BLOCK_N": fp8.KEY_BLOCK, "D": size, "SHIFT": fp8.SHIFT},
        sm, num_warps=kernels.WARPS, num_stages=stages,
    )
    text = kernel.asm["ptx"]
    assert ("wgmma.mma_async" if sm == 90 else "mma.sync") in text
    assert "e4m3.e4m3" in text
    assert "cp.async.cg.shared.global" in text
    assert kernel.metadata.shared <= (227 if sm == 90 else 99) * 1024
