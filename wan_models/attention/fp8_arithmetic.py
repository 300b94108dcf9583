"""What our 8-bit attention computes, in plain torch: the kernels' constants and their reference.

q, k, v and the weights are e4m3, sums are fp32. Nothing of this changes what is computed, only how
it rounds, except for the last line:

* k: its mean over a sample of the valid tokens (:func:`sampled`) is subtracted. That adds one
  constant to all scores of a query and so changes no softmax; and as the sampled scores then have
  mean zero, the largest score of a query is never below zero.
* q and k: each channel of q is multiplied and that of k divided by the power of two that makes both
  reach about equally far in the sample; then both are rounded to bf16 and turned by a Hadamard
  matrix, which spreads a channel that stands out over all.
* q has a scale for each row (token and head), k one for each block of tokens, by their largest
  values; both use e4m3 up to :data:`TOP_OPERAND` only, so that no score exceeds 16 * 16 * 128,
  which fp16 holds.
* v: a scale for each channel, by the largest of the valid tokens, up to :data:`E4M3_MAX`.
* weights: as the codes of e4m3 are 8 to a power of two, 2^x is taken to have the code 8 x plus a
  constant, rounded: exact at powers of two, up to 6% above between them. The largest weight of a
  row has code :data:`TOP_CODE`, which is 448, and the sum that divides is of the rounded ones.

Poison in, poison out: a q that is not finite makes its row NaN, a valid k its head, a valid v its
channel. Padded tokens count nowhere, whatever they hold.

Random normal inputs give a relative error of about 0.055 to exact attention, a cosine of 0.9985.
On Hopper the running maximum is kept in fp16: a largest score of x powers of two is off by x/2048
of a power at most, less than what rounding q and k to 8 bits does to it; beyond a million, where
fp16 ends, rows are NaN.
"""

from __future__ import annotations

import torch

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
#: D, of which the kernels are made.
HEAD_DIMS = (64, 128)
#: Tokens that share a scale of k, and the step over the keys; 256 in the kernel for Hopper.
KEY_BLOCK = 128
#: Keys are padded to a multiple of it on every device: a block of the kernel for Hopper.
PADDING = 256
#: Largest absolute value of q and k in e4m3.
TOP_OPERAND = 16.0
#: e4m3's code of 448; codes are 8 a power of two.
TOP_CODE = 126.0
#: Neighbouring tokens that are sampled together.
GROUP = 32
#: Above so many tokens every SAMPLE_STEP-th group is sampled, else every one.
SAMPLE_ALL = 4096
SAMPLE_STEP = 8
LOG2_E = 1.4426950408889634
#: Stands for an amax of zero, whose reciprocal must stay finite.
TINY = 1e-30
#: For the balance no channel counts as smaller than this share of the largest of its head.
SHARE = 2.0**-10
#: A head whose largest value is not between SMALL and 1 / SMALL is not balanced.
SMALL = 1e-20


def padded(count: int, block: int = PADDING) -> int:
    """``count`` up to the next multiple of ``block``."""
    return -(-count // block) * block


def step_of(tokens: int) -> int:
    """Every how manieth group of a sequence of ``tokens`` is sampled."""
    return SAMPLE_STEP if tokens > SAMPLE_ALL else 1


def sampled(tokens: int, device: torch.device) -> torch.Tensor:
    """(tokens,) bool: which are looked at for the mean of k and the balance of q and k."""
    group = torch.arange(tokens, device=device) // GROUP
    return group % step_of(tokens) == 0


def quantise(
    x: torch.Tensor, amax: torch.Tensor, top: float = E4M3_MAX
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` as e4m3 values by a scale, and the scale, such that x is about values * scale.

    Args:
        x: fp32.
        amax: largest absolute values, broadcastable to x; ``top`` stands for each. One that is not
            finite gives a scale of NaN.
    """
    amax = torch.where(amax.isfinite(), amax.clamp(min=TINY), torch.nan)
    # Rounding may carry |x| * top / amax one ulp beyond 448, where torch before 2.12 has a NaN.
    return (x * (top / amax)).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3).float(), amax / top


def quantise_values(
    v: torch.Tensor, k_lens: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """v (B, S, H, D) by channel: e4m3 values (B, H, S, D), as fp32, zeros beyond the lengths (B,),
    and scales (B, H, 1, D) fp32."""
    wide = torch.where(_valid(v, k_lens), v.transpose(1, 2).float(), 0.0)
    return quantise(wide, wide.abs().amax(2, keepdim=True))


def _valid(x: torch.Tensor, k_lens: torch.Tensor | None) -> torch.Tensor:
    """(B, 1, S, 1) bool for x (B, S, H, D)."""
    batch, keys = x.shape[:2]
    lengths = torch.full((batch,), keys, device=x.device) if k_lens is None else k_lens
    return (torch.arange(keys, device=x.device) < lengths[:, None])[:, None, :, None]


def hadamard(size: int) -> torch.Tensor:
    """Sylvester's matrix of 1 and -1, (size, size) fp32 for a power of two; its square is size."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        top = torch.cat([matrix, matrix], 1)
        matrix = torch.cat([top, torch.cat([matrix, -matrix], 1)])
    return matrix


def weights_of(share: torch.Tensor) -> torch.Tensor:
    """The e4m3 weights, as fp32, whose codes are round(126 * clamp(share, 0, 1))."""
    codes = (share.nan_to_num(0).clamp(0, 1) * TOP_CODE).round().to(torch.uint8)
    return codes.view(E4M3).float()


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_lens: torch.Tensor | None,
    block: int = KEY_BLOCK, q_factors: torch.Tensor | None = None,
) -> torch.Tensor:
    """The kernels' arithmetic in plain torch, on any device.

    Args:
        q: (B, L, H, D), D a power of two; any dtype.
        k, v: (B, S, H, D).
        k_lens: (B,) valid keys; a sample without any gives zeros.
        block: tokens that share a scale of k, and the step over the keys.
        q_factors: (B, L) fp32, what rows of q are to be multiplied by: where they are sampled, and
            else in their scales.

    Returns:
        (B, L, H, D) dense, in the dtype of q.
    """
    batch, queries, heads, size = q.shape
    keys = k.shape[1]
    valid = _valid(k, k_lens)
    zero = torch.zeros((), device=k.device)
    # Head-major from here: (B, H, tokens, D).
    wide_q = q.transpose(1, 2).float()
    factors = 1.0 if q_factors is None else q_factors[:, None, :, None]
    wide_k = torch.where(valid, k.transpose(1, 2).float(), zero)
    seen = valid & sampled(keys, k.device)[:, None]
    some_k = torch.where(seen, wide_k, zero)
    mean = some_k.sum(2, keepdim=True) / seen.sum(2, keepdim=True).clamp(min=1)
    wide_k = torch.where(valid, wide_k - mean, zero)
    balance = _balance(
        (wide_q * factors)[:, :, sampled(queries, q.device)].abs().amax(2, keepdim=True),
        torch.where(seen, wide_k, zero).abs().amax(2, keepdim=True),
    )
    turn = hadamard(size).to(q.device)
    wide_q = (wide_q * balance).bfloat16().float() @ turn
    wide_k = (wide_k / balance).bfloat16().float() @ turn
    values_q, scale_q = quantise(wide_q, wide_q.abs().amax(-1, keepdim=True), TOP_OPERAND)
    scale_q = scale_q * (LOG2_E / size**0.5 * 8 / TOP_CODE / size) * factors
    values_v, scale_v = quantise_values(v, k_lens)

    start = torch.ones((batch, heads, queries, 1), device=q.device)
    total = torch.zeros_like(start)
    out = torch.zeros((batch, heads, queries, size), device=q.device)
    for first in range(0, keys, block):
        part = slice(first, first + block)
        some = wide_k[:, :, part]
        values_k, scale_k = quantise(some, some.abs().amax((2, 3), keepdim=True), TOP_OPERAND)
        share = (values_q @ values_k.transpose(-1, -2)) * (scale_q * scale_k)
        new = torch.minimum(start, 1 - share.amax(-1, keepdim=True))
        weights = weights_of(share + new)
        weights = weights * valid[:, :, part].transpose(-1, -2)
        fade = torch.exp2((new - start) * (TOP_CODE / 8))
        total = total * fade + weights.sum(-1, keepdim=True)
        out = out * fade + weights @ values_v[:, :, part]
        start = new
    out = out * scale_v / torch.where(total > 0, total, torch.ones_like(total))
    return q.new_empty(q.shape).copy_(out.transpose(1, 2))


def _balance(peak_q: torch.Tensor, peak_k: torch.Tensor) -> torch.Tensor:
    """Powers of two that make channels of q and k reach about equally far, by their peaks."""
    top_q, top_k = (peak.amax(-1, keepdim=True) for peak in (peak_q, peak_k))
    usable = torch.ones_like(top_q, dtype=torch.bool)
    for top in (top_q, top_k):
        usable &= (top > SMALL) & (top < 1 / SMALL)
    peak_q, peak_k = torch.maximum(peak_q, top_q * SHARE), torch.maximum(peak_k, top_k * SHARE)
    ratio = torch.where(usable, peak_k, 1.0) / torch.where(usable, peak_q, 1.0)
    return torch.exp2(torch.floor(0.5 * torch.log2(ratio) + 0.5))
