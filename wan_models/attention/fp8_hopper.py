"""The 8-bit attention kernel for Hopper, in Gluon (Triton's lower-level language).

Needs compute capability 9.0. One program has three groups of warps: a producer that fetches blocks
of k and v by TMA, and two consumers of 64 queries each, which run without waiting for each other,
so that one uses the tensor cores while the other works on weights.

What makes the weights cheap (see :mod:`wan_models.attention.fp8_arithmetic` for the arithmetic):

* scores come out of the tensor cores in fp16, two to a register, and are handled in pairs;
* a weight's e4m3 code is computed, not converted: 8 codes a power of two, linear in between;
* rows of k are stored in an order (``_key_order`` of :mod:`wan_models.attention.fp8_quantise`) in
  which each thread's scores already lie as the second product wants its weights, so nothing is
  shuffled;
* padded keys are zeros: each adds the weight of score 0, which is taken out of the sum at the end.

Measured on an H100 at 40 heads of 128 and 32,760 tokens, of variants since dropped: blocks of 256
keys two deep 1242 TFLOPS; of 128 keys four deep 1088; two blocks of 128 interleaved in one consumer
1209. Sums by a product with ones gave wrong sums.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from wan_models.attention.fp8_arithmetic import TOP_CODE
from wan_models.attention.hopper_parts import halves, pairwise, ring

#: Queries of one consumer; a program has two.
ROWS = 64
#: Keys of a step, which share a scale.
BLOCK_N = 256
#: Blocks of k and of v in flight.
STAGES = 2
#: Of a thread of a consumer.
REGISTERS = 240
_TOP: gl.constexpr = gl.constexpr(TOP_CODE)
_NAN: gl.constexpr = gl.constexpr(tl.PropagateNan.ALL)


@gluon.constexpr_function
def weight_layout(columns: int) -> gl.DistributedLinearLayout:
    """(64, columns) over 4 warps as an 8-bit left operand lies in registers: four neighbours of a
    row to a register, 16 to a group of four lanes."""
    registers = [[0, 1], [0, 2], [8, 0], [0, 16], [0, 32], [0, 64], [0, 128]]
    return gl.DistributedLinearLayout(
        registers[: 6 if columns == 128 else 7], [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0]], [], [64, columns],
    )


@gluon.jit
def _of_rows(x, N: gl.constexpr, SUM: gl.constexpr):
    """(64,) fp32 maxima or sums of (64, N) fp16: halved while both halves lie in one thread."""
    a, b = halves(x, N)
    a, b = halves(pairwise(a, b, SUM), N // 2)
    a, b = halves(pairwise(a, b, SUM), N // 4)
    if N == 256:
        a, b = halves(pairwise(a, b, SUM), N // 8)
    # (64, 16): a thread holds 4 neighbours of each row. 32 weights of 448 are within fp16.
    pairs = pairwise(a, b, SUM).reshape([64, 4, 2, 2]).permute(0, 1, 3, 2)
    a, b = pairs.split()
    last = pairwise(a, b, SUM).reshape([64, 8])
    return gl.sum(last.to(gl.float32), 1) if SUM else gl.max(last, 1).to(gl.float32)


@gluon.jit
def _codes(x, slope, start):
    """e4m3 codes of weights: round(126 * clamp(x * slope + start, 0, 1)), four to a register."""
    return gl.inline_asm_elementwise(
        """
        {
        .reg .b32 a, b, top, magic;
        mov.b32 top, 0x57e057e0;
        mov.b32 magic, 0x64006400;
        fma.rn.sat.f16x2 a, $1, $3, $5;
        fma.rn.sat.f16x2 b, $2, $4, $6;
        fma.rn.f16x2 a, a, top, magic;
        fma.rn.f16x2 b, b, top, magic;
        prmt.b32 $0, a, b, 0x6420;
        }
        """,
        "=r,r,r,r,r,r,r", [x, slope, start], dtype=gl.int8, is_pure=True, pack=4,
    )


@gluon.jit
def _weigh(scores, row_scale, key_scale, start, L: gl.constexpr, N: gl.constexpr):
    """Weights (64, N) e4m3 of fp16 scores in the order of the first product; how much what was
    summed before fades, and the new start. A scale of NaN stays in both."""
    x = scores.reshape([64, N // 16, 2, 4, 2]).permute(0, 1, 3, 2, 4).reshape([64, N])
    x = gl.convert_layout(x, L)
    rows: gl.constexpr = gl.SliceLayout(1, L)
    slope = (row_scale * key_scale).to(gl.float16)
    top = gl.convert_layout(_of_rows(x, N, False), rows) * slope.to(gl.float32)
    new = (1.0 - top).to(gl.float16).to(gl.float32)
    new = gl.minimum(start, new, propagate_nan=_NAN)
    fade = gl.exp2((new - start) * (_TOP / 8))
    wide = new.to(gl.float16)
    codes = _codes(x, slope.expand_dims(1), wide.expand_dims(1))
    return codes.to(gl.float8e4nv, bitcast=True), fade, new


@gluon.jit
def _consume(
    which: gl.constexpr, q_tile, k_tiles, v_tiles, q_ready, k_ready, k_free, v_ready, v_free,
    q_scales, k_scales, v_scales, out, out_t, first, queries, blocks, padding,
    D: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
):
    """64 queries against all keys; pointers are to this head's numbers."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 32])
    A: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32])
    L: gl.constexpr = weight_layout(N)
    rows: gl.constexpr = gl.SliceLayout(1, L)
    acc_rows: gl.constexpr = gl.SliceLayout(1, A)
    first += which * 64
    row_scale = gl.load(q_scales + first + gl.arange(0, 64, rows))
    start = gl.full([64], 1.0, gl.float32, rows)
    acc = gl.zeros([64, D], gl.float32, A)
    total = gl.zeros([64], gl.float32, rows)
    empty = gl.zeros([64, N], gl.float16, S)
    no_acc = gl.zeros([64, D], gl.float32, A)
    q = q_tile.index(which)
    mbarrier.wait(q_ready, 0)
    for i in range(blocks):
        at, phase = i % STAGES, (i // STAGES) & 1
        key_scale = gl.load(k_scales + i)
        mbarrier.wait(k_ready.index(at), phase)
        keys = k_tiles.index(at).permute((1, 0))
        scores = warpgroup_mma(q, keys, empty, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, [scores])
        mbarrier.arrive(k_free.index(at), count=1)
        weights, fade, start = _weigh(scores, row_scale, key_scale, start, L, N)
        mbarrier.wait(v_ready.index(at), phase)
        left = gl.convert_layout(weights, gl.DotOperandLayout(0, A, 4))
        values = v_tiles.index(at).permute((1, 0))
        part = warpgroup_mma(left, values, no_acc, use_acc=False, is_async=True)
        # Meanwhile the weights, which the product reads from registers, are only read.
        added = gl.convert_layout(_of_rows(weights.to(gl.float16), N, True), rows)
        part = warpgroup_mma_wait(0, [part])
        total = total * fade + added
        mbarrier.arrive(v_free.index(at), count=1)
        acc = acc * gl.convert_layout(fade, acc_rows).expand_dims(1) + part

    # A padded key had score 0 and so the weight of ``start``.
    top = gl.minimum(gl.maximum(start, 0.0), 1.0)
    codes = (top * _TOP + 8388608.0).to(gl.int32, bitcast=True).to(gl.int8)
    weight = codes.to(gl.float8e4nv, bitcast=True).to(gl.float32)
    sums = gl.convert_layout(total - weight * padding, acc_rows)
    channels = gl.arange(0, D, gl.SliceLayout(0, A))
    acc = acc / gl.where(sums > 0, sums, 1.0).expand_dims(1)
    acc = acc * gl.load(v_scales + channels).expand_dims(0)
    tokens = first + gl.arange(0, 64, acc_rows)
    pointers = out + tokens.to(gl.int64).expand_dims(1) * out_t + channels.expand_dims(0)
    gl.store(pointers, acc.to(out.dtype.element_ty), mask=(tokens < queries).expand_dims(1))


@gluon.jit
def _produce(
    q, k, v, q_tile, k_tiles, v_tiles, q_ready, k_ready, k_free, v_ready, v_free,
    q_row, k_row, v_row, blocks, D: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
):
    """Fetch both tiles of q, then block after block of k and v."""
    mbarrier.expect(q_ready, 2 * 64 * D)
    tma.async_copy_global_to_shared(q, [q_row, 0], q_ready, q_tile.index(0))
    tma.async_copy_global_to_shared(q, [q_row + 64, 0], q_ready, q_tile.index(1))
    for i in range(blocks):
        at, phase = i % STAGES, (i // STAGES) & 1
        mbarrier.wait(k_free.index(at), phase ^ 1)
        mbarrier.expect(k_ready.index(at), N * D)
        tma.async_copy_global_to_shared(k, [k_row + i * N, 0], k_ready.index(at), k_tiles.index(at))
        mbarrier.wait(v_free.index(at), phase ^ 1)
        mbarrier.expect(v_ready.index(at), N * D)
        tma.async_copy_global_to_shared(v, [v_row, i * N], v_ready.index(at), v_tiles.index(at))


@gluon.jit(do_not_specialize=["queries", "heads"])
def attention(
    q, k, v, q_scales, k_scales, v_scales, lengths, out, out_b, out_t, out_h,
    heads, queries, q_padded, k_padded,
    D: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):
    """128 queries of one head against all its keys; q, k, v are TMA descriptors."""
    block, plane = gl.program_id(0), gl.program_id(1)
    batch, head = (plane // heads).to(gl.int64), (plane % heads).to(gl.int64)
    count = gl.load(lengths + batch)
    blocks = gl.maximum((count + N - 1) // N, 1)
    padding = (blocks * N - count).to(gl.float32)
    q_tile = gl.allocate_shared_memory(gl.float8e4nv, [2, 64, D], q.layout)
    k_tiles = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, N, D], k.layout)
    v_tiles = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, D, N], v.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(q_ready, count=1)
    k_ready, k_free = ring(STAGES, 2)
    v_ready, v_free = ring(STAGES, 2)
    fence_async_shared()
    wide = plane.to(gl.int64)
    q_scales += wide * q_padded
    k_scales += wide * (k_padded // N)
    v_scales += wide * D
    out += batch * out_b + head * out_h
    first = block * 128
    gl.warp_specialize(
        [
            (_consume, (
                0, q_tile, k_tiles, v_tiles, q_ready, k_ready, k_free, v_ready, v_free,
                q_scales, k_scales, v_scales, out, out_t, first, queries, blocks, padding,
                D, N, STAGES,
            )),
            (_consume, (
                1, q_tile, k_tiles, v_tiles, q_ready, k_ready, k_free, v_ready, v_free,
                q_scales, k_scales, v_scales, out, out_t, first, queries, blocks, padding,
                D, N, STAGES,
            )),
            (_produce, (
                q, k, v, q_tile, k_tiles, v_tiles, q_ready, k_ready, k_free, v_ready, v_free,
                plane * q_padded + first, plane * k_padded, plane * D, blocks, D, N, STAGES,
            )),
        ],
        [4, 1], [REGISTERS, 24],
    )
