"""The figures of the speed benchmarks: accuracy, work, and which part of a block a kernel is."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from benchmarks.speed import accuracy, attention, gemm, ours, profile, quant_attention
from benchmarks.speed.sizes import SIZES, SMOKE, block_flops, model_flops


def test_accuracy_measures() -> None:
    x = torch.tensor([3.0, 4.0])
    assert accuracy.cosine(x, 2 * x) == pytest.approx(1)
    assert accuracy.cosine(torch.tensor([4.0, -3.0]), x) == pytest.approx(0)
    assert accuracy.relative_l1(torch.tensor([3.0, 4.7]), x) == pytest.approx(0.1, rel=1e-5)
    both = accuracy.worst({
        "a": {"cosine": 0.9, "relative L1": 0.1}, "b": {"cosine": 0.8, "relative L1": math.nan}
    })
    assert both["cosine"] == 0.8
    assert math.isnan(both["relative L1"])
    heads = torch.randn(5, 3, 8)
    turned = heads.clone()
    turned[:, 1] = -turned[:, 1]
    assert accuracy.head_cosines(turned, heads).tolist() == pytest.approx([1, -1, 1])


def test_the_attention_reference_is_attention() -> None:
    q, k, v = (torch.randn(1, 20, 2, 8) for _ in range(3))
    rows = torch.tensor([0, 7, 19])
    exact = torch.nn.functional.scaled_dot_product_attention(
        *(x.double().transpose(1, 2) for x in (q, k, v))
    ).transpose(1, 2)
    torch.testing.assert_close(attention.reference(q, k, v, rows), exact[0, rows])


def test_deferred_scales_are_applied_to_the_rows_asked_for() -> None:
    x, weight, bias = torch.randn(6, 32), torch.randn(16, 32), torch.randn(16)
    values, row_scale = gemm.by_row(x)
    weights, column_scale = gemm.by_row(weight)
    sums = values.float() @ weights.float().t()
    made = gemm.Deferred(sums, row_scale, column_scale.flatten(), bias)
    rows = torch.tensor([1, 4])
    exact = torch.nn.functional.linear(x[rows], weight, bias)
    assert accuracy.cosine(gemm.some(made, rows), exact) > 0.998


def test_scores_are_held_against_those_of_normed_and_turned_projections() -> None:
    size = SMOKE["480p"]
    heads, tokens = size.config.num_heads, size.tokens
    given = quant_attention._projections(size, "cpu")
    q, k = (
        quant_attention._turned(x.float(), w.float(), given.rope, heads)[0].transpose(0, 1)
        for x, w in zip(given[:2], given.weights, strict=True)
    )
    # Scales of three blocks of k and of every row of q; a constant is taken off k.
    k_scales = torch.tensor([1.0, 2.0, 4.0]).repeat(heads, 1)
    blocks = k_scales.repeat_interleave(tokens // 3, 1)[..., None]
    q_scales = torch.rand(heads, tokens) + 0.5
    made = SimpleNamespace(
        q=q / q_scales[..., None], q_scales=q_scales, k=(k - 3) / blocks, k_scales=k_scales
    )
    assert quant_attention.score_cosine(given, made) == pytest.approx(1, abs=1e-6)
    made.k = made.k.roll(1, dims=1)
    assert quant_attention.score_cosine(given, made) < 0.9


def test_the_attention_of_a_row_is_named() -> None:
    size = SMOKE["480p"]
    assert ours.measured_attention("sdpa", size, "cpu") == {
        "attention mode": "sdpa", "attention": "sdpa"
    }
    assert ours.measured_attention("auto_fp8", size, "cpu")["attention"] == "fp8"
    assert ours.measured_attention("auto", size, "cpu")["attention"] == "sdpa"


def test_the_work_of_a_forward_is_that_of_the_published_model() -> None:
    # 783 TFLOP in linears, 879 in attention and 14 in the text's at 480p, 6,521 in all at 720p.
    size = SIZES["480p"]
    parts = {k: 40 * v / 1e12 for k, v in block_flops(size.tokens, size.config).items()}
    assert parts["linears"] == pytest.approx(783, rel=0.02)
    assert parts["attention"] == pytest.approx(879, rel=0.01)
    assert parts["text attention"] == pytest.approx(14, rel=0.05)
    assert model_flops(75_600, size.config) / 1e12 == pytest.approx(6521, rel=0.01)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("nvjet_qqtst_128x256_128x6_2x1_v_bz_bias_TNT", profile.LINEARS),
        ("void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm90<cutlass::gemm::"
         "kernel::GemmUniversal<int>>>(int)", profile.LINEARS),
        ("void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<int>>>(int)",
         profile.ATTENTION),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7", profile.ATTENTION),
        ("attention", profile.ATTENTION),
        ("row_scaled_product", profile.LINEARS),
        ("expand", profile.LINEARS),
        ("few_rows", profile.LINEARS),
        ("quantise_queries", profile.OPERANDS),
        ("quantise_values", profile.OPERANDS),
        ("settle_values", profile.OPERANDS),
        ("norm_scales", profile.OPERANDS),
        ("norms", profile.OPERANDS),
        ("quantise", profile.ELEMENTWISE),
        ("add_norm_quantise", profile.ELEMENTWISE),
        ("gelu_quantise", profile.ELEMENTWISE),
        ("smooth_keys", profile.ELEMENTWISE),
        ("triton_red_fused__scaled_mm_add_gelu_3", profile.ELEMENTWISE),
        ("triton_poi_fused__scaled_dot_product_cudnn_attention_2", profile.ELEMENTWISE),
        ("Memcpy DtoD (Device -> Device)", profile.ELEMENTWISE),
    ],
)
def test_kernels_by_part(name: str, part: str) -> None:
    assert profile.part_of(name) == part


def test_short_attention_kernels_are_those_of_the_text() -> None:
    launched = [
        profile.Kernel("flash_fwd", 24.0), profile.Kernel("flash_fwd", 1.0),
        profile.Kernel("nvjet_gemm", 3.0), profile.Kernel("triton_poi_fused_add_0", 0.5),
    ]
    assert profile.by_part(launched) == {
        "linears": 3.0, "attention": 24.0, "text attention": 1.0, "attention operands": 0.0,
        "elementwise": 0.5,
    }
