"""Our 8-bit attention: its arithmetic on the CPU, its kernels under Triton, its layouts."""

from __future__ import annotations

import pytest
import torch

from tests.wan_models import attention_cases as cases
from tests.wan_models.attention_cases import exact, relative_error
from tests.wan_models.triton_kernels import (
    compiled,
    gluon_compiled,
    interpreted,
    needs_interpreter,
    needs_triton,
)
from wan_models.attention import fp8_arithmetic
from wan_models.attention.kernels import attention

#: e4m3 keeps three bits of mantissa: about 2^-4 / sqrt(3) in each of q, k, v and the weights.
BOUND = 0.06


def operands(
    queries: int, keys: int, size: int = 64, batch: int = 2, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(batch, n, 2, size).to(dtype) for n in (queries, keys, keys)]


@pytest.mark.parametrize("size", fp8_arithmetic.HEAD_DIMS)
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
    amax = shifted.abs().amax((1, 3), keepdim=True)
    values, scale = fp8_arithmetic.quantise(shifted, amax)
    rounded = values * scale  # what 8 bits make of it without that
    assert relative_error(exact(q, rounded, v), exact(q, k, v)) > 3 * BOUND


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


def test_a_channel_that_q_does_not_see_spoils_nothing():
    """It is as large in k as it likes: the balance makes it small before it is spread over all."""
    q, k, v = operands(64, 256)
    q[..., 0] = 0
    k[..., 0] *= 60
    assert relative_error(attention(q, k, v, mode="fp8"), exact(q, k, v)) < BOUND


def test_zeros_stay_zeros():
    q, k, v = operands(3, 5)
    out = attention(q * 0, k * 0, v * 0, mode="fp8")
    assert torch.equal(out, torch.zeros_like(out))
    out = attention(q * 0, k, v, mode="fp8")
    torch.testing.assert_close(out, v.mean(1, keepdim=True).expand_as(out), rtol=0.06, atol=0.02)


def test_arithmetic_of_quantisation():
    x = torch.tensor([[1.0, -3.5, 0.0, 448.0], [0.0, 0.0, 0.0, 0.0]])
    values, scale = fp8_arithmetic.quantise(x, x.abs().amax(-1, keepdim=True))
    assert values[0].tolist() == [1.0, -3.5, 0.0, 448.0]
    assert scale[0].item() == 1.0
    assert values[1].tolist() == [0.0] * 4
    values, scale = fp8_arithmetic.quantise(x * 2, (x * 2).abs().amax(-1, keepdim=True))
    assert values[0].tolist() == [1.0, -3.5, 0.0, 448.0]
    assert scale[0].item() == 2.0


def outliers(kind: str) -> list[torch.Tensor]:
    q, k, v = operands(256, 700, 128, batch=1)
    if kind == "bias":
        k[..., [5, 77]] += 12
        v[..., [3, 60]] *= 20
    elif kind == "same":
        q[..., [5, 77]] *= 4
        k[..., [5, 77]] *= 4
    elif kind == "opposed":
        q[..., [5, 77]] *= 10
        k[..., [5, 77]] *= 0.3
        k[..., [9, 70]] *= 10
        q[..., [9, 70]] *= 0.3
    return [q, k, v]


@pytest.mark.parametrize("kind", ["normal", "bias", "same", "opposed"])
def test_accuracy_with_channels_that_stand_out(kind):
    """The bars of the speed rows: a cosine of 0.998 on average, 0.995 for the worst head."""
    q, k, v = outliers(kind)
    out, expected = attention(q, k, v, mode="fp8").double(), exact(q, k, v)
    cosines = [
        torch.cosine_similarity(out[:, :, h].flatten(), expected[:, :, h].flatten(), 0).item()
        for h in range(2)
    ]
    assert sum(cosines) / 2 >= 0.998
    assert min(cosines) >= 0.995


def test_without_the_balance_and_the_turn_such_channels_spoil_it(monkeypatch):
    """What the two are there for."""
    q, k, v = outliers("same")
    expected = exact(q, k, v)
    right = relative_error(attention(q, k, v, mode="fp8"), expected)
    monkeypatch.setattr(fp8_arithmetic, "hadamard", lambda size: size**0.5 * torch.eye(size))
    assert relative_error(attention(q, k, v, mode="fp8"), expected) > 1.2 * right


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_seen(value):
    """NaN in the row of such a q, in the head of such a k, in the channel of such a v."""
    places = (2, 1), (slice(None), 1), (slice(None), 1, 7)
    for which, place in enumerate(places):
        parts = operands(20, 150, batch=1)
        parts[which][0, 2, 1, 7] = value
        bad = ~attention(*parts, mode="fp8").isfinite()[0]
        expected = torch.zeros_like(bad)
        expected[place] = True
        assert torch.equal(bad, expected)


def test_a_sample_of_long_sequences_is_looked_at():
    """Only the mean and the balance come from it, which may be any: what is not sampled is as
    exact, also where the sample is all zeros, or of another magnitude."""
    tokens = fp8_arithmetic.SAMPLE_ALL + 300
    seen = fp8_arithmetic.sampled(tokens, torch.device("cpu"))
    assert seen.sum() == 18 * 32  # groups 0, 8, ..., 136 of 138
    assert seen[:32].all()
    assert not seen[32:256].any()
    assert fp8_arithmetic.sampled(tokens - 300, torch.device("cpu")).all()
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, n, 1, 64) for n in (40, tokens, tokens))
    for k_factor, v_factor in ((0.0, 0.0), (1.0, 1.0), (0.01, 100.0), (1.0, 0.01)):
        keys, values = k.clone(), v.clone()
        keys[:, seen] *= k_factor
        values[:, seen] *= v_factor
        out, expected = attention(q, keys, values, mode="fp8"), exact(q, keys, values)
        assert relative_error(out, expected) < BOUND


def test_one_value_among_zeros_is_found():
    """Scales of v come from all tokens: a needle that is not in the sample keeps its value."""
    tokens = fp8_arithmetic.SAMPLE_ALL + 300
    q, k, v = (torch.zeros(1, n, 1, 64) for n in (4, tokens, tokens))
    k[:, 100] = q[:] = 4.0  # a score of 128: all the weight
    v[:, 100] = 3.0
    out = attention(q[:, :1].expand(1, 4, 1, 64).contiguous(), k, v, mode="fp8")
    torch.testing.assert_close(out, torch.full_like(out, 3.0), rtol=0.04, atol=0)


@needs_interpreter
@pytest.mark.parametrize(("which", "cases"), [("fp8", 8), ("fp8_fused", 5)])
def test_the_kernels_do_the_arithmetic_of_the_reference(which, cases):
    """Under Triton's interpreter. What differs is the rounding of sums in another order, which
    can tip a value over to the next e4m3 number."""
    results = interpreted(which)
    assert len(results) == cases
    for result in results:
        assert result["error"] < 5e-3
        assert result["dense"]
        assert result["finite"]


@needs_interpreter
def test_the_kernels_see_what_is_not_finite():
    results = interpreted("fp8_poison")
    assert len(results) == 6
    assert all(result["right"] for result in results)


@needs_triton
@pytest.mark.parametrize("size", fp8_arithmetic.HEAD_DIMS)
@pytest.mark.parametrize("sm", [89, 90, 120])
def test_the_kernels_compile_and_fit(sm, size):
    """For GPUs that need not be here: 8-bit tensor cores, 16-byte copies, shared memory enough."""
    from wan_models.attention import fp8_operands
    from wan_models.attention import fp8_triton as kernels

    pointers = {"q": "*fp8e4nv", "k": "*fp8e4nv", "v": "*fp8e4nv", "out": "*bf16",
                "lengths": "*i32", "q_scales": "*fp32", "k_scales": "*fp32", "v_scales": "*fp32"}
    numbers = dict.fromkeys(("out_b", "out_t", "out_h", "q_padded", "k_padded"), "i")
    stages = 3 if sm == 90 else 2
    kernel = compiled(
        kernels.attention, {**pointers, **numbers, "queries": "i32", "heads": "i32"},
        {"BLOCK_M": fp8_operands.BLOCK_M, "BLOCK_N": fp8_arithmetic.KEY_BLOCK, "D": size},
        sm, num_warps=kernels.WARPS, num_stages=stages,
    )
    text = kernel.asm["ptx"]
    assert ("wgmma.mma_async" if sm == 90 else "mma.sync") in text
    assert "e4m3.e4m3" in text
    assert "cp.async.cg.shared.global" in text
    assert kernel.metadata.shared <= (227 if sm == 90 else 99) * 1024


@needs_triton
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("sm", "block"), [(89, 128), (90, 256), (120, 128)])
def test_the_passes_compile_and_fit(sm, block, fused):
    """The two that turn by a matrix, with what they load by vectors of 16 bytes."""
    from wan_models.attention import fp8_quantise as passes

    wide = ("x_b", "q_b", "q_t", "q_h", "k_b", "k_t", "k_h", "padded", "table_b", "table_t",
            "table_half")
    types = dict.fromkeys(("q", "k", "hadamard", "weight"), "*bf16") | dict.fromkeys(wide, "i")
    types |= dict.fromkeys(
        ("means", "balance", "scales", "squares", "norms"), "*fp32"
    ) | dict.fromkeys(("heads", "count", "tokens", "turned"), "i32")
    types |= {"out": "*fp8e4nv", "table": "*fp16", "lengths": "*i32", "factor": "fp32"}
    for kernel, constants, warps in (
        (passes.quantise_queries, {"BLOCK": 64}, 4),
        (passes.quantise_keys, {"BLOCK": block, "REORDER": sm == 90}, 8),
    ):
        constants = {**constants, "D": 128, "FUSED": fused}
        made = compiled(
            kernel, {name: types[name] for name in kernel.arg_names if name not in constants},
            constants, sm, num_warps=warps,
        )
        assert "ld.global.v4.b32" in made.asm["ptx"]
        assert made.metadata.shared <= (227 if sm == 90 else 99) * 1024


@needs_triton
@pytest.mark.parametrize("size", fp8_arithmetic.HEAD_DIMS)
def test_the_kernel_for_hopper_compiles_and_fits(size):
    """Both products on the 8-bit tensor cores, operands by TMA, no register to memory."""
    from triton.experimental.gluon.language import NVMMASharedLayout

    from wan_models.attention import fp8_hopper as hopper

    def tiles(rows: int, columns: int) -> str:
        layout = NVMMASharedLayout(min(columns, 128), 8, 2)
        return f"tensordesc<fp8e4nv[{rows}, {columns}],{layout!r}>"

    block = hopper.BLOCK_N
    constants = {"D": size, "N": block, "STAGES": hopper.STAGES, "REGISTERS": hopper.REGISTERS}
    types = {"q": tiles(64, size), "k": tiles(block, size), "v": tiles(size, block),
             "q_scales": "*fp32", "k_scales": "*fp32", "v_scales": "*fp32", "lengths": "*i32",
             "out": "*bf16"}
    kernel = gluon_compiled(
        hopper.attention, types, constants, ("q", "k", "v", "queries", "heads")
    )
    text = kernel.asm["ptx"]
    assert "wgmma.mma_async.sync.aligned.m64n256k32.f16.e4m3.e4m3" in text
    assert f"wgmma.mma_async.sync.aligned.m64n{size}k32.f32.e4m3.e4m3" in text
    assert "cp.async.bulk.tensor.2d" in text
    assert "ld.local" not in text
    assert kernel.metadata.shared <= 227 * 1024
