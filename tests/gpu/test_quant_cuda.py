"""On a GPU: the quantising kernels against float64, over memory that held NaN, and whole blocks."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import contig_pass
from wan_models import TINY, WanBlock, block_inputs, quantize_
from wan_models.quant import fused, high_precision, quantized
from wan_models.quant.feed_forward import in_slices
from wan_models.quant.fp4_ops import FEW_ROWS, expand_fp4, fp4_few_rows
from wan_models.quant.nvfp4 import dequantize_nvfp4, nvfp4_to_e4m3, quantize_nvfp4
from wan_models.quant.recipes import E4M3
from wan_models.quant.rows import quantise_rows
from wan_models.quant.rows_linear import fp8_rows_linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
        reason="needs a CUDA device that multiplies FP8",
    ),
]
BF16 = torch.bfloat16
#: Rows from which a kernel takes several at a time, not a multiple of how many.
MANY = 8195


@pytest.fixture(autouse=True)
def other_numbers() -> None:
    """Than :func:`outliers` draws: a weight equal to its activations makes sums of one sign."""
    torch.manual_seed(1)


def outliers(*shape: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))
    x[..., ::97] *= 30
    return x.to(BF16)


def poison() -> None:
    """Leave NaN, of e4m3 too, in what the caching allocator hands out next."""
    held = torch.full((1 << 28,), 0x7F, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    del held


def assert_rows(made: tuple[torch.Tensor, torch.Tensor], wanted: torch.Tensor) -> None:
    values, scale = made
    step = wanted.abs().amax(-1, keepdim=True) / 448
    torch.testing.assert_close(scale.double(), step, rtol=1e-5, atol=0)
    exact = wanted / step
    grain = torch.exp2(torch.floor(torch.log2(exact.abs().clamp(min=2.0**-6))) - 3)
    assert ((values.double() - exact).abs() / grain).max() < 0.51  # half a step, and fp32


def check_linear(got: torch.Tensor, wanted: torch.Tensor, most: float) -> None:
    error = (got.double() - wanted).norm() / wanted.norm()
    assert error < most, error.item()


@pytest.mark.parametrize(("tokens", "width"), [(1, 1536), (257, 5120), (MANY, 512), (77, 13824)])
def test_rows(tokens, width):
    x = outliers(2, tokens, 3 * width)[..., width : 2 * width]
    poison()
    assert_rows(fused.quantise_rows(x), x.double())
    poison()
    wanted = F.gelu(x[0].double(), approximate="tanh")
    assert_rows(fused.gelu_quantise(x[0], None, None, None), wanted)
    rows, columns = torch.rand(tokens, 1, device="cuda"), torch.rand(width, device="cuda")
    bias = torch.randn(width, device="cuda", dtype=BF16)
    y = x[0].double() * rows.double() * columns.double() + bias.double()
    poison()
    made = fused.gelu_quantise(x[0], rows, columns, bias)
    assert_rows(made, F.gelu(y, approximate="tanh"))


@pytest.mark.parametrize(
    ("tokens", "steps", "width"),
    [(1, 1, 1536), (129, 129, 5120), (MANY, 1, 5120), (MANY, MANY, 96)],
)
def test_norms(tokens, steps, width):
    x, branch = outliers(2, tokens, width), outliers(2, tokens, width, seed=1)
    e = torch.randn(2, steps, 6, width, device="cuda")
    shift, scale, gate = e[:, :, 0], e[:, :, 1], e[:, :, 2]
    weight, bias = torch.randn(2, width, device="cuda", dtype=BF16)

    def normed(v):
        return F.layer_norm(v.double(), (width,), eps=1e-6)

    poison()
    made = fused.norm_quantise(x, None, None, shift, scale, 1e-6)
    assert_rows(made, normed(x) * (1 + scale.double()) + shift.double())
    for opened, affine, moved in (
        (gate, (weight, bias), (None, None)), (None, (None, None), (shift, scale))
    ):
        poison()
        total, *made = fused.add_norm_quantise(x, branch, opened, *affine, *moved, 1e-6)
        wanted = x.double() + branch.double() * (1 if opened is None else opened.double())
        torch.testing.assert_close(total.double(), wanted, rtol=2**-8, atol=2**-7)
        y = normed(total)
        y = y * weight.double() + bias.double() if affine[0] is not None else y
        y = y * (1 + scale.double()) + shift.double() if moved[0] is not None else y
        assert_rows(tuple(made), y)


@pytest.mark.parametrize(
    ("m", "k", "n"),
    # One row; sizes of no tile; enough tiles for the kernel of Hopper, whole and in part.
    [(1, 64, 48), (300, 5120, 272), (4160, 5120, 1296), (2111, 13824, 5120), (8192, 128, 512)],
)
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_products_of_rows(m, k, n, dtype):
    values, scale = quantise_rows(outliers(m, k))
    wide, columns = torch.randn(n, k, device="cuda"), torch.rand(n, device="cuda") + 0.1
    weight, bias = wide.to(E4M3), torch.randn(n, device="cuda", dtype=dtype)
    for column_scale, added in ((columns, bias), (columns[:1].clone(), None)):
        wanted = values.double() @ weight.double().t() * scale.double() * column_scale.double()
        wanted = wanted if added is None else wanted + added.double()
        poison()
        got = fp8_rows_linear(values, scale, weight, column_scale, added, dtype)
        # bf16 rounds by 0.0017 on average, fast accumulation by 0.003.
        check_linear(got, wanted, 2**-7)
        assert torch.equal(fp8_rows_linear(values, scale, weight, column_scale, added, dtype), got)


@pytest.mark.parametrize("width", [1536, 5120, 13824])
@pytest.mark.parametrize("recipe", ["fp8_e4m3fn_rowwise_fast", "fp8_e4m3fn_scaled_fast"])
def test_sums_of_one_sign(recipe, width):
    """Fast accumulation cuts off what falls below a sum: all errors have the same sign here."""
    linear = torch.nn.Linear(width, 512, bias=False, device="cuda", dtype=BF16)
    linear.weight.data.uniform_(0, 0.05)
    x = torch.rand(4096, width, device="cuda").to(BF16)
    wanted = x.double() @ linear.weight.double().t()
    # As documented in wan_models/quant/rows_linear.py; below 0.04 only to K = 2,000.
    check_linear(quantized(linear, recipe)(x), wanted, 0.015 + width * 2**-16)
    check_linear(quantized(linear, "fp8_e4m3fn_scaled")(x), wanted, 0.04)


def test_slices_of_the_feed_forward():
    values, scale = quantise_rows(outliers(1000, 1536))
    first = (torch.randn(8960, 1536, device="cuda").to(E4M3),
             torch.rand(8960, device="cuda") / 1536, torch.randn(8960, device="cuda", dtype=BF16))
    second = (torch.randn(1536, 8960, device="cuda").to(E4M3),
              torch.rand(1536, device="cuda") / 8960, None)
    hidden = values.double() @ first[0].double().t() * scale.double() * first[1] + first[2].double()
    wanted = F.gelu(hidden, approximate="tanh") @ second[0].double().t() * second[1]
    for tokens in (1000, 384):
        poison()
        got = in_slices(values, scale, first, second, BF16, tokens)
        assert got.isfinite().all()
        check_linear(got, wanted, 0.03)


@pytest.mark.parametrize(("n", "k"), [(5120, 5120), (13824, 5120), (48, 96)])
def test_fp4_weights(n, k):
    stored = quantize_nvfp4(torch.randn(n, k, device="cuda") * 0.03)
    poison()
    expanded = expand_fp4(stored.packed, stored.block_scale)
    assert torch.equal(expanded.float(), nvfp4_to_e4m3(stored)[0].float())
    for rows in range(1, FEW_ROWS + 1):
        x = outliers(rows, k + 1)[:, 1:]  # off by two bytes
        bias = torch.randn(n, device="cuda", dtype=BF16)
        poison()
        got = fp4_few_rows(x, *stored, bias)
        wanted = x.double() @ dequantize_nvfp4(stored).double().t() + bias.double()
        check_linear(got, wanted, 2**-8)


@pytest.mark.parametrize(
    ("recipe", "least"),
    [("fp8_e4m3fn_rowwise_fast", 0.999), ("fp8_e4m3fn_scaled_fast", 0.999),
     ("fp4_scaled_fast", 0.99), ("auto_fp8", 0.999), ("auto_fp4", 0.99)],
)
def test_compiled_blocks(recipe, least):
    """One graph without a copy, near the exact block; graphs of CUDA replay it to the bit."""
    config = replace(TINY, dim=1536, ffn_dim=8960, num_heads=12)
    torch.manual_seed(0)
    with torch.device("cuda"):
        exact = WanBlock(config).eval().requires_grad_(False)
    inputs = block_inputs(config, (3, 20, 25), dtype=BF16, device="cuda")
    with torch.no_grad():
        wanted = exact(inputs[0].float(), inputs[1], inputs[2].float(), *inputs[3:])
        block = copy.deepcopy(exact).to(BF16)
        rows = quantize_(block, recipe, high_precision(block))
        assert {row.action for row in rows} == {"quantised"}
        torch._dynamo.reset()
        compiled = torch.compile(block, backend=contig_pass.contig_safe, fullgraph=True)
        poison()
        got = compiled(*inputs)
        assert contig_pass.last_reports()[-1].fixes == ()
        assert F.cosine_similarity(got.float().flatten(), wanted.flatten(), dim=0) > least
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            compiled(*inputs)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = compiled(*inputs)
        replayed.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(replayed, got)
