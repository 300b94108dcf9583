"""On a GPU: every mode that this machine has, against float64, over memory that held NaN."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch.library import opcheck

import contig_pass
from tests.gpu.attention_operands import BF16, CUDA, operands, poisoned, require
from tests.wan_models import attention_cases as cases
from tests.wan_models.attention_cases import exact, relative_error
from wan_models.attention import fp16, packages, radial, sdpa
from wan_models.attention.kernels import MODES, attention
from wan_models.attention.norm_rope import norm_rope
from wan_models.attention.radial import RadialPattern
from wan_models.attention.varlen import pack
from wan_models.rope import rope_table_1d

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DENSE_MODES = tuple(mode for mode in MODES if mode != "radial")
#: Relative error to float64 of random normal bf16 inputs. 16-bit kernels round the weights and the
#: result to bf16 (2^-9 each); measured on an H100: int8 scores with FP8 weights 0.039, all FP8
#: 0.055. FP4 keeps one bit of mantissa.
TOLERANCES = (
    {"sageattn": 0.06}
    | dict.fromkeys(("fp8", "flash_attn_3_fp8", "auto_fp8"), 0.065)
    | dict.fromkeys(("sageattn_3", "sageattn_3_fp4", "sageattn_3_fp8"), 0.35)
)
TOLERANCE = 0.01


def tolerance(mode: str) -> float:
    return TOLERANCES.get(mode, TOLERANCE)


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize(("queries", "keys"), [(256, 256), (1001, 777), (130, 1), (77, 4095)])
@pytest.mark.parametrize("mode", DENSE_MODES)
def test_values(mode, queries, keys, size):
    require(mode, head_dim=size)
    if keys == 1 and (mode == "sdpa_cudnn" or mode.startswith("sageattn")):
        pytest.skip("takes no single key")
    q, k, v = operands(queries, keys, size=size)
    out = poisoned(lambda: attention(q, k, v, mode=mode), q)
    assert out.dtype == BF16
    assert relative_error(out, exact(q, k, v)) < tolerance(mode)


@pytest.mark.parametrize("lengths", [(777, 5), (128, 777), (64, 64)])
@pytest.mark.parametrize("where", ["cpu", "cuda"])
@pytest.mark.parametrize("mode", DENSE_MODES)
def test_padding(mode, where, lengths):
    """777 keys: the rows of a mask would not start on 16 bytes by themselves."""
    require(mode)
    q, k, v = operands(200, 777)
    lens = torch.tensor(lengths, device=where)
    expected = exact(q, k, v, lens)
    for b, length in enumerate(lengths):
        k[b, length:], v[b, length:] = 30.0, 1e4
    out = poisoned(lambda: attention(q, k, v, mode=mode, k_lens=lens), q)
    assert relative_error(out, expected) < tolerance(mode)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mode", DENSE_MODES)
def test_other_types(mode, masked, dtype):
    require(mode, dtype=dtype)
    q, k, v = operands(100, 333, dtype=dtype)
    lens = torch.tensor([333, 10]) if masked else None
    out = poisoned(lambda: attention(q, k, v, mode=mode, k_lens=lens), q)
    assert out.dtype == dtype
    assert relative_error(out, exact(q, k, v, lens)) < tolerance(mode)


def on_the_gpu(layout: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """``layout`` of x on the GPU, with its strides and its place in its storage."""
    made = layout(x.cpu())
    storage = torch.empty(0, dtype=made.dtype).set_(made.untyped_storage())
    return storage.to(CUDA).as_strided(made.shape, made.stride(), made.storage_offset())


@pytest.mark.parametrize("layout", cases.LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mode", DENSE_MODES)
def test_layouts(mode, masked, layout):
    require(mode)
    q, k, v = operands(130, 260)
    lens = torch.tensor([260, 100]) if masked else None
    views = [on_the_gpu(layout, x) for x in (q, k, v)]
    assert all(torch.equal(x, view) for x, view in zip((q, k, v), views, strict=True))
    before = [view.clone() for view in views]
    out = poisoned(lambda: attention(*views, mode=mode, k_lens=lens), q)
    assert relative_error(out, exact(q, k, v, lens)) < tolerance(mode)
    assert all(torch.equal(x, view) for x, view in zip(before, views, strict=True))  # unwritten


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mode", DENSE_MODES)
def test_misaligned_views_under_contig_safe(mode, masked):
    """One element off inside the graph: flash faults on it, cuDNN misreads it, unrepaired."""
    require(mode)
    q, k, v = operands(130, 260)
    buffers = [torch.cat([x.flatten()[:1], x.flatten()]) for x in (q, k, v)]
    lens = torch.tensor([260, 100], device="cuda") if masked else None
    query, key = tuple(q.shape), tuple(k.shape)

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        views = q[1:].view(query), k[1:].view(key), v[1:].view(key)
        return attention(*views, mode=mode, k_lens=lens)

    compiled = torch.compile(function, backend=contig_pass.contig_safe, fullgraph=True)
    with torch.no_grad():
        out = poisoned(lambda: compiled(*buffers), q)
    assert relative_error(out, exact(q, k, v, lens)) < tolerance(mode)


@pytest.mark.parametrize("layout", [lambda x: x, cases.head_major, cases.padded_slice],
                         ids=["dense", "head_major", "padded_slice"])
@pytest.mark.parametrize(
    "name",
    ["sdpa_flash_varlen", "flash_attn_2", "flash_attn_2_varlen", "flash_attn_3",
     "flash_attn_3_varlen", "flash_attn_3_fp8", "flash_attn_3_fp8_varlen", "flash_attn_4",
     "flash_attn_4_varlen", "sageattn", "sageattn_masked", "sageattn_3", "sageattn_3_masked",
     "fp8_attention", "fp16_attention"],
)
def test_fakes_of_the_real_kernels_are_honest(name, layout):
    mode = name.removesuffix("_varlen").removesuffix("_masked").removesuffix("_attention")
    require(mode)
    q, k, v = (on_the_gpu(layout, x) for x in operands(130, 260))
    lens = torch.tensor([260, 100], device="cuda")
    arguments, tests = (q, k, v), ("test_schema", "test_faketensor")
    if mode == "flash_attn_3_fp8":
        q, k, v = arguments = tuple(x.to(torch.float8_e4m3fn) for x in arguments)
        tests = tests[1:]  # the other's comparison is not implemented for e4m3
    if name.endswith("_varlen"):
        arguments = tuple(pack(q, k, v, lens))
    elif name.endswith("_masked") or name == "fp8_attention":
        arguments = (q, k, v, lens)
    elif name == "fp16_attention":
        parts = operands(130, 260, dtype=torch.float16)
        arguments = (*(on_the_gpu(layout, x) for x in parts), lens, BF16)
    if mode == "flash_attn_3_fp8":
        sequences = 4 if name.endswith("_varlen") else 2
        arguments += tuple(torch.rand(3, sequences, 3, device="cuda"))
    op = getattr(torch.ops.wan_models, name).default
    opcheck(op, arguments, test_utils=tests)


def test_sdpa_runs_what_its_rule_names():
    sm = packages.capability("cuda", 0)
    for dtype in (BF16, torch.float32):
        for lens in (None, torch.tensor([333, 10])):
            q, k, v = operands(100, 333, dtype=dtype)
            backend = sdpa.choose(sm, dtype, 128, masked=lens is not None).backend
            named = attention(q, k, v, mode=f"sdpa_{backend}", k_lens=lens)
            assert torch.equal(attention(q, k, v, mode="sdpa", k_lens=lens), named)


@pytest.mark.parametrize("tokens", [32_760, 75_600])
@pytest.mark.parametrize("mode", DENSE_MODES)
def test_lengths_of_videos(mode, tokens):
    """Neither length is a multiple of 128. Rows here and there against float64."""
    require(mode)
    if mode == "sdpa_math":
        pytest.skip("would hold every score at once")
    q, k, v = operands(tokens, tokens, heads=2, batch=1)
    out = poisoned(lambda: attention(q, k, v, mode=mode), q)
    assert out.isfinite().all()
    rows = torch.tensor([0, 1, 127, 128, 5_000, 20_001, 32_639, 32_640, 32_752, 32_759]).cuda()
    rows = torch.cat([rows, tokens - 1 - rows])
    assert relative_error(out[:, rows], exact(q[:, rows], k, v)) < tolerance(mode) * 1.2


def test_fp8_does_not_see_nan_in_padding():
    require("fp8")
    q, k, v = operands(300, 300)
    lens = torch.tensor([300, 129])
    expected = exact(q, k, v, lens)
    k[1, 129:], v[1, 129:] = torch.nan, torch.nan
    out = poisoned(lambda: attention(q, k, v, mode="fp8", k_lens=lens), q)
    assert relative_error(out, expected) < tolerance("fp8")


def key_block() -> int:
    """Keys of a step of the kernel that this GPU takes."""
    from wan_models.attention import fp8_arithmetic, fp8_triton

    if not fp8_triton.is_hopper(torch.device("cuda", torch.cuda.current_device())):
        return fp8_arithmetic.KEY_BLOCK
    from wan_models.attention import fp8_hopper

    return fp8_hopper.BLOCK_N


#: Batch, queries, keys, heads and valid keys: short, odd, around blocks, beyond what is sampled.
FP8_SHAPES = [
    (1, 1, 1, 1, None), (1, 5, 1, 2, None), (2, 3, 2, 2, None), (1, 64, 3, 3, None),
    (2, 130, 255, 3, None), (1, 128, 256, 2, None), (1, 129, 257, 2, None),
    (2, 1000, 511, 1, (511, 1)), (2, 77, 4095, 3, (4095, 300)), (2, 300, 512, 40, (256, 255)),
    (1, 5000, 4200, 2, None), (2, 4100, 9001, 1, (9001, 33)), (2, 260, 260, 5, (260, 0)),
]


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize(("batch", "queries", "keys", "heads", "lengths"), FP8_SHAPES)
def test_fp8_is_that_of_the_reference_and_the_same_each_time(
    batch, queries, keys, heads, lengths, size
):
    """Operands in registers are read while the tensor cores run: a race would show as a bit."""
    from wan_models.attention import fp8_arithmetic

    require("fp8", head_dim=size)
    q, k, v = operands(queries, keys, size=size, heads=heads, batch=batch)
    k += 3
    lens = None if lengths is None else torch.tensor(lengths, device="cuda")
    reference = fp8_arithmetic.reference(q.float(), k.float(), v.float(), lens, key_block())
    outs = [
        poisoned(lambda: torch.ops.wan_models.fp8_attention(q, k, v, lens), q) for _ in range(8)
    ]
    # Scores in fp16 tip some weights over to the next e4m3 number.
    assert relative_error(outs[0], reference.double()) < 0.035
    assert relative_error(outs[0], exact(q, k, v, lens).nan_to_num(0)) < tolerance("fp8")
    assert all(torch.equal(outs[0], out) for out in outs[1:])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_fp8_sees_what_is_not_finite(value):
    require("fp8")
    for which, place in enumerate(((140, 1), (slice(None), 1), (slice(None), 1, 7))):
        parts = operands(200, 300, batch=1)
        parts[which][0, 140, 1, 7] = value
        bad = ~attention(*parts, mode="fp8").isfinite()[0]
        expected = torch.zeros_like(bad)
        expected[place] = True
        assert torch.equal(bad, expected)


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize(
    ("tokens", "heads", "lengths"),
    [(1, 1, None), (130, 3, None), (777, 5, (777, 300)), (5000, 2, (5000, 4200)), (300, 40, None)],
)
def test_fp8_from_projections(tokens, heads, lengths, size):
    """Against the reference, the steps by themselves, and float64; bit by bit each time."""
    from wan_models.attention import fp8_fused, fp8_values
    from wan_models.layers import WanRMSNorm
    from wan_models.rope import apply_rope, rope_table_1d

    require("fp8", head_dim=size)
    q, k, v = (x.flatten(2) for x in operands(tokens, tokens, size=size, heads=heads))
    k += 1
    weights = (1 + 0.3 * torch.randn(2, heads * size, device="cuda")).to(BF16)
    table = rope_table_1d(torch.arange(max(tokens - 3, 1), device="cuda"), size)
    lens = None if lengths is None else torch.tensor(lengths, device="cuda")

    def turned(dtype: torch.dtype) -> list[torch.Tensor]:
        made = []
        for x, weight in zip((q, k), weights, strict=True):
            norm = WanRMSNorm(heads * size).to(CUDA, dtype)
            norm.weight.data.copy_(weight)
            made.append(apply_rope(norm(x.to(dtype)).unflatten(-1, (heads, size)), table))
        return [x.detach() for x in made]

    split = [x.unflatten(-1, (heads, size)) for x in (q, k, v)]
    outs = [
        poisoned(lambda: fp8_fused.run(q, k, v, *weights, table, 1e-6, lens), split[0])
        for _ in range(4)
    ]
    assert all(torch.equal(outs[0], out) for out in outs[1:])
    values, scales = fp8_values.run(v, size, lens)
    by_torch = fp8_values.run(v.cpu(), size, None if lens is None else lens.cpu())
    torch.testing.assert_close(scales.cpu(), by_torch[1], rtol=1e-6, atol=0)
    assert (values.cpu().float() != by_torch[0].float()).float().mean() < 1e-3
    wide = [x.float() for x in split]
    reference = fp8_fused.fused_reference(*wide, *weights, table, 1e-6, lens, block=key_block())
    assert relative_error(outs[0], reference.double()) < 0.035
    by_steps = attention(*turned(BF16), split[2], mode="fp8", k_lens=lens)
    assert relative_error(outs[0], by_steps.double()) < 0.05
    expected = exact(*turned(torch.float32), split[2], lens)
    assert relative_error(outs[0], expected) < tolerance("fp8")


@pytest.mark.parametrize("mode", ["auto", "auto_fp8"])
def test_auto_is_the_fastest_of_what_it_timed(mode):
    from wan_models.attention import choice, choices, measure

    require(mode)
    made = measure(mode, 1, 2000, 4, 128)
    assert made.mode in made.milliseconds
    assert made.milliseconds[made.mode] == min(made.milliseconds.values())
    assert made in choices().values()
    assert choice(mode).mode == made.mode
    q, k, v = operands(2000, 2000, heads=4, batch=1)
    out = attention(q, k, v, mode=mode)
    assert torch.equal(out, attention(q, k, v, mode=made.mode))


@pytest.mark.parametrize(("grid", "block", "size"), [
    ((9, 8, 16), 64, 64), ((5, 16, 16), 128, 128), ((9, 16, 16), 128, 64),
])
@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
def test_radial(grid, block, size, dtype, masked):
    require("radial", dtype=dtype, head_dim=size)
    pattern = RadialPattern(grid, block=block)
    q, k, v = operands(pattern.tokens, pattern.tokens, size=size, dtype=dtype)
    lens = torch.tensor([pattern.tokens, 333], device="cuda") if masked else None
    expected = radial.masked(q.double(), k.double(), v.double(), lens, pattern)
    for layout in (lambda x: x, *cases.LAYOUTS):
        views = [on_the_gpu(layout, x) for x in (q, k, v)]
        out = poisoned(
            lambda views=views: attention(*views, mode="radial", radial=pattern, k_lens=lens), q
        )
        assert relative_error(out, expected) < TOLERANCE


def test_radial_of_a_video():
    """1280x768, 81 frames: rows here and there against float64."""
    require("radial")
    pattern = RadialPattern((21, 48, 80))
    q, k, v = operands(pattern.tokens, pattern.tokens, heads=2, batch=1)
    out = poisoned(lambda: attention(q, k, v, mode="radial", radial=pattern), q)
    assert out.isfinite().all()
    mask = pattern.block_mask().cuda()
    for row in (0, 5_000, 40_321, pattern.tokens - 1):
        seen = mask[row // 128].repeat_interleave(128)
        for h in range(2):
            scores = k[0, seen, h].double() @ q[0, row, h].double() / math.sqrt(128)
            expected = scores.softmax(0) @ v[0, seen, h].double()
            assert relative_error(out[0, row, h], expected) < 3 * TOLERANCE


@pytest.mark.parametrize(("tokens", "turned"), [(1, 1), (257, 250), (8195, 8195)])
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_norm_with_rotary(tokens, turned, dtype):
    torch.manual_seed(0)
    x = torch.randn(2, tokens, 3 * 1536, device="cuda").to(dtype)[..., 1536:3072]
    weight = torch.randn(1536, device="cuda").to(dtype)
    table = rope_table_1d(torch.arange(turned + 3, device="cuda"), 128)[:, :turned]
    got = poisoned(lambda: norm_rope(x, weight, table, 1e-6), x)
    wide = x.double()
    wide = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    even, odd = wide.unflatten(-1, (12, 64, 2)).unbind(-1)
    cos, sin = torch.nn.functional.pad(table.double(), (0, 0, 0, 0, 0, tokens - turned))
    cos[turned:] = 1
    wanted = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
    bound = 0.003 if dtype == BF16 else 0.0004
    assert relative_error(got, wanted) < bound
    half = poisoned(lambda: norm_rope(x, weight, table, 1e-6, True, torch.float16), x)
    assert relative_error(half, wanted * fp16.score_factor(128)) < bound
    assert torch.equal(half.to(dtype).half(), half)
