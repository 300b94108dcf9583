"""Our own 8-bit attention: mode ``"fp8"``.

q, k, v and the weights are e4m3, sums are fp32 (:data:`E4M3_MAX` = 448 is the largest value):

* q: a scale for each row (token and head), amax / 448; 1/sqrt(D) and log2(e) are folded into it.
* k: its mean over the valid tokens is subtracted first, which adds one constant to all scores of a
  query and so changes no softmax; then a scale for each block of :data:`KEY_BLOCK` tokens.
* v: a scale for each channel, over the valid tokens.
* weights: 2^(score - running maximum + :data:`SHIFT`), so that they reach into e4m3's range instead
  of ending at 1; the sum that divides them is of the unrounded ones.

On CUDA this is a Triton kernel (:mod:`wan_models.attention.fp8_triton`); on the CPU the same
arithmetic in torch, block by block. Random normal inputs give a relative error of about 0.05 to
exact attention.
"""

from __future__ import annotations

import torch

from contig_pass import AlignedPointer, UnitStrideLast
from wan_models.attention.contracts import bind, check_unit_stride

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
#: Tokens that share a scale of k; also the kernel's step over the keys.
KEY_BLOCK = 128
#: Exponent added to the weights: the largest is 2^8 = 256, the next power would not fit 448.
SHIFT = 8.0
HEAD_DIMS = (64, 128)
MINIMUM_CAPABILITY = (8, 9)
_LOG2_E = 1.4426950408889634
#: Stands for an amax of zero, whose reciprocal must stay finite.
_TINY = 1e-30


def run(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_lens: torch.Tensor | None
) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v in 8 bits.

    Args:
        q: (B, L, H, D), D one of :data:`HEAD_DIMS`, last dimension unit-stride.
        k, v: (B, S, H, D), last dimensions unit-stride.
        k_lens: (B,) valid keys; a sample without any gives zeros.

    Returns:
        (B, L, H, D) dense, in the dtype of q.

    Raises:
        ValueError: a last dimension that is not unit-stride.
    """
    return fp8_attention(q, k, v, None if k_lens is None else k_lens.to(k.device))


def obstacle(sm: tuple[int, int] | None, kind: str, triton: bool) -> str:
    """What rules the mode out on a device, in a few words, or ``""``.

    Args:
        sm: compute capability, ``None`` if it is not known.
        kind: ``"cuda"``, ``"cpu"``, ...
        triton: whether Triton is installed.
    """
    if kind in ("cpu", "meta"):
        return ""
    needed = "{}.{}".format(*MINIMUM_CAPABILITY)
    if kind != "cuda":
        return f"a CPU or a CUDA device of compute capability {needed} or later needed, got {kind}"
    if sm is None:
        return f"compute capability {needed} or later needed, no CUDA device is visible"
    if sm < MINIMUM_CAPABILITY:
        return f"compute capability {needed} or later needed, found {sm[0]}.{sm[1]}"
    return "" if triton else "package triton needed, not installed"


@torch.library.custom_op("wan_models::fp8_attention", mutates_args=())
def fp8_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_lens: torch.Tensor | None
) -> torch.Tensor:
    """The op behind :func:`run`; ``k_lens`` on the device of k."""
    check_unit_stride("fp8", q=q, k=k, v=v)
    if q.device.type == "cuda":
        from wan_models.attention import fp8_triton

        return fp8_triton.forward(q, k, v, k_lens)
    return reference(q, k, v, k_lens)


@fp8_attention.register_fake
def _fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_lens: torch.Tensor | None
) -> torch.Tensor:
    return q.new_empty(q.shape)


def quantise(x: torch.Tensor, amax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` as e4m3 values by a scale, and the scale, such that x is about values * scale.

    Args:
        x: fp32.
        amax: largest absolute values, broadcastable to x; 448 stands for each.
    """
    amax = amax.clamp(min=_TINY)
    return (x * (E4M3_MAX / amax)).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3).float(), amax / E4M3_MAX


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_lens: torch.Tensor | None
) -> torch.Tensor:
    """The kernel's arithmetic in plain torch, on any device; arguments as of :func:`run`."""
    batch, queries, heads, size = q.shape
    keys = k.shape[1]
    lengths = torch.full((batch,), keys, device=k.device) if k_lens is None else k_lens
    lengths = lengths.clamp(0, keys)
    valid = (torch.arange(keys, device=k.device) < lengths[:, None])[:, None, :, None]
    zero = torch.zeros((), device=k.device)
    # Head-major from here: (B, H, tokens, D).
    wide_k = torch.where(valid, k.transpose(1, 2).float(), zero)
    wide_v = torch.where(valid, v.transpose(1, 2).float(), zero)
    mean = wide_k.sum(2, keepdim=True) / lengths.clamp(min=1)[:, None, None, None]
    wide_k = torch.where(valid, wide_k - mean, zero)
    wide_q = q.transpose(1, 2).float()
    values_q, scale_q = quantise(wide_q, wide_q.abs().amax(-1, keepdim=True))
    scale_q = scale_q * (_LOG2_E / size**0.5)
    values_v, scale_v = quantise(wide_v, wide_v.abs().amax(2, keepdim=True))

    top = torch.full((batch, heads, queries, 1), -1e30, device=q.device)
    total = torch.zeros_like(top)
    out = torch.zeros((batch, heads, queries, size), device=q.device)
    for start in range(0, keys, KEY_BLOCK):
        part = slice(start, start + KEY_BLOCK)
        block = wide_k[:, :, part]
        values_k, scale_k = quantise(block, block.abs().amax((2, 3), keepdim=True))
        scores = (values_q @ values_k.transpose(-1, -2)) * (scale_q * scale_k)
        scores = scores.masked_fill(~valid[:, :, part].transpose(-1, -2), -torch.inf)
        new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
        weights = torch.exp2(scores - (new_top - SHIFT))
        fade = torch.exp2(top - new_top)
        total = total * fade + weights.sum(-1, keepdim=True)
        out = out * fade + weights.to(E4M3).float() @ values_v[:, :, part]
        top = new_top
    out = out * scale_v / torch.where(total > 0, total, torch.ones_like(total))
    return q.new_empty(q.shape).copy_(out.transpose(1, 2))


bind(
    "wan_models::fp8_attention", ("q", "k", "v"), (UnitStrideLast(), AlignedPointer(16)),
    "wan_models/attention/fp8_triton.py reads rows of the last dimension by vectors of 16 bytes; "
    "off those, Triton compiles a kernel that reads single elements",
)
