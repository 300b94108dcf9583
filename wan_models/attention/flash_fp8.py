"""FlashAttention 3 in 8 bits: mode ``"flash_attn_3_fp8"``.

q, k and v are cast to e4m3 by one scale for each sample and head, k after the mean of its valid
tokens is subtracted, which changes no softmax. The casts are plain torch, so the compiler may fuse
them into what makes q, k and v; the ops take what is cast. Weights are e4m3 in the kernel too.

With channels that stand out in both q and k this is less accurate than mode ``"fp8"``, which
balances and turns channels: a cosine of 0.971 to exact attention where that has 0.998 (measured on
an H100, two channels of 128 four times larger in both).
"""

from __future__ import annotations

import torch

from wan_models.attention import packages
from wan_models.attention.contracts import VECTORS, bind, check_unit_stride, dense
from wan_models.attention.fp8_arithmetic import E4M3, E4M3_MAX, TINY
from wan_models.attention.varlen import pack

_MODE = "flash_attn_3_fp8"


def run(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_lens: torch.Tensor | None
) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v in 8 bits by FlashAttention 3.

    Args:
        q: (B, L, H, D), last dimension unit-stride; k, v: (B, S, H, D) likewise. Any alignment,
            since what the kernel reads is cast.
        k_lens: (B,) valid keys.

    Returns:
        (B, L, H, D) dense, in the dtype of q; the kernel's own result is bf16.

    Raises:
        ValueError: a last dimension that is not unit-stride.
    """
    valid = None
    if k_lens is not None:
        lengths = k_lens.to(k.device).clamp(0, k.shape[1])
        valid = (torch.arange(k.shape[1], device=k.device) < lengths[:, None])[:, :, None, None]
    narrow_q, q_scale = cast(q.float())
    narrow_k, k_scale = cast(_smooth(k.float(), valid))
    narrow_v, v_scale = cast(_masked(v.float(), valid))
    if k_lens is None:
        out = flash_attn_3_fp8(narrow_q, narrow_k, narrow_v, q_scale, k_scale, v_scale)
    else:
        # Each sample is two sequences there, of one scale.
        scales = (scale.repeat_interleave(2, 0) for scale in (q_scale, k_scale, v_scale))
        packed = pack(narrow_q, narrow_k, narrow_v, k_lens)
        out = flash_attn_3_fp8_varlen(*packed, *scales).unflatten(0, q.shape[:2])
    return out.to(q.dtype)


def cast(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x (B, tokens, H, D) fp32 in e4m3, in its order, and (B, H) fp32 scales that undo it."""
    amax = x.abs().amax((1, 3), keepdim=True).clamp(min=TINY)
    values = (x * (E4M3_MAX / amax)).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
    return values, (amax / E4M3_MAX)[:, 0, :, 0]


def _smooth(k: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """k less the mean of its valid tokens, zero beyond them."""
    if valid is None:
        return k - k.mean(1, keepdim=True)
    k = _masked(k, valid)
    return _masked(k - k.sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp(min=1), valid)


def _masked(x: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    return x if valid is None else torch.where(valid, x, 0.0)


@torch.library.custom_op("wan_models::flash_attn_3_fp8", mutates_args=())
def flash_attn_3_fp8(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_scale: torch.Tensor,
    k_scale: torch.Tensor, v_scale: torch.Tensor,
) -> torch.Tensor:
    """q (B, L, H, D), k, v (B, S, H, D) e4m3; scales (B, H) fp32. Returns q's shape, bf16."""
    check_unit_stride(_MODE, q=q, k=k, v=v)
    call = packages.function(_MODE, "flash_attn_func")
    return _output(call(q, k, v, q_descale=q_scale, k_descale=k_scale, v_descale=v_scale))


@torch.library.custom_op("wan_models::flash_attn_3_fp8_varlen", mutates_args=())
def flash_attn_3_fp8_varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_bounds: torch.Tensor,
    k_bounds: torch.Tensor, q_longest: int, k_longest: int, q_scale: torch.Tensor,
    k_scale: torch.Tensor, v_scale: torch.Tensor,
) -> torch.Tensor:
    """The sequences of :class:`wan_models.attention.varlen.Packed`, scales (2B, H). Returns
    (B*L, H, D) bf16 dense."""
    check_unit_stride(_MODE, q=q, k=k, v=v)
    call = packages.function(_MODE, "flash_attn_varlen_func")
    return _output(call(
        q, k, v, q_bounds, k_bounds, q_longest, k_longest,
        q_descale=q_scale, k_descale=k_scale, v_descale=v_scale,
    ))


@flash_attn_3_fp8.register_fake
@flash_attn_3_fp8_varlen.register_fake
def _fake(q: torch.Tensor, *_: object) -> torch.Tensor:
    return q.new_empty(q.shape, dtype=torch.bfloat16)


def _output(result: object) -> torch.Tensor:
    """The output in bf16, dense; older versions return it with the log-sum-exp beside it."""
    out = result[0] if isinstance(result, tuple) else result
    return dense(out.to(torch.bfloat16))


for _name in ("flash_attn_3_fp8", "flash_attn_3_fp8_varlen"):
    bind(
        f"wan_models::{_name}", ("q", "k", "v"), VECTORS,
        "hopper/flash_attn_interface.py copies only where the last stride is not 1; TMA "
        "descriptors take addresses and pitches that are multiples of 16 bytes",
    )
