"""The dispatcher: one call for every attention kernel, on (B, L, H, D) tensors."""

from __future__ import annotations

import torch

from wan_models.attention import auto, flash, flash_fp8, fp8, fp16, sage, sdpa
from wan_models.attention import radial as block_sparse
from wan_models.attention.checks import check_tensors
from wan_models.attention.modes import MODES, check_mode
from wan_models.attention.radial import RadialPattern

__all__ = ["MODES", "attention", "check_mode"]


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mode: str = "sdpa",
    k_lens: torch.Tensor | None = None,
    radial: RadialPattern | None = None,
) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v, by the kernel that ``mode`` names and no other.

    8-bit kernels change numbers: those of the modes that say so in their name, and ``sageattn``.

    ============================================  ==============================================
    mode                                          kernel
    ============================================  ==============================================
    ``sdpa``                                      torch's fastest on this machine, by the rule of
                                                  :func:`wan_models.attention.sdpa.choose`
    ``sdpa_cudnn``, ``sdpa_flash``,               that backend of torch
    ``sdpa_efficient``, ``sdpa_math``
    ``flash_attn_2``, ``flash_attn_3``,           FlashAttention 2, 3 and 4
    ``flash_attn_4``
    ``flash_attn_3_fp8``                          FlashAttention 3 on q, k and v in 8 bits
    ``sageattn``                                  SageAttention 2
    ``sageattn_3``, ``sageattn_3_fp4``,           SageAttention 3; all three names are its FP4
    ``sageattn_3_fp8``                            kernel
    ``radial``                                    block-sparse, over the blocks of ``radial``
    ``fp8``                                       our own 8-bit kernel
    ``fp16``                                      our own 16-bit kernel; on a GPU for Hopper alone
    ``auto``                                      the fastest 16-bit one, by measurement: see
                                                  :mod:`wan_models.attention.auto`
    ``auto_fp8``                                  the fastest 8-bit one, by measurement
    ============================================  ==============================================

    For inference: the modes outside of torch have no gradients.

    Args:
        q: (B, L, H, D); k, v: (B, S, H, D); one dtype, one device. Any strides, but for a
            unit-stride last dimension in the modes outside of torch (under ``contig_safe`` the
            pass supplies it). Copied are only k for SageAttention 3, which writes to it, and
            samples that do not lie end to end where flash kernels take ``k_lens``.
        mode: one of :data:`MODES`.
        k_lens: (B,) valid keys of each sample, from 1 to S; the keys beyond are masked, in every
            mode. Lengths on the CPU are checked in eager mode; others count as the nearest
            in 0..S, and a sample with no valid key has undefined values.
        radial: the pattern of mode ``"radial"``, and of no other.

    Returns:
        (B, L, H, D). Dense, except from ``sdpa_math`` and SageAttention 3 (head-major) and from
        torch's kernels where q is not dense.

    Raises:
        ValueError: an unknown mode, one that this device, what is installed or these arguments
            rule out, or shapes that do not fit one another.
    """
    check_tensors(q, k, v, k_lens)
    check_mode(mode, q.device, masked=k_lens is not None, dtype=q.dtype, head_dim=q.shape[-1])
    if (radial is not None) != (mode == "radial"):
        needs = "needs radial=RadialPattern(...)" if mode == "radial" else "takes no radial pattern"
        raise ValueError(f"attention mode {mode!r} {needs}")
    if mode == "radial":
        return block_sparse.run(q, k, v, k_lens, radial)
    chosen = auto.resolve(mode, q, k, k_lens, lambda name: _by_name(name, q, k, v, k_lens))
    return _by_name(chosen, q, k, v, k_lens)


def _by_name(
    mode: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_lens: torch.Tensor | None
) -> torch.Tensor:
    if mode == "fp8":
        return fp8.run(q, k, v, k_lens)
    if mode == "fp16":
        return fp16.run(q, k, v, k_lens)
    if mode == "flash_attn_3_fp8":
        return flash_fp8.run(q, k, v, k_lens)
    if mode in sdpa.MODES:
        return sdpa.run(q, k, v, k_lens, mode)
    return (flash if mode in flash.MODES else sage).run(q, k, v, k_lens, mode)
