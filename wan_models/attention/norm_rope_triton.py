"""The kernel of :mod:`wan_models.attention.norm_rope`: each row is read once and written once.

As in :mod:`wan_models.quant.fused_triton` a program takes a few rows one after the other, the next
one being loaded meanwhile, and reads the weight once. Needs Triton and a GPU, or Triton's
interpreter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from wan_models.attention.fp16 import score_factor
from wan_models.quant.fused_triton import (
    STAGES,
    both,
    column_stride,
    on,
    parts,
    rows_a_program,
    warps,
)


@triton.jit
def _turned(v, angle, half, known):
    """Pairs of neighbours turned by the angles whose cosines ``angle`` points to."""
    cos = tl.load(angle, mask=known, other=1.0).to(tl.float32)
    sin = tl.load(angle + half, mask=known, other=0.0).to(tl.float32)
    even, odd = tl.split(v.reshape(v.shape[0] // 2, 2))
    return tl.join(even * cos - odd * sin, even * sin + odd * cos).reshape(v.shape[0])


@triton.jit
def norm_turn(
    x, weight, table, row_scale, column_scale, bias, out, tokens, turned, width, x_b, x_t, x_c,
    table_half, table_b, table_t, c_s, eps, factor,
    DEFERRED: tl.constexpr, BIAS: tl.constexpr, HALF: tl.constexpr,
    ROWS: tl.constexpr, STAGES: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
):
    """Rows of x, which may be a bare product, normed, weighed, turned and times ``factor``.

    Args:
        table: cosines of (B or 1, turned, HALF) angles, and ``table_half`` further on their sines.
        HALF: pairs of a head.
        LOW, HIGH: the two parts of a row, as of :mod:`wan_models.quant.fused_triton`.
    """
    batch, first = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64) * ROWS
    low, high = tl.arange(0, LOW), LOW + tl.arange(0, HIGH)
    inside = high < width
    grown_a, grown_b = both(weight, low, high, inside, True)
    if DEFERRED:
        column_a, column_b = both(column_scale, low * c_s, high * c_s, inside, True)
    if BIAS:
        bias_a, bias_b = both(bias, low, high, inside, True)
    pair_a, pair_b = tl.arange(0, LOW // 2), LOW // 2 + tl.arange(0, HIGH // 2)
    for i in tl.range(0, ROWS, num_stages=STAGES):
        token = first + i
        there, known = token < tokens, token < turned
        start = x + batch * x_b + token * x_t
        a, b = both(start, low * x_c, high * x_c, inside, there)
        row = batch * tokens + token
        if DEFERRED:
            of_row = tl.load(row_scale + row, mask=there, other=0.0)
            a, b = a * (of_row * column_a), b * (of_row * column_b)
        if BIAS:
            a, b = a + bias_a, b + bias_b
        angles = table + batch * table_b + token * table_t
        scale = tl.rsqrt((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / width + eps) * factor
        a = _turned(a * scale * grown_a, angles + pair_a % HALF, table_half, known)
        b = _turned(b * scale * grown_b, angles + pair_b % HALF, table_half, known)
        # Rounded as x is, whatever the type in which it is stored.
        a = a.to(x.dtype.element_ty).to(out.dtype.element_ty)
        b = b.to(x.dtype.element_ty).to(out.dtype.element_ty)
        if out.dtype.element_ty != x.dtype.element_ty:  # NaN of what became infinite
            a, b = a + (a - a), b + (b - b)
        start = out + row * width
        tl.store(start + low, a, mask=there)
        tl.store(start + high, b, mask=inside & there)


def run(
    x: torch.Tensor, weight: torch.Tensor, rope: torch.Tensor, eps: float,
    scale: bool = False, dtype: torch.dtype | None = None,
    row_scale: torch.Tensor | None = None, column_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Arguments and result of :func:`wan_models.attention.norm_rope.norm_rope`."""
    batch, tokens, width = x.shape
    half, turned = rope.shape[-1], rope.shape[-3]
    own = rope.stride(1) if rope.dim() == 5 and rope.shape[1] > 1 else 0
    out = torch.empty(
        (batch, tokens, width // (2 * half), 2 * half), dtype=dtype or x.dtype, device=x.device
    )
    (low, high), rows = parts(width), rows_a_program(batch * tokens)
    if out.numel():
        with on(x.device):
            norm_turn[(triton.cdiv(tokens, rows), batch)](
                x, weight, rope, row_scale, column_scale, bias, out, tokens, turned, width,
                *x.stride(), rope.stride(0), own, rope.stride(-3), column_stride(column_scale),
                eps, score_factor(2 * half) if scale else 1.0,
                DEFERRED=row_scale is not None, BIAS=bias is not None, HALF=half,
                ROWS=rows, STAGES=STAGES, LOW=low, HIGH=high, num_warps=warps(low),
            )
    return out
