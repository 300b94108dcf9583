"""The kernel of :mod:`wan_models.attention.norm_rope`: each row is read once and written once.

As in :mod:`wan_models.quant.fused_triton` a program takes a few rows one after the other, the next
one being loaded meanwhile, and reads the weight once. Needs Triton and a GPU, or Triton's
interpreter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from wan_models.quant.fused_triton import STAGES, on, rows_a_program, warps


@triton.jit
def norm_turn(
    x, weight, table, out, tokens, turned, width, x_b, x_t, x_c, table_half, table_b, table_t,
    eps,
    HALF: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, BLOCK: tl.constexpr,
):
    """Rows of x normed, weighed and turned.

    Args:
        table: cosines of (B or 1, turned, HALF) angles, and ``table_half`` further on their sines.
        HALF: pairs of a head.
    """
    batch, first = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64) * ROWS
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    grown = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    pair = tl.arange(0, BLOCK // 2) % HALF
    for i in tl.range(0, ROWS, num_stages=STAGES):
        token = first + i
        live = inside & (token < tokens)
        v = tl.load(x + batch * x_b + token * x_t + columns * x_c, mask=live, other=0.0)
        angle = table + batch * table_b + token * table_t + pair
        cos = tl.load(angle, mask=token < turned, other=1.0).to(tl.float32)
        sin = tl.load(angle + table_half, mask=token < turned, other=0.0).to(tl.float32)
        v = v.to(tl.float32)
        v *= tl.rsqrt(tl.sum(v * v, 0) / width + eps) * grown
        even, odd = tl.split(v.reshape(BLOCK // 2, 2))
        v = tl.join(even * cos - odd * sin, even * sin + odd * cos).reshape(BLOCK)
        row = batch * tokens + token
        tl.store(out + row * width + columns, v.to(out.dtype.element_ty), mask=live)


def run(x: torch.Tensor, weight: torch.Tensor, rope: torch.Tensor, eps: float) -> torch.Tensor:
    """Arguments and result of :func:`wan_models.attention.norm_rope.norm_rope`."""
    batch, tokens, width = x.shape
    half, turned = rope.shape[-1], rope.shape[-3]
    own = rope.stride(1) if rope.dim() == 5 and rope.shape[1] > 1 else 0
    out = torch.empty(
        (batch, tokens, width // (2 * half), 2 * half), dtype=x.dtype, device=x.device
    )
    block, rows = triton.next_power_of_2(width), rows_a_program(batch * tokens)
    if out.numel():
        with on(x.device):
            norm_turn[(triton.cdiv(tokens, rows), batch)](
                x, weight, rope, out, tokens, turned, width, *x.stride(),
                rope.stride(0), own, rope.stride(-3), eps,
                HALF=half, ROWS=rows, STAGES=STAGES, BLOCK=block, num_warps=warps(block),
            )
    return out
