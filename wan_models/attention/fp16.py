"""Our own 16-bit attention: mode ``"fp16"``.

Scores are sums of fp16 products kept in fp16, in units of log2 e / sqrt(D), a factor that q brings.
Weights are powers of two of their differences to the largest score so far, in fp16 too, and
weighted sums of v are fp32. So a score s is off by up to some 2^-11 |s|, about as much as rounding
q and k to bf16 has moved it before, and weights have 11 bits where a bf16 kernel's have 8. Against
float64 on bf16 operands of 32,760 tokens (H100), relative errors beside FlashAttention 3's: 0.0019
and 0.0023 on normal ones; 0.0103 and 0.0017 with q and k four times as large, where rounding them
to bf16 costs 0.008 to 0.014 by itself (to 2,000 keys, on a CPU).

fp16 reaches to 65,504. Where a number of q (times that factor), of k or of v lies beyond, the
results that it has a part in are NaN or infinite; a score below -65,504 counts as minus infinity,
and where all of a query's do, its result is NaN. The normed queries and keys of a Wan model are at
most sqrt(C) times their norm's weight.

On a Hopper GPU this is :mod:`wan_models.attention.fp16_hopper`; on the CPU the same arithmetic in
torch.
"""

from __future__ import annotations

import math

import torch

from wan_models.attention import packages
from wan_models.attention.contracts import VECTORS, bind, check_vectors, dense

#: What Triton must have: Gluon for Hopper.
NEEDS = "triton.experimental.gluon.nvidia.hopper"


def run(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_lens: torch.Tensor | None
) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v by fp16 products.

    Args:
        q: (B, L, H, D), D 64 or 128; k, v: (B, S, H, D); bf16 or fp16, all alike.
        k_lens: (B,) valid keys; a sample without any gives zeros.

    Returns:
        (B, L, H, D) dense, in the dtype of q.
    """
    lengths = None
    if k_lens is not None:
        lengths = k_lens.to(k.device)
        valid = torch.arange(k.shape[1], device=k.device) < lengths[:, None]
        # Beyond the lengths may lie what is not finite, and 0 times that is NaN.
        k, v = (torch.where(valid[..., None, None], x, 0) for x in (k, v))
    return fp16_attention(narrowed(scaled(q)), narrowed(k), v.half(), lengths, q.dtype)


def narrowed(x: torch.Tensor) -> torch.Tensor:
    """``x`` in fp16, NaN where it does not fit: an infinity would make a key weigh nothing."""
    if x.dtype == torch.float16:
        return x
    half = x.half()
    return torch.where(half.isinf(), torch.nan, half)


def score_factor(size: int) -> float:
    """log2(e) / sqrt(D), which q brings, so that 2 to the power of a score is its weight."""
    return math.log2(math.e) / math.sqrt(size)


def scaled(q: torch.Tensor) -> torch.Tensor:
    """q (..., D) in fp32 times :func:`score_factor`.

    The numbers stand here and in no constant of the module: under ``dynamic=True`` Dynamo takes a
    float from a module for an input, and compiles twice.
    """
    return q.float() * (0.18033688011112042 if q.shape[-1] == 64 else 0.12751743082459868)


@torch.library.custom_op("wan_models::fp16_attention", mutates_args=())
def fp16_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_lens: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The op behind :func:`run`.

    Args:
        q: (B, L, H, D) fp16, as :func:`scaled` makes it.
        k, v: (B, S, H, D) fp16; finite beyond ``k_lens``, too.
        k_lens: (B,) on the device of k, or None.
        dtype: of the result.

    Returns:
        (B, L, H, D) dense.
    """
    check_vectors("fp16", q=q, k=k, v=v)
    if q.device.type == "cuda":
        from wan_models.attention import fp16_hopper

        return fp16_hopper.forward(q, k, v, k_lens, dtype)
    return reference(q, k, v, k_lens).to(dtype)


@fp16_attention.register_fake
def _fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_lens: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    return q.new_empty(q.shape, dtype=dtype)


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_lens: torch.Tensor | None
) -> torch.Tensor:
    """What the kernel computes, all keys at once: (B, L, H, D) fp32, dense. Arguments as of the op.
    """
    keys = k.shape[1]
    if not keys:
        return q.new_zeros(q.shape, dtype=torch.float32)
    scores = torch.einsum("blhd,bshd->bhls", q.float(), k.float()).half()
    counts = torch.full((k.shape[0],), keys, device=k.device) if k_lens is None else k_lens
    beyond = torch.arange(keys, device=k.device) >= counts[:, None]
    scores = scores.masked_fill(beyond[:, None, None], -torch.inf)
    top = scores.amax(-1, keepdim=True).clamp(min=-65504)
    weights = torch.exp2((scores - top).float()).half().float()
    total = weights.sum(-1, keepdim=True)
    total = torch.where((counts > 0)[:, None, None, None], total, 1)  # zeros without a valid key
    made = torch.einsum("bhls,bshd->bhld", weights, v.float()) / total
    return dense(made.transpose(1, 2))


def obstacle(
    sm: tuple[int, int] | None, kind: str, dtype: torch.dtype | None, triton: bool
) -> str:
    """What rules the mode out on a device, in a few words, or ``""``.

    Args:
        sm: compute capability, ``None`` if it is not known.
        kind: ``"cuda"``, ``"cpu"``, ...
        dtype: of q, k and v, if known.
        triton: whether Triton is installed, with :data:`NEEDS`.
    """
    wrong = []
    if dtype is not None and dtype not in packages.HALF:
        wrong.append(f"bfloat16 or float16 needed, got {str(dtype).removeprefix('torch.')}")
    if kind not in ("cpu", "meta"):
        needed = "a CUDA device of compute capability 9.0 needed"
        if kind != "cuda":
            wrong.append(f"a CPU or {needed}, got {kind}")
        elif sm != (9, 0):
            found = "none is visible" if sm is None else f"found {sm[0]}.{sm[1]}"
            wrong.append(f"{needed}, {found}")
        elif not triton:
            wrong.append("package triton 3.5 or later needed, not installed")
    return "; ".join(wrong)


bind(
    "wan_models::fp16_attention", ("q", "k", "v"), VECTORS,
    "wan_models/attention/fp16_hopper.py reads by TMA descriptors, which take addresses and "
    "pitches that are multiples of 16 bytes and a unit-stride last dimension",
)
