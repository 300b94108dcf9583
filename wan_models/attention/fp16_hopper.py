"""The 16-bit attention kernel for Hopper, in Gluon (Triton's lower-level language).

Needs compute capability 9.0. One program has four groups of warps: a producer that fetches blocks
of k and v by TMA, and three consumers of 64 queries each. The arithmetic is that of
:mod:`wan_models.attention.fp16`.

An H100 runs such a kernel at its power limit, so what counts is work saved as much as time:

* scores come out of the tensor cores in fp16: half the registers of fp32, so that three consumers
  fit, and they are handled in pairs;
* three consumers read a block of k and v that was fetched once, for 192 queries;
* a consumer hands the tensor cores the weights of one block and the scores of the next together;
  what it does to scores, it does while the two others' products run.

Weights travel from one round of the loop to the next two to a 32-bit register: as a tensor of fp16
the compiler would take them apart and put them together again.

On an H100 at 40 heads of 128 and 32,760 tokens, in a loop at the power limit, ms; FlashAttention 3
in the same runs 31.5 to 32.4: as it is 29.7 to 30.0; the first product waited for by itself 31.5;
two consumers 34.1; consumers that take turns 30.1 and 33.5; fp32 scores and bf16 weights 32.5;
fp16 scores and bf16 weights 30.4; v of 11 bits instead of bf16's 8 costs 2%. At 75,600 tokens 155
beside 170.
"""

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from wan_models.attention.hopper_parts import halves, pairwise, ring

#: Queries of one consumer; a program has three.
ROWS = 64
#: Keys of a block.
BLOCK = 128
#: Blocks of k and of v in flight.
STAGES = 2
#: Of a thread of a consumer.
REGISTERS = 160
#: What a score is compared with first: finite, so that a masked key, at minus infinity, has the
#: weight zero also where there is no other.
_START: gl.constexpr = gl.constexpr(-65504.0)


@gluon.jit
def _of_rows(x, N: gl.constexpr, SUM: gl.constexpr):
    """(64,) fp32 maxima or sums of (64, N) fp16: halved while both halves lie in one thread."""
    a, b = halves(x, N)
    a, b = halves(pairwise(a, b, SUM), N // 2)
    a, b = halves(pairwise(a, b, SUM), N // 4)
    a, b = halves(pairwise(a, b, SUM), N // 8)
    last = pairwise(a, b, SUM).to(gl.float32)
    return gl.sum(last, 1) if SUM else gl.max(last, 1)


@gluon.jit
def _power(scores, top):
    """2^(scores - top)."""
    return gl.inline_asm_elementwise(
        """
        {
        .reg .b32 a;
        sub.rn.f16x2 a, $1, $2;
        ex2.approx.f16x2 $0, a;
        }
        """,
        "=r,r,r", [scores, top], dtype=gl.float16, is_pure=True, pack=2,
    )


@gluon.jit
def _weigh(scores, top, N: gl.constexpr):
    """Weights of fp16 scores two to a register, how much what was summed before fades, the new
    largest score and the sum of the weights."""
    rows: gl.constexpr = gl.SliceLayout(1, scores.type.layout)
    new = gl.maximum(top, gl.convert_layout(_of_rows(scores, N, False), rows))
    weights = _power(scores, new.to(gl.float16).expand_dims(1))
    added = gl.convert_layout(_of_rows(weights, N, True), rows)
    return _packed(weights, N), gl.exp2(top - new), new, added


@gluon.jit
def _packed(x, N: gl.constexpr):
    low, high = x.reshape([64, N // 2, 2]).split()
    low, high = low.to(gl.int16, bitcast=True), high.to(gl.int16, bitcast=True)
    return gl.inline_asm_elementwise(
        "mov.b32 $0, {$1, $2};", "=r,h,h", [low, high], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _operand(packed, N: gl.constexpr, S: gl.constexpr, A: gl.constexpr):
    """Packed weights as the left operand of the second product; they stay where they are."""
    low, high = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [packed], dtype=(gl.int16, gl.int16), is_pure=True,
        pack=1,
    )
    x = gl.join(low, high).reshape([64, N]).to(gl.float16, bitcast=True)
    return gl.convert_layout(gl.convert_layout(x, S), gl.DotOperandLayout(0, A, 2))


@gluon.jit
def _consume(
    which: gl.constexpr, q_tile, k_tiles, v_tiles, q_ready, k_ready, k_free, v_ready, v_free,
    out, out_t, first, queries, blocks, count,
    D: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
):
    """64 queries against all keys; ``out`` points to this head."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    A: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    rows: gl.constexpr = gl.SliceLayout(1, S)
    acc_rows: gl.constexpr = gl.SliceLayout(1, A)
    first += which * 64
    empty = gl.zeros([64, N], gl.float16, S)
    acc = gl.zeros([64, D], gl.float32, A)
    q = q_tile.index(which).reshape([64, D])
    mbarrier.wait(q_ready, 0)

    # The last block comes first: it alone may reach beyond the keys.
    mbarrier.wait(k_ready.index(0), 0)
    keys = k_tiles.index(0).reshape([N, D]).permute((1, 0))
    scores = warpgroup_mma(q, keys, empty, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, [scores])
    mbarrier.arrive(k_free.index(0), count=1)
    at = (blocks - 1) * N + gl.arange(0, N, gl.SliceLayout(0, S))
    beyond = gl.where(at < count, 0.0, float("-inf")).to(gl.float16)
    # In pairs: scores taken apart would make the compiler wait after every product.
    scores = pairwise(scores, gl.zeros([64, N], gl.float16, S) + beyond.expand_dims(0), True)
    start = gl.full([64], _START, gl.float32, rows)
    packed, fade, top, total = _weigh(scores, start, N)

    for i in range(1, blocks):
        k_at, k_phase = i % STAGES, (i // STAGES) & 1
        v_at, v_phase = (i - 1) % STAGES, ((i - 1) // STAGES) & 1
        mbarrier.wait(v_ready.index(v_at), v_phase)
        values = v_tiles.index(v_at).reshape([N, D])
        part = warpgroup_mma(_operand(packed, N, S, A), values, acc, is_async=True)
        mbarrier.wait(k_ready.index(k_at), k_phase)
        keys = k_tiles.index(k_at).reshape([N, D]).permute((1, 0))
        scores = warpgroup_mma(q, keys, empty, use_acc=False, is_async=True)
        acc = warpgroup_mma_wait(1, [part])
        mbarrier.arrive(v_free.index(v_at), count=1)
        scores = warpgroup_mma_wait(0, [scores])
        mbarrier.arrive(k_free.index(k_at), count=1)
        packed, fade, top, added = _weigh(scores, top, N)
        total = total * fade + added
        acc = acc * gl.convert_layout(fade, acc_rows).expand_dims(1)

    last = blocks - 1
    mbarrier.wait(v_ready.index(last % STAGES), (last // STAGES) & 1)
    values = v_tiles.index(last % STAGES).reshape([N, D])
    part = warpgroup_mma(_operand(packed, N, S, A), values, acc, is_async=True)
    acc = warpgroup_mma_wait(0, [part])
    sums = gl.convert_layout(total, acc_rows)
    acc = acc / gl.where(count > 0, sums, 1.0).expand_dims(1)  # zeros without a valid key
    channels = gl.arange(0, D, gl.SliceLayout(0, A))
    tokens = first + gl.arange(0, 64, acc_rows)
    pointers = out + tokens.to(gl.int64).expand_dims(1) * out_t + channels.expand_dims(0)
    gl.store(pointers, acc.to(out.dtype.element_ty), mask=(tokens < queries).expand_dims(1))


@gluon.jit
def _produce(
    q, k, v, q_tile, k_tiles, v_tiles, q_ready, k_ready, k_free, v_ready, v_free,
    batch, head, first, blocks, D: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
):
    """Fetch the tiles of q, then block after block of k and v, the last of them first."""
    mbarrier.expect(q_ready, 3 * 64 * D * 2)
    for i in gl.static_range(3):
        tma.async_copy_global_to_shared(
            q, [batch, first + i * 64, head, 0], q_ready, q_tile.index(i)
        )
    for i in range(blocks):
        at, phase = i % STAGES, (i // STAGES) & 1
        token = gl.where(i == 0, blocks - 1, i - 1) * N
        mbarrier.wait(k_free.index(at), phase ^ 1)
        mbarrier.expect(k_ready.index(at), N * D * 2)
        tma.async_copy_global_to_shared(
            k, [batch, token, head, 0], k_ready.index(at), k_tiles.index(at)
        )
        mbarrier.wait(v_free.index(at), phase ^ 1)
        mbarrier.expect(v_ready.index(at), N * D * 2)
        tma.async_copy_global_to_shared(
            v, [batch, token, head, 0], v_ready.index(at), v_tiles.index(at)
        )


@gluon.jit(do_not_specialize=["queries", "keys", "heads", "lengths_s"])
def attention(
    q, k, v, lengths, lengths_s, out, out_b, out_t, out_h, heads, queries, keys,
    MASKED: gl.constexpr, D: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    """192 queries of one head against all its keys; q, k, v are TMA descriptors (B, L, H, D)."""
    block, plane = gl.program_id(0), gl.program_id(1)
    batch, head = plane // heads, plane % heads
    count = keys
    if MASKED:
        count = gl.minimum(gl.maximum(gl.load(lengths + batch * lengths_s).to(gl.int32), 0), keys)
    blocks = gl.maximum((count + N - 1) // N, 1)
    q_tile = gl.allocate_shared_memory(gl.float16, [3, 1, 64, 1, D], q.layout)
    k_tiles = gl.allocate_shared_memory(gl.float16, [STAGES, 1, N, 1, D], k.layout)
    v_tiles = gl.allocate_shared_memory(gl.float16, [STAGES, 1, N, 1, D], v.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(q_ready, count=1)
    k_ready, k_free = ring(STAGES, 3)
    v_ready, v_free = ring(STAGES, 3)
    fence_async_shared()
    out += batch.to(gl.int64) * out_b + head.to(gl.int64) * out_h
    first = block * 192
    gl.warp_specialize(
        [
            (_consume, (
                0, q_tile, k_tiles, v_tiles, q_ready, k_ready, k_free, v_ready, v_free,
                out, out_t, first, queries, blocks, count, D, N, STAGES,
            )),
            (_consume, (
                1, q_tile, k_tiles, v_tiles, q_ready, k_ready, k_free, v_ready, v_free,
                out, out_t, first, queries, blocks, count, D, N, STAGES,
            )),
            (_consume, (
                2, q_tile, k_tiles, v_tiles, q_ready, k_ready, k_free, v_ready, v_free,
                out, out_t, first, queries, blocks, count, D, N, STAGES,
            )),
            (_produce, (
                q, k, v, q_tile, k_tiles, v_tiles, q_ready, k_ready, k_free, v_ready, v_free,
                batch, head, first, blocks, D, N, STAGES,
            )),
        ],
        [4, 4, 1], [REGISTERS, REGISTERS, 24],
    )


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_lens: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Arguments and result of :func:`wan_models.attention.fp16.fp16_attention`."""
    batch, queries, heads, size = q.shape
    keys = k.shape[1]
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    if not keys:
        return out.zero_()
    if out.numel():
        with torch.cuda.device(q.device):
            attention[(triton.cdiv(queries, 3 * ROWS), batch * heads)](
                _tiles(q, ROWS), _tiles(k, BLOCK), _tiles(v, BLOCK),
                k_lens, 0 if k_lens is None else k_lens.stride(0), out, *out.stride()[:3],
                heads, queries, keys,
                MASKED=k_lens is not None, D=size, N=BLOCK, STAGES=STAGES, REGISTERS=REGISTERS,
                num_warps=4,
            )
    return out


def _tiles(x: torch.Tensor, rows: int) -> TensorDescriptor:
    """Tiles of ``rows`` tokens of one head of x (B, L, H, D)."""
    size = x.shape[-1]
    # The stride of a dimension of one element means nothing, but has to be a multiple of 16 bytes.
    strides = [
        stride if n > 1 else size for n, stride in zip(x.shape[:3], x.stride(), strict=False)
    ]
    layout = gl.NVMMASharedLayout(min(2 * size, 128), 16, 4)
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, rows, 1, size], layout)
