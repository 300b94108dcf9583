"""Block-sparse attention in Triton: each block of queries walks the list of its kept key blocks.

Reads q, k and v by their strides, in bf16 or fp16; last dimensions unit-stride, as many tokens as
whole blocks. Needs Triton and a GPU, or Triton's interpreter.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl

from wan_models.attention.online_softmax import START, attend, finish

#: Keys a step. Half a block of 128: the tiles of two operands then fit the small GPUs too.
STEP = 64
_LOG2_E = 1.4426950408889634


@triton.jit
def sparse_attention(
    q, k, v, lengths, starts, columns, out,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, out_b, out_t, out_h, heads, factor,
    BLOCK: tl.constexpr, STEP: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr,
):
    """One block of queries of one head against its kept blocks of keys."""
    block, plane = tl.program_id(0), tl.program_id(1)
    batch, head = (plane // heads).to(tl.int64), (plane % heads).to(tl.int64)
    channels, steps = tl.arange(0, D), tl.arange(0, STEP)
    tokens = (block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    x = tl.load(q + batch * q_b + head * q_h + tokens[:, None] * q_t + channels[None, :])
    k_tile = k + batch * k_b + head * k_h + steps[None, :].to(tl.int64) * k_t + channels[:, None]
    v_tile = v + batch * v_b + head * v_h + steps[:, None].to(tl.int64) * v_t + channels[None, :]
    scale = tl.full((BLOCK,), factor, tl.float32)
    acc = tl.zeros((BLOCK, D), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    top = tl.full((BLOCK,), START, tl.float32)
    count = tl.load(lengths + batch) if MASKED else 0
    parts: tl.constexpr = BLOCK // STEP
    first, last = tl.load(starts + block), tl.load(starts + block + 1)
    for i in range(first * parts, last * parts):
        key = (tl.load(columns + i // parts) * BLOCK + (i % parts) * STEP).to(tl.int64)
        acc, total, top = attend(
            x, tl.load(k_tile + key * k_t), tl.load(v_tile + key * v_t), scale,
            key + steps < count, acc, total, top, MASKED, 0.0,
        )
    pointers = out + batch * out_b + head * out_h + tokens[:, None] * out_t + channels[None, :]
    tl.store(pointers, finish(acc, total).to(out.dtype.element_ty))


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_lens: torch.Tensor | None,
    starts: torch.Tensor, columns: torch.Tensor, block: int,
) -> torch.Tensor:
    """Attention over kept blocks.

    Args:
        q, k, v: (B, L, H, D), L a multiple of ``block``, D 64 or 128.
        k_lens: (B,) valid keys.
        starts, columns: int32, from :func:`wan_models.attention.radial.kept_blocks`.
        block: tokens in a block.

    Returns:
        (B, L, H, D) dense.
    """
    batch, tokens, heads, size = q.shape
    lengths = starts if k_lens is None else k_lens.clamp(0, tokens).to(torch.int32)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3])
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        sparse_attention[(tokens // block, batch * heads)](
            q, k, v, lengths, starts, columns, out, *strides, heads, _LOG2_E / size**0.5,
            BLOCK=block, STEP=STEP, D=size, MASKED=k_lens is not None,
            num_warps=8 if block == 128 else 4, num_stages=_stages(q.device),
        )
    return out


def _stages(device: torch.device) -> int:
    """Depth of the pipeline over the keys: what the shared memory of the GPU holds."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) in ((8, 0), (9, 0)):
        return 3  # 32 KB of q and 32 KB a stage
    return 2
