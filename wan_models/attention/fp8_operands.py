"""From q, k and v to what the 8-bit attention kernels take: the launches of the passes.

Two ways in: q and k ready, or as their projections made them (:class:`Producer`), which are then
normed and turned on the way and never written in 16 bits. v is on its own
(:func:`quantise_values`), so that it may be done with before q and k are made.
"""

from __future__ import annotations

import contextlib
import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton

from wan_models.attention import fp8_arithmetic as arithmetic
from wan_models.attention import fp8_quantise as passes

#: Queries of a program of either kernel.
BLOCK_M = 128
#: Of a program of a pass; 64 queries in 4 warps were read faster than 128 in 8 on an H100.
_QUERIES = 64
#: Tokens of v that are turned round together.
_VALUES = 128


class Operands(NamedTuple):
    """What the kernels take.

    Attributes:
        q: (planes, L', D) e4m3, planes = B * H, L' a multiple of :data:`BLOCK_M`.
        k: (planes, S', D) e4m3, rows of 16 in the kernel's order if it has one; S' a multiple of
            :data:`wan_models.attention.fp8_arithmetic.PADDING`.
        v: (planes, D, S') e4m3.
        q_scales: (planes, L') fp32; turn products of k's scale into codes over 126.
        k_scales: (planes, S' / block) fp32.
        v_scales: (planes, D) fp32.
        lengths: (B,) int32 valid keys.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    q_scales: torch.Tensor
    k_scales: torch.Tensor
    v_scales: torch.Tensor
    lengths: torch.Tensor


@dataclass(frozen=True)
class Producer:
    """What makes q and k of their projections.

    Attributes:
        q_weight, k_weight: (H * D,) of the RMS norms, unit-stride.
        table: (2, L', 1, D/2), or (2, B, L', 1, D/2), of :mod:`wan_models.rope`.
        eps: of the norms.
    """

    q_weight: torch.Tensor
    k_weight: torch.Tensor
    table: torch.Tensor
    eps: float


def quantise_values(
    v: torch.Tensor, k_lens: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """v and its scales in :class:`Operands`, of v (B, S, H, D), last dimension unit-stride.

    Args:
        k_lens: (B,) valid keys, on the device of v.
    """
    batch, keys, heads, size = v.shape
    planes, k_padded = batch * heads, arithmetic.padded(keys)
    lengths = _lengths(k_lens, batch, keys, v.device)
    found = torch.empty(
        (planes, -(-keys // passes.SPAN), size), dtype=torch.int32, device=v.device
    )
    values = torch.empty((planes, size, k_padded), dtype=arithmetic.E4M3, device=v.device)
    scales = torch.empty((planes, size), dtype=torch.float32, device=v.device)
    with on(v.device):
        passes.peaks[(planes, found.shape[1])](
            v, lengths, found, *v.stride()[:3], heads, SPAN=passes.SPAN, STEP=passes.STEP, D=size,
            num_warps=8,
        )
        passes.settle_values[(planes,)](
            found, scales, found.shape[1], D=size, PARTS=16, num_warps=4
        )
        passes.quantise_values[(planes, k_padded // _VALUES)](
            v, lengths, scales, values, *v.stride()[:3], heads, k_padded, BLOCK=_VALUES, D=size,
            num_warps=4,
        )
    return values, scales


def quantise(
    q: torch.Tensor, k: torch.Tensor, values: tuple[torch.Tensor, torch.Tensor],
    k_lens: torch.Tensor | None, *, reorder: bool, key_block: int = arithmetic.KEY_BLOCK,
    producer: Producer | None = None,
) -> Operands:
    """The kernels' operands of q (B, L, H, D) and k (B, S, H, D), last dimensions unit-stride.

    Args:
        values: of :func:`quantise_values`, with the same ``k_lens``.
        k_lens: (B,) valid keys, on the device of k.
        reorder: rows of k in the order of the Hopper kernel.
        key_block: tokens that share a scale of k; divides what keys are padded to.
        producer: q and k are projections whose heads lie side by side, to be normed and turned.
    """
    batch, queries, heads, size = q.shape
    keys, planes = k.shape[1], batch * heads
    wide = {"dtype": torch.float32, "device": q.device}
    narrow = {"dtype": arithmetic.E4M3, "device": q.device}
    lengths = _lengths(k_lens, batch, keys, k.device)
    q_padded, k_padded = arithmetic.padded(queries, BLOCK_M), arithmetic.padded(keys)
    means, balance = torch.empty((2, planes, size), **wide).unbind(0)
    made = Operands(
        torch.empty((planes, q_padded, size), **narrow),
        torch.empty((planes, k_padded, size), **narrow),
        values[0],
        torch.empty((planes, q_padded), **wide),
        torch.empty((planes, k_padded // key_block), **wide),
        values[1],
        lengths,
    )
    turn = _hadamard(size, q.device)
    q_at, k_at = q.stride()[:3], k.stride()[:3]
    factor = arithmetic.LOG2_E / math.sqrt(size) * 8 / arithmetic.TOP_CODE / size
    fused = producer is not None
    with on(q.device):
        q_norms, k_norms, squares, q_turn, k_turn = _turns(q, k, q_padded, producer)
        all_queries = _lengths(None, batch, queries, q.device)
        q_found = _sampled(q, all_queries, (q_norms, *q_turn), fused)
        k_found = _sampled(k, lengths, (k_norms, *k_turn), fused)
        passes.settle[(planes,)](
            q_found, k_found, lengths, means, balance, heads, q_found.shape[1], k_found.shape[1],
            PICK=arithmetic.step_of(keys), D=size, PARTS=16, num_warps=4,
        )
        passes.quantise_queries[(planes, q_padded // _QUERIES)](
            q, balance, turn, made.q, made.q_scales, *q_at, heads, queries, q_padded, factor,
            squares, *q_turn, BLOCK=_QUERIES, D=size, FUSED=fused, num_warps=4, maxnreg=128,
        )
        if producer is not None:
            passes.norm_scales[(triton.cdiv(q_padded, 128), batch)](
                squares, made.q_scales, heads, q_padded, heads * size, producer.eps, BLOCK=128,
                num_warps=4,
            )
        passes.quantise_keys[(planes, k_padded // key_block)](
            k, lengths, means, balance, turn, made.k, made.k_scales, *k_at, heads, keys, k_padded,
            k_norms, *k_turn, BLOCK=key_block, D=size, REORDER=reorder, FUSED=fused, num_warps=8,
        )
    return made


def _lengths(
    k_lens: torch.Tensor | None, batch: int, tokens: int, device: torch.device
) -> torch.Tensor:
    """(B,) int32 from 0 to ``tokens``; all tokens where there are no lengths."""
    if k_lens is None:
        return torch.full((batch,), tokens, dtype=torch.int32, device=device)
    return k_lens.clamp(0, tokens).to(torch.int32)


def _sampled(
    x: torch.Tensor, lengths: torch.Tensor, turn: tuple[object, ...], fused: bool
) -> torch.Tensor:
    """What :func:`wan_models.attention.fp8_quantise.sample` finds in x (B, tokens, H, D)."""
    batch, tokens, heads, size = x.shape
    pick = arithmetic.step_of(tokens)
    parts = -(-tokens // (arithmetic.GROUP * passes.GROUPS * pick))
    found = torch.empty((batch * heads, parts, 3, size), dtype=torch.float32, device=x.device)
    passes.sample[(batch * heads, parts)](
        x, lengths, found, *x.stride()[:3], heads, tokens, *turn, PICK=pick, GROUPS=passes.GROUPS,
        D=size, FUSED=fused, num_warps=4,
    )
    return found


def _turns(
    q: torch.Tensor, k: torch.Tensor, q_padded: int, producer: Producer | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[object, ...], tuple[object, ...]]:
    """1 / rms of sampled tokens of q and of all of k, room for the squares of q, and the arguments
    by which rows of each are turned. Without a producer they stand for nothing."""
    if producer is None:
        nothing = (q, q, 0, 0, 0, 0)
        return q, k, q, nothing, nothing
    batch, _, heads, size = q.shape
    q_norms = _norms(q, arithmetic.step_of(q.shape[1]), producer.eps)
    k_norms = _norms(k, 1, producer.eps)
    squares = torch.empty((batch * heads, q_padded), dtype=torch.float32, device=q.device)
    # In fp16: half of what every head reads of it, and nearer than bf16 is to q and k.
    table = producer.table.to(torch.float16, memory_format=torch.contiguous_format)
    tokens, pairs = table.shape[-3], size // 2
    each = tokens * pairs if table.dim() == 5 else 0
    where = (table, each, pairs, table.stride(0), tokens)
    return q_norms, k_norms, squares, (producer.q_weight, *where), (producer.k_weight, *where)


def _norms(x: torch.Tensor, pick: int, eps: float) -> torch.Tensor:
    """(B, tokens) fp32, written for every ``pick``-th group of tokens of x (B, tokens, H, D)."""
    batch, tokens, heads, size = x.shape
    out = torch.empty((batch, tokens), dtype=torch.float32, device=x.device)
    groups = -(-tokens // (arithmetic.GROUP * pick))
    passes.norms[(groups * (arithmetic.GROUP // passes.ROWS), batch)](
        x, out, x.stride(0), x.stride(1), tokens, heads * size, eps, PICK=pick,
        GROUP=arithmetic.GROUP, ROWS=passes.ROWS, COLUMNS=passes.COLUMNS, num_warps=4,
    )
    return out


@functools.cache
def _hadamard(size: int, device: torch.device) -> torch.Tensor:
    """(size, size), bf16 on a GPU, whose tensor cores multiply by it."""
    turn = arithmetic.hadamard(size)
    return turn.to(device, torch.bfloat16 if device.type == "cuda" else None)


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """Launch on ``device``: Triton goes by the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
