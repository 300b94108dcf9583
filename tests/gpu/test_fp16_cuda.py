"""On a GPU: our own 16-bit attention kernel, against float64, over memory that held NaN."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.attention_operands import BF16, CUDA, operands, poisoned, require
from tests.wan_models.attention_cases import exact, relative_error
from wan_models import quantize_
from wan_models.attention import WanSelfAttention
from wan_models.attention.kernels import attention
from wan_models.quant.fused import rows_of
from wan_models.rope import rope_table_1d

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
#: Around the 64 queries of a consumer, the 192 of a program and the 128 keys of a block.
FP16_SHAPES = [
    (1, 1), (63, 127), (64, 128), (65, 129), (127, 255), (128, 256), (129, 257), (191, 384),
    (192, 385), (193, 2), (385, 641), (1000, 4095),
]


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize(("queries", "keys"), FP16_SHAPES)
def test_fp16_at_any_length_and_the_same_each_time(queries, keys, dtype, size):
    require("fp16", dtype, size)
    q, k, v = operands(queries, keys, size=size, dtype=dtype)
    outs = [poisoned(lambda: attention(q, k, v, mode="fp16"), q) for _ in range(4)]
    assert relative_error(outs[0], exact(q, k, v)) < 0.005
    assert all(torch.equal(outs[0], out) for out in outs[1:])


@pytest.mark.parametrize("size", [64, 128])
def test_fp16_of_sharp_scores(size):
    """Off by what rounding q and k to bf16 costs."""
    require("fp16", head_dim=size)
    parts = operands(200, 2000, size=size, dtype=torch.float32)
    q, k, v = 4 * parts[0], 4 * parts[1], parts[2]
    expected, narrow = exact(q, k, v), [x.to(BF16) for x in (q, k, v)]
    rounding = relative_error(exact(*narrow), expected)
    out = poisoned(lambda: attention(*narrow, mode="fp16"), narrow[0])
    assert relative_error(out, expected) < 2 * rounding


@pytest.mark.parametrize("which", [1, 2], ids=["k", "v"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("lengths", [(300, 129), (128, 1), (300, 0)])
def test_fp16_does_not_see_padding(which, value, lengths):
    require("fp16")
    parts = operands(300, 300)
    lens = torch.tensor(lengths, device="cuda")
    expected = poisoned(lambda: attention(*parts, mode="fp16", k_lens=lens), parts[0])
    assert relative_error(expected, exact(*parts, lens).nan_to_num(0)) < 0.005
    for b, length in enumerate(lengths):
        parts[which][b, length:] = value
    out = poisoned(lambda: attention(*parts, mode="fp16", k_lens=lens), parts[0])
    assert torch.equal(out, expected)


def test_fp16_reads_lengths_at_any_stride():
    require("fp16")
    q, k, v = operands(130, 260)
    lens = torch.tensor([[260, 3], [100, 7]], device="cuda")[:, 0]
    out = attention(q, k, v, mode="fp16", k_lens=lens)
    assert torch.equal(out, attention(q, k, v, mode="fp16", k_lens=lens.clone().contiguous()))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_fp16_sees_what_is_not_finite(which):
    require("fp16")
    parts = operands(200, 300, batch=1)
    expected = attention(*parts, mode="fp16")
    parts[which][0, 140, 1, 7] = 7e4 if which == 2 else torch.nan
    reached = torch.zeros_like(expected, dtype=torch.bool)
    reached[0][((140, 1), (slice(None), 1), (slice(None), 1, 7))[which]] = True
    out = attention(*parts, mode="fp16")
    assert torch.equal(~out.isfinite(), reached)
    assert torch.equal(out[~reached], expected[~reached])


@pytest.mark.parametrize("size", [64, 128])
def test_fp16_takes_strides_that_descriptors_do_not(size):
    """Expanded dimensions, and those of one element, whose stride may be anything."""
    require("fp16", head_dim=size)
    q, k, v = operands(130, 260, size=size, heads=3, dtype=torch.float16)
    op = torch.ops.wan_models.fp16_attention
    for x in (k[:1].expand(2, -1, -1, -1), k[:, :, :1].expand(-1, -1, 3, -1),
              k[:, :1].expand(-1, 260, -1, -1)):
        assert torch.equal(op(q, x, x, None, BF16), op(q, *[x.contiguous()] * 2, None, BF16))
    one = [x[:1, :, :1].contiguous() for x in (q, k, v)]
    odd = [x.as_strided(x.shape, (3, size, 5, 1)) for x in one]
    assert torch.equal(op(*odd, None, BF16), op(*one, None, BF16))


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("tokens", [60, 2000])
def test_fp16_from_quantised_rows(tokens, size):
    """The layer's own q, k and v in fp16, against exact attention on what the steps make."""
    require("fp16", head_dim=size)
    torch.manual_seed(0)
    attn = WanSelfAttention(6 * size, 6, mode="fp16").to(CUDA, BF16).requires_grad_(False)
    quantize_(attn, "fp8_e4m3fn_rowwise_fast")
    attn.o = torch.nn.Identity()
    rows = rows_of(torch.randn(2, tokens, 6 * size, device="cuda", dtype=BF16))
    table = rope_table_1d(torch.arange(tokens - 3, device="cuda"), size)
    out = attn(rows, table)
    assert relative_error(out, exact(*attn.project(rows, table)).flatten(2)) < 0.006
