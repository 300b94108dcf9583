"""The 8-bit attention kernel in Triton, and the kernels that quantise for it.

Needs Triton and a GPU of compute capability 8.9, or Triton's interpreter. Three passes read the
inputs by their strides and write e4m3 copies in the kernel's own layout, padded to whole blocks
with zeros, so that the loop over the keys neither masks loads nor steps by odd strides:

* q (B, H, L', D) and k (B, H, S', D), rows together, as the first product reads them;
* v (B, H, D, S'), tokens together: the tensor cores take 8-bit operands only with the summed
  dimension unit-stride.

Whole blocks of keys are computed without any masking; at most one masked block follows.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl

from wan_models.attention.fp8 import _LOG2_E, _TINY, E4M3, E4M3_MAX, KEY_BLOCK, SHIFT
from wan_models.attention.online_softmax import START, attend, finish

BLOCK_M = 128
WARPS = 8
_MAX: tl.constexpr = tl.constexpr(E4M3_MAX)
_SMALLEST: tl.constexpr = tl.constexpr(_TINY)


@triton.jit
def _tile(base, start, token_stride, count, BLOCK: tl.constexpr, D: tl.constexpr):
    """BLOCK rows of D numbers in fp32; rows from ``count`` on are zero."""
    tokens = start + tl.arange(0, BLOCK)
    rows = tokens.to(tl.int64) * token_stride
    pointers = base + rows[:, None] + tl.arange(0, D)[None, :]
    return tl.load(pointers, mask=(tokens < count)[:, None], other=0.0).to(tl.float32)


@triton.jit
def _rounded(x, amax):
    """x in e4m3 by the scale amax / 448, which may round beyond 448 by one ulp."""
    scaled = x * (_MAX / amax)
    return tl.minimum(tl.maximum(scaled, -_MAX), _MAX).to(tl.float8e4nv)


@triton.jit
def statistics(
    k, v, lengths, sums, peaks, k_b, k_t, k_h, v_b, v_t, v_h, heads,
    BLOCK: tl.constexpr, D: tl.constexpr,
):
    """For a block of tokens, the sum of k and the largest |v| of each channel."""
    block, plane = tl.program_id(0), tl.program_id(1)
    batch, head = (plane // heads).to(tl.int64), (plane % heads).to(tl.int64)
    count = tl.load(lengths + batch)
    start = block * BLOCK
    keys = _tile(k + batch * k_b + head * k_h, start, k_t, count, BLOCK, D)
    values = _tile(v + batch * v_b + head * v_h, start, v_t, count, BLOCK, D)
    where = (plane.to(tl.int64) * tl.num_programs(0) + block) * D + tl.arange(0, D)
    tl.store(sums + where, tl.sum(keys, 0))
    tl.store(peaks + where, tl.max(tl.abs(values), 0))


@triton.jit
def quantise_queries(
    q, out, scales, q_b, q_t, q_h, heads, count, padded, factor,
    BLOCK: tl.constexpr, D: tl.constexpr,
):
    """q in e4m3 by row; the scales carry ``factor``."""
    block, plane = tl.program_id(0), tl.program_id(1)
    batch, head = (plane // heads).to(tl.int64), (plane % heads).to(tl.int64)
    x = _tile(q + batch * q_b + head * q_h, block * BLOCK, q_t, count, BLOCK, D)
    amax = tl.maximum(tl.max(tl.abs(x), 1), _SMALLEST)
    rows = plane.to(tl.int64) * padded + block * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + rows[:, None] * D + tl.arange(0, D)[None, :], _rounded(x, amax[:, None]))
    tl.store(scales + rows, amax * (factor / _MAX))


@triton.jit
def quantise_keys_values(
    k, v, lengths, means, peaks, k_out, k_scales, v_out,
    k_b, k_t, k_h, v_b, v_t, v_h, heads, padded, BLOCK: tl.constexpr, D: tl.constexpr,
):
    """k less its mean in e4m3 by block; v in e4m3 by channel, tokens together."""
    block, plane = tl.program_id(0), tl.program_id(1)
    batch, head = (plane // heads).to(tl.int64), (plane % heads).to(tl.int64)
    count = tl.load(lengths + batch)
    start, wide = block * BLOCK, plane.to(tl.int64)
    tokens, channels = start + tl.arange(0, BLOCK), tl.arange(0, D)
    mean = tl.load(means + wide * D + channels)
    x = _tile(k + batch * k_b + head * k_h, start, k_t, count, BLOCK, D)
    x = tl.where((tokens < count)[:, None], x - mean[None, :], 0.0)
    amax = tl.maximum(tl.max(tl.max(tl.abs(x), 1), 0), _SMALLEST)
    rows = wide * padded + tokens
    tl.store(k_out + rows[:, None] * D + channels[None, :], _rounded(x, amax))
    tl.store(k_scales + wide * tl.num_programs(0) + block, amax / _MAX)
    y = _tile(v + batch * v_b + head * v_h, start, v_t, count, BLOCK, D)
    peak = tl.maximum(tl.load(peaks + wide * D + channels), _SMALLEST)
    columns = (wide * D + channels) * padded
    tl.store(v_out + columns[None, :] + tokens[:, None], _rounded(y, peak[None, :]))


@triton.jit
def attention(
    q, k, v, q_scales, k_scales, v_scales, lengths, out, out_b, out_t, out_h,
    heads, queries, q_padded, k_padded,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, SHIFT: tl.constexpr,
):
    """One block of queries of one head against all its keys."""
    block, plane = tl.program_id(0), tl.program_id(1)
    batch, head, wide = plane // heads, plane % heads, plane.to(tl.int64)
    count = tl.load(lengths + batch)
    tokens, channels = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, D)
    steps = tl.arange(0, BLOCK_N)
    rows = wide * q_padded + tokens
    x = tl.load(q + rows[:, None] * D + channels[None, :])
    row_scales = tl.load(q_scales + rows)
    k += wide * k_padded * D
    v += wide * D * k_padded
    k_scales += wide * (k_padded // BLOCK_N)
    k_pointers = k + steps[None, :] * D + channels[:, None]
    v_pointers = v + channels[None, :] * k_padded + steps[:, None]
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), START, tl.float32)
    whole = count // BLOCK_N
    for i in range(0, whole):
        acc, total, top = attend(
            x, tl.load(k_pointers + i * (BLOCK_N * D)), tl.load(v_pointers + i * BLOCK_N),
            row_scales * tl.load(k_scales + i), steps < count, acc, total, top,
            False, SHIFT,
        )
    if whole * BLOCK_N < count:
        acc, total, top = attend(
            x, tl.load(k_pointers + whole * (BLOCK_N * D)), tl.load(v_pointers + whole * BLOCK_N),
            row_scales * tl.load(k_scales + whole), steps < count - whole * BLOCK_N,
            acc, total, top, True, SHIFT,
        )
    acc = finish(acc, total) * tl.load(v_scales + wide * D + channels)[None, :]
    base = out + batch.to(tl.int64) * out_b + head * out_h
    pointers = base + tokens.to(tl.int64)[:, None] * out_t + channels[None, :]
    tl.store(pointers, acc.to(out.dtype.element_ty), mask=(tokens < queries)[:, None])


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_lens: torch.Tensor | None
) -> torch.Tensor:
    """Attention in 8 bits; arguments and result as of :func:`wan_models.attention.fp8.run`.

    Runs on the CUDA device of q, or on CPU tensors under ``TRITON_INTERPRET=1``.
    """
    batch, queries, heads, size = q.shape
    keys, planes = k.shape[1], batch * heads
    if k_lens is None:
        lengths = torch.full((batch,), keys, dtype=torch.int32, device=q.device)
    else:
        lengths = k_lens.clamp(0, keys).to(torch.int32)
    q_padded, k_padded = _padded(queries, BLOCK_M), _padded(keys, KEY_BLOCK)
    q_blocks, k_blocks = q_padded // BLOCK_M, k_padded // KEY_BLOCK
    wide = {"dtype": torch.float32, "device": q.device}
    narrow = {"dtype": E4M3, "device": q.device}
    sums = torch.empty((planes, k_blocks, size), **wide)
    peaks = torch.empty((planes, k_blocks, size), **wide)
    q_values = torch.empty((planes, q_padded, size), **narrow)
    k_values = torch.empty((planes, k_padded, size), **narrow)
    v_values = torch.empty((planes, size, k_padded), **narrow)
    q_scales = torch.empty((planes, q_padded), **wide)
    k_scales = torch.empty((planes, k_blocks), **wide)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    strides = (*k.stride()[:3], *v.stride()[:3])
    shape = {"BLOCK": KEY_BLOCK, "D": size}
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        quantise_queries[(q_blocks, planes)](
            q, q_values, q_scales, *q.stride()[:3], heads, queries, q_padded,
            _LOG2_E / size**0.5, BLOCK=BLOCK_M, D=size,
        )
        statistics[(k_blocks, planes)](k, v, lengths, sums, peaks, *strides, heads, **shape)
        counts = lengths.clamp(min=1).repeat_interleave(heads)[:, None]
        means, v_peaks = sums.sum(1) / counts, peaks.amax(1)
        quantise_keys_values[(k_blocks, planes)](
            k, v, lengths, means, v_peaks, k_values, k_scales, v_values, *strides, heads, k_padded,
            **shape,
        )
        v_scales = v_peaks.clamp(min=_TINY) / E4M3_MAX
        attention[(q_blocks, planes)](
            q_values, k_values, v_values, q_scales, k_scales, v_scales, lengths, out,
            *out.stride()[:3], heads, queries, q_padded, k_padded,
            BLOCK_M=BLOCK_M, BLOCK_N=KEY_BLOCK, D=size, SHIFT=SHIFT,
            num_warps=WARPS, num_stages=_stages(q.device),
        )
    return out


def _padded(count: int, block: int) -> int:
    return -(-count // block) * block


def _stages(device: torch.device) -> int:
    """Depth of the pipeline over the keys: what the shared memory of the GPU holds."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10):
        return 3  # 16 KB of q and 32 KB a stage of 227 KB
    return 2  # of 99 KB
