"""Triton kernels for NVFP4 weights on GPUs that multiply 8 bits at best.

The bits of an e2m1 code are those of an fp16 number: shifted to the top of the mantissa they read
as value * 2^-14, the subnormal 0.5 included, so decoding takes a shift and a multiplication that
the block scale needs anyway. Needs Triton and a GPU of capability 8.9 or later, or Triton's
interpreter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from wan_models.quant.fused_triton import on
from wan_models.quant.recipes import E4M3

_FP16: tl.constexpr = tl.constexpr(2.0**14)


@triton.jit
def _decoded(code):
    """e2m1 values / 2^14 of codes 0 to 15, int32: fp32."""
    bits = ((code & 8) << 12) | ((code & 7) << 9)
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def expand(packed, block_scale, out, rows, bytes_a_row, BYTES: tl.constexpr, ROWS: tl.constexpr):
    """A tile of packed codes as e4m3: e2m1 * block scale / 8."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    byte = tl.program_id(1) * BYTES + tl.arange(0, BYTES)
    inside = (row < rows)[:, None] & (byte < bytes_a_row)[None, :]
    where = row[:, None] * bytes_a_row
    codes = tl.load(packed + where + byte[None, :], mask=inside, other=0).to(tl.int32)
    # A block of 16 values is 8 bytes.
    blocks = row[:, None] * (bytes_a_row // 8) + (byte // 8)[None, :]
    step = tl.load(block_scale + blocks, mask=inside, other=0.0).to(tl.float32) * (_FP16 / 8.0)
    low, high = _decoded(codes & 15) * step, _decoded(codes >> 4) * step
    # Side by side by join: put together with shifts, to 16 bits, every other low value came out as
    # -384 on an H100 (Triton 3.6 with its own ptxas).
    values = tl.join(low, high).reshape(ROWS, 2 * BYTES).to(tl.float8e4nv)
    column = tl.program_id(1) * 2 * BYTES + tl.arange(0, 2 * BYTES)
    within = (row < rows)[:, None] & (column < 2 * bytes_a_row)[None, :]
    tl.store(out + 2 * where + column[None, :], values, mask=within)


@triton.jit
def few_rows(
    x, packed, block_scale, tensor_scale, bias, out, columns, blocks, x_t,
    HALF: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr,
):
    """x W^T + b for a few columns of the result, on the ordinary cores, in fp32.

    The weight is read once, by vectors of 8 bytes: a block of 16 values, which are summed against
    x before their scale is applied. x comes as words of two neighbours, so that the halves of a
    byte find theirs in the halves of a word.

    Args:
        x: int32 words of (ROWS, K) ``HALF``, which is fp16 or bf16; rows are x_t words apart.
        blocks: K / 16.
    """
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    wide = column.to(tl.int64)[:, None] * blocks
    eight = tl.arange(0, 8)
    row = tl.arange(0, ROWS)
    acc = tl.zeros((ROWS, COLUMNS, BLOCKS), tl.float32)
    for start in range(0, blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        there = block < blocks
        inside = (column < columns)[:, None] & there[None, :]
        at = wide + block[None, :]
        codes = tl.load(packed + at[:, :, None] * 8 + eight, mask=inside[:, :, None], other=0)
        codes = codes.to(tl.int32)
        step = tl.load(block_scale + at, mask=inside, other=0.0).to(tl.float32)
        low, high = _decoded(codes & 15), _decoded(codes >> 4)
        for m in tl.static_range(ROWS):
            words = x + m * x_t + block[:, None] * 8 + eight[None, :]
            pair = tl.load(words, mask=there[:, None], other=0)
            even = _half(pair, HALF)[None, :, :]
            odd = _half(pair >> 16, HALF)[None, :, :]
            part = tl.sum(low * even + high * odd, 2) * step
            acc += tl.where((row == m)[:, None, None], part[None, :, :], 0.0)
    total = tl.sum(acc, 2) * (tl.load(tensor_scale) * _FP16)
    if BIAS:
        added = tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)
        total += added[None, :]
    pointers = out + row[:, None] * columns + column[None, :]
    tl.store(pointers, total.to(out.dtype.element_ty), mask=(column < columns)[None, :])


@triton.jit
def _half(word, HALF: tl.constexpr):
    """The number in the low half of a word: fp32."""
    return word.to(tl.int16).to(HALF, bitcast=True).to(tl.float32)


def run_expand(packed: torch.Tensor, block_scale: torch.Tensor) -> torch.Tensor:
    """(N, K / 2) uint8 and (N, K / 16) e4m3, both dense, to (N, K) e4m3."""
    rows, width = packed.shape
    out = torch.empty((rows, 2 * width), dtype=E4M3, device=packed.device)
    if out.numel():
        with on(packed.device):
            expand[(triton.cdiv(rows, 2), triton.cdiv(width, 512))](
                packed, block_scale, out, rows, width, BYTES=512, ROWS=2, num_warps=4
            )
    return out


def run_few_rows(
    x: torch.Tensor, packed: torch.Tensor, block_scale: torch.Tensor,
    tensor_scale: torch.Tensor, bias: torch.Tensor | None,
) -> torch.Tensor:
    """x (M, K) bf16 or fp16; (M, N) in its type. Meant for M up to 8: W is read M / 4 times."""
    rows, (columns, width) = x.shape[0], packed.shape
    out = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    if x.stride(-1) != 1 or x.stride(0) % 2 or x.data_ptr() % 4:
        x = x.clone(memory_format=torch.contiguous_format)  # a new start, whatever the old one
    words = x.view(torch.int32)
    half = tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float16
    with on(x.device):
        for start in range(0, rows, 4):
            for first, count in _powers(start, min(4, rows - start)):
                few_rows[(triton.cdiv(columns, 8),)](
                    words[first:], packed, block_scale, tensor_scale, bias, out[first:],
                    columns, width // 8, words.stride(0),
                    HALF=half, BIAS=bias is not None, ROWS=count, COLUMNS=8, BLOCKS=64,
                    num_warps=4,
                )
    return out


def _powers(start: int, count: int) -> list[tuple[int, int]]:
    """Up to 4 rows as runs of a power of 2: (first, count) each."""
    sizes = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,)}[count]
    return [(start + sum(sizes[:i]), size) for i, size in enumerate(sizes)]
