"""Radial attention: the pattern against its definition, the attention against a masked softmax."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.library import opcheck

import contig_pass
from tests.wan_models import attention_cases as cases
from tests.wan_models.attention_cases import relative_error
from tests.wan_models.triton_kernels import (
    compiled,
    interpreted,
    needs_interpreter,
    needs_triton,
)
from wan_models.attention import radial
from wan_models.attention.kernels import attention
from wan_models.attention.radial import RadialPattern

GRIDS = [((9, 8, 8), 64), ((6, 8, 16), 64), ((5, 16, 16), 128), ((1, 8, 8), 64)]


def allowed(i: int, j: int, row: int, column: int, frame: int, decay: float, block: int) -> bool:
    """The definition, for one query and one key."""
    if j == 0 or i == j:
        return True
    distance, apart = abs(i - j), abs(row - column)
    if distance == 1:
        return apart <= frame / 2
    quotient = 2 ** len(bin(frame)[2:]) / 2 ** len(bin(distance)[2:])
    if quotient < block and distance % math.floor(block / quotient):
        return False
    return apart <= max(quotient * decay, block)


def defined_blocks(pattern: RadialPattern) -> np.ndarray:
    """Kept blocks by counting every pair of tokens of every pair of frames."""
    frames, frame, block = pattern.grid[0], pattern.frame, pattern.block
    side = frame // block
    kept = np.zeros((frames * side, frames * side), dtype=bool)
    for i in range(frames):
        for j in range(frames):
            pairs = np.array([
                [allowed(i, j, r, c, frame, pattern.decay, block) for c in range(frame)]
                for r in range(frame)
            ])
            for m in range(side):
                for n in range(side):
                    part = pairs[m * block : (m + 1) * block, n * block : (n + 1) * block]
                    columns = [part[:, c].mean() for c in range(block) if part[:, c].any()]
                    dense = sum(density > 1 / 3 for density in columns)
                    if columns and dense / len(columns) > 0.6:
                        kept[i * side + m, j * side + n] = True
    return kept


def masked_softmax(q, k, v, pattern: RadialPattern, k_lens=None) -> torch.Tensor:
    """Attention in float64 where every query sees the keys of its kept blocks."""
    blocks, size = pattern.block_mask(), pattern.block
    out = torch.empty(q.shape, dtype=torch.float64)
    for b in range(q.shape[0]):
        length = q.shape[1] if k_lens is None else int(k_lens[b])
        for at in range(0, q.shape[1], size):
            seen = [
                key for n, keep in enumerate(blocks[at // size].tolist()) if keep
                for key in range(n * size, (n + 1) * size) if key < length
            ]
            for h in range(q.shape[2]):
                rows = q[b, at : at + size, h].double()
                scores = rows @ k[b, seen, h].double().t() / math.sqrt(q.shape[-1])
                out[b, at : at + size, h] = scores.softmax(-1) @ v[b, seen, h].double()
    return out


def operands(pattern: RadialPattern, batch: int = 2, size: int = 64) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(batch, pattern.tokens, 2, size) for _ in range(3)]


def test_window_of_the_fixture():
    assert radial.window(1560, 2, 0.2, 128) == 128
    assert radial.window(1560, 2, 0.5, 128) == 256
    assert radial.window(1560, 3, 0.5, 64) == 256  # 2 and 3 have as many bits
    assert radial.window(1560, 4, 0.5, 64) == 128


def test_sieve():
    assert not radial.sieved(1560, 20, 64)  # 2048 / 32 = 64
    assert radial.sieved(1560, 20, 128) is False  # multiples of 128 / 64 = 2 stay
    assert radial.sieved(1560, 21, 128)


@pytest.mark.parametrize(("grid", "block"), GRIDS)
@pytest.mark.parametrize("decay", [0.2, 1.0])
def test_blocks_are_those_of_the_definition(grid, block, decay):
    pattern = RadialPattern(grid, decay=decay, block=block)
    assert np.array_equal(pattern.block_mask().numpy(), defined_blocks(pattern))


def test_blocks_of_a_video():
    """1280x768, 81 frames: the sink and the diagonal are full, far frames are sieved out."""
    pattern = RadialPattern((21, 48, 80))
    side, mask = pattern.frame // 128, pattern.block_mask()
    frames = mask.view(21, side, 21, side)
    assert frames[:, :, 0].all()
    assert all(frames[i, :, i].all() for i in range(21))
    assert torch.equal(frames[3, :, 1], frames[7, :, 5])  # by distance alone
    # bits(3840) = 12, so 16 frames apart the quotient is 4096 / 32 = 128: nothing is sieved
    assert frames[20, :, 1].any()
    assert 0.15 < pattern.density() < 0.3
    assert pattern.density() == pytest.approx(mask.float().mean().item(), rel=1e-6)


def test_far_frames_are_sieved():
    pattern = RadialPattern((9, 8, 16), block=64)  # 2^8 / 2^bits: 32 from distance 4 on
    frames = pattern.block_mask().view(9, 2, 9, 2)
    assert frames[7, :, 3].any()  # distance 4, a multiple of 2
    assert not frames[8, :, 3].any()  # distance 5


@pytest.mark.parametrize(("grid", "block"), GRIDS)
@pytest.mark.parametrize("masked", [False, True])
def test_values(grid, block, masked):
    pattern = RadialPattern(grid, block=block)
    q, k, v = operands(pattern)
    lens = torch.tensor([pattern.tokens, pattern.tokens // 2 + 3]) if masked else None
    out = attention(q, k, v, mode="radial", radial=pattern, k_lens=lens)
    assert out.is_contiguous()
    assert relative_error(out, masked_softmax(q, k, v, pattern, lens)) < 1e-6


def test_every_key_within_reach_is_dense_attention():
    pattern = RadialPattern((1, 8, 8), block=64)
    q, k, v = operands(pattern)
    out = attention(q, k, v, mode="radial", radial=pattern)
    assert relative_error(out, cases.exact(q, k, v)) < 1e-6


def test_masks_stay_small(monkeypatch):
    """Pieces of a few rows of blocks give the values of one piece."""
    pattern = RadialPattern((5, 8, 8), block=64)
    q, k, v = operands(pattern)
    lens = torch.tensor([320, 100])
    whole = attention(q, k, v, mode="radial", radial=pattern, k_lens=lens)
    sizes = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def recorded(*arguments, attn_mask):
        sizes.append(attn_mask.numel())
        return plain(*arguments, attn_mask=attn_mask)

    monkeypatch.setattr(radial, "_MASK_ELEMENTS", 2 * 64 * 320 * 2)
    monkeypatch.setattr(radial.F, "scaled_dot_product_attention", recorded)
    pieces = attention(q, k, v, mode="radial", radial=pattern, k_lens=lens)
    assert len(sizes) == 3
    assert max(sizes) == 2 * 64 * 320 * 2
    torch.testing.assert_close(pieces, whole)


@pytest.mark.parametrize("layout", cases.LAYOUTS, ids=lambda f: f.__name__)
def test_layouts_give_the_values_of_dense_operands(layout):
    pattern = RadialPattern((3, 8, 8), block=64)
    dense = operands(pattern)
    out = attention(*map(layout, dense), mode="radial", radial=pattern)
    torch.testing.assert_close(out, attention(*dense, mode="radial", radial=pattern))


@pytest.mark.parametrize("layout", [None, cases.head_major, cases.padded_slice])
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(layout, masked):
    pattern = RadialPattern((2, 8, 8), block=64)
    q, k, v = (x if layout is None else layout(x) for x in operands(pattern))
    lens = torch.tensor([128, 70]) if masked else None
    opcheck(
        torch.ops.wan_models.radial_attention.default,
        (q, k, v, lens, list(pattern.grid), pattern.decay, pattern.block),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration",
                    "test_aot_dispatch_static"),
    )


@pytest.mark.parametrize("layout", [cases.misaligned, cases.strided], ids=lambda f: f.__name__)
def test_one_graph_in_which_contig_safe_supplies_the_layout(layout):
    pattern = RadialPattern((3, 8, 8), block=64)
    dense = operands(pattern)

    def function(q, k, v, lens, pattern):
        q, k, v = (layout(x) for x in (q, k, v))
        return attention(q, k, v, mode="radial", radial=pattern, k_lens=lens)

    compiled_function = torch.compile(
        function, backend="contig_safe", fullgraph=True, options={"inner": "aot_eager"}
    )
    lens = torch.tensor([192, 130])
    expected = attention(*dense, mode="radial", radial=pattern, k_lens=lens)
    assert torch.equal(compiled_function(*dense, lens, pattern), expected)
    assert contig_pass.last_reports()[-1].totals.fixes == 3
    if layout is cases.strided:
        with pytest.raises(ValueError, match="last dimension of q must be unit-stride"):
            function(*dense, lens, pattern)


def test_caches_are_bounded():
    assert radial._block_mask.cache_info().maxsize is not None
    assert radial.kept_blocks.cache_info().maxsize is not None
    pattern = RadialPattern((2, 8, 8), block=64)
    mask = pattern.block_mask()
    mask.zero_()  # the caller's own
    assert pattern.block_mask().any()


def test_lists_of_kept_blocks():
    pattern = RadialPattern((9, 8, 16), block=64)
    starts, columns = radial.kept_blocks(pattern, torch.device("cpu"))
    mask = pattern.block_mask()
    assert starts.dtype == columns.dtype == torch.int32
    for row, line in enumerate(mask):
        listed = columns[starts[row] : starts[row + 1]]
        assert listed.tolist() == line.nonzero().flatten().tolist()


@needs_interpreter
def test_the_kernel_gives_the_values_of_the_masked_softmax():
    """Under Triton's interpreter, in fp32."""
    results = interpreted("radial")
    assert len(results) == 4
    for result in results:
        assert result["error"] < 1e-5
        assert result["dense"]


@needs_triton
@pytest.mark.parametrize("sm", [80, 89, 90, 120])
@pytest.mark.parametrize("masked", [False, True])
def test_the_kernel_compiles_and_fits(sm, masked):
    from wan_models.attention import radial_triton as kernels

    pointers = {"q": "*bf16", "k": "*bf16", "v": "*bf16", "out": "*bf16", "lengths": "*i32",
                "starts": "*i32", "columns": "*i32", "factor": "fp32", "heads": "i32"}
    strides = {f"{x}_{d}": "i" for x in ("q", "k", "v", "out") for d in "bth"}
    kernel = compiled(
        kernels.sparse_attention, {**pointers, **strides},
        {"BLOCK": 128, "STEP": kernels.STEP, "D": 128, "MASKED": masked},
        sm, num_warps=8, num_stages=3 if sm in (80, 90) else 2,
    )
    assert ("wgmma.mma_async" if sm == 90 else "mma.sync") in kernel.asm["ptx"]
    assert kernel.metadata.shared <= {80: 163, 90: 227}.get(sm, 99) * 1024


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RadialPattern((21, 30, 52)),
         r"60 mod 16 = 12, 104 mod 16 = 8, 30\*52 = 1560 mod 128 = 24"),
        (lambda: RadialPattern((21, 8, 24), block=128), r"8\*24 = 192 mod 128 = 64"),
        (lambda: RadialPattern((21, 8, 8), block=32), r"block=32, use one of \(64, 128\)"),
        (lambda: RadialPattern((21, 8, 8), decay=0.0), "decay=0.0, use a positive number"),
        (lambda: RadialPattern((21, 8, 8), decay=float("nan")), "decay=nan"),
        (lambda: RadialPattern([21, 8, 8]), r"grid=\[21, 8, 8\], use a tuple"),
        (lambda: RadialPattern((0, 8, 8)), r"grid=\(0, 8, 8\)"),
        (lambda: RadialPattern((8, 8)), r"grid=\(8, 8\)"),
        (lambda: attention(*[torch.ones(1, 64, 1, 64)] * 3, mode="radial",
                           radial=RadialPattern((2, 8, 8), block=64)),
         r"over \(2, 8, 8\) takes 128 tokens, got 64 queries and 64 keys"),
        (lambda: attention(*[torch.ones(1, 64, 1, 32)] * 3, mode="radial",
                           radial=RadialPattern((1, 8, 8), block=64)),
         "mode 'radial': head dimension 64 or 128 needed, got 32"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)


def test_on_a_gpu_radial_needs_triton_and_8_0():
    half = torch.bfloat16
    assert radial.obstacle((8, 0), "cuda", half, True) == ""
    assert radial.obstacle((7, 5), "cuda", half, True).endswith("needed, found 7.5")
    assert radial.obstacle((9, 0), "cuda", half, False) == "package triton needed, not installed"
    assert radial.obstacle((9, 0), "cuda", torch.float32, False) == ""
