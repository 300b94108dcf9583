"""The dispatcher: one call for every attention kernel, on (B, L, H, D) tensors."""

from __future__ import annotations

import importlib.util

import torch

from wan_models.attention import flash, fp8, packages, sage, sdpa
from wan_models.attention import radial as block_sparse
from wan_models.attention.radial import RadialPattern

#: Every mode of :func:`attention`.
MODES = (*sdpa.MODES, *packages.DEMANDS, "radial", "fp8")
_FLASH = ("flash_attn_2", "flash_attn_3")


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

    ============================================  ==============================================
    mode                                          kernel
    ============================================  ==============================================
    ``sdpa``                                      torch's fastest on this machine, by the rule of
                                                  :func:`wan_models.attention.sdpa.choose`
    ``sdpa_cudnn``, ``sdpa_flash``,               that backend of torch
    ``sdpa_efficient``, ``sdpa_math``
    ``flash_attn_2``, ``flash_attn_3``            the flash-attn and FlashAttention-3 packages
    ``sageattn``                                  SageAttention 2
    ``sageattn_3``, ``sageattn_3_fp4``,           SageAttention 3; all three names are its FP4
    ``sageattn_3_fp8``                            kernel
    ``radial``                                    block-sparse, over the blocks of ``radial``
    ``fp8``                                       our own 8-bit kernel
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
    _check_tensors(q, k, v, k_lens)
    check_mode(mode, q.device, masked=k_lens is not None, dtype=q.dtype, head_dim=q.shape[-1])
    if (radial is not None) != (mode == "radial"):
        needs = "needs radial=RadialPattern(...)" if mode == "radial" else "takes no radial pattern"
        raise ValueError(f"attention mode {mode!r} {needs}")
    if mode == "radial":
        return block_sparse.run(q, k, v, k_lens, radial)
    if mode == "fp8":
        return fp8.run(q, k, v, k_lens)
    if mode in sdpa.MODES:
        return sdpa.run(q, k, v, k_lens, mode)
    return (flash if mode in _FLASH else sage).run(q, k, v, k_lens, mode)


def check_mode(
    mode: str,
    device: torch.device,
    *,
    masked: bool = False,
    dtype: torch.dtype | None = None,
    head_dim: int | None = None,
) -> None:
    """Raise a ValueError of one line if ``mode`` cannot run on ``device``.

    On the meta device, where nothing is computed, neither packages nor a GPU are needed.

    Args:
        mode: see :func:`attention`.
        device: where q, k and v are.
        masked: whether ``k_lens`` is given; every mode takes it.
        dtype: of q, k and v, if known.
        head_dim: D, if known.
    """
    del masked  # part of what a caller knows; no mode refuses it
    if mode not in MODES:
        raise ValueError(f"attention mode {mode!r}: use one of {', '.join(map(repr, MODES))}")
    problems = [
        _machine_problem(mode, device.type, device.index, dtype),
        "" if head_dim is None else _head_dim_problem(mode, head_dim),
    ]
    problems = [problem for problem in problems if problem]
    if problems:
        raise ValueError(f"attention mode {mode!r}: {'; '.join(problems)}")


@torch.compiler.assume_constant_result
def _machine_problem(
    mode: str, kind: str, index: int | None, dtype: torch.dtype | None
) -> str:
    """What of the machine rules ``mode`` out, or ``""``; read while tracing."""
    if mode in sdpa.MODES:
        return sdpa.obstacle(mode, kind, dtype)
    if mode in packages.DEMANDS:
        return packages.obstacle(mode, kind, index, dtype)
    sm = packages.capability(kind, index)
    triton = importlib.util.find_spec("triton") is not None
    if mode == "fp8":
        return fp8.obstacle(sm, kind, triton)
    return block_sparse.obstacle(sm, kind, dtype, triton)


def _head_dim_problem(mode: str, head_dim: int) -> str:
    if mode in packages.DEMANDS:
        words, fits = packages.DEMANDS[mode].head_dims
    elif mode in ("fp8", "radial"):
        words, fits = "64 or 128", _is_64_or_128
    else:
        return ""
    return "" if fits(head_dim) else f"head dimension {words} needed, got {head_dim}"


def _is_64_or_128(head_dim: int) -> bool:
    return head_dim in (64, 128)


def _check_tensors(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_lens: torch.Tensor | None
) -> None:
    """The kernels broadcast where they can; a wrong shape must not pass for a right one."""
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ValueError(
            f"attention takes (B, L, H, D): got {q.dim()}, {k.dim()} and {v.dim()} dimensions"
        )
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} must share "
            "B, H and D, and k and v their tokens"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"attention: q, k and v must share a dtype, got {q.dtype}, {k.dtype} and {v.dtype}"
        )
    if not q.device == k.device == v.device:
        raise ValueError(
            f"attention: q, k and v must share a device, got {q.device}, {k.device} and {v.device}"
        )
    if k_lens is None:
        return
    if k_lens.shape != q.shape[:1]:
        raise ValueError(
            f"k_lens has shape {tuple(k_lens.shape)}: use one length for each of {q.shape[0]}"
        )
    if k_lens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"k_lens has dtype {k_lens.dtype}: use int32 or int64")
    # A subclass may hold no values, as fake tensors do.
    readable = type(k_lens) is torch.Tensor and not torch.compiler.is_compiling()
    if readable and k_lens.device.type == "cpu":
        shortest, longest = (int(n) for n in k_lens.aminmax())
        if shortest < 1 or longest > k.shape[1]:
            raise ValueError(
                f"k_lens reaches from {shortest} to {longest}: use lengths from 1 to the "
                f"{k.shape[1]} keys"
            )
