"""Every attention mode by name, and what rules one out on a machine."""

from __future__ import annotations

import importlib.util

import torch

from wan_models.attention import fp8, fp16, packages, sdpa
from wan_models.attention import radial as block_sparse

#: Modes that stand for another one, and which ones, in the order in which they are taken where
#: nothing was measured. Our own 16-bit kernel, whose scores are fp16 sums, is taken by name alone.
AUTO = {
    "auto": ("flash_attn_3", "flash_attn_4", "sdpa", "flash_attn_2"),
    "auto_fp8": ("fp8", "flash_attn_3_fp8", "sageattn"),
}
#: Every mode of :func:`wan_models.attention.attention`.
MODES = (*sdpa.MODES, *packages.DEMANDS, "radial", "fp8", "fp16", *AUTO)


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
        mode: see :func:`wan_models.attention.attention`.
        device: where q, k and v are.
        masked: whether ``k_lens`` is given; every mode takes it.
        dtype: of q, k and v, if known.
        head_dim: D, if known.
    """
    del masked  # part of what a caller knows; no mode refuses it
    if mode not in MODES:
        raise ValueError(f"attention mode {mode!r}: use one of {', '.join(map(repr, MODES))}")
    found = problem(mode, device, dtype, head_dim)
    if found:
        raise ValueError(f"attention mode {mode!r}: {found}")


def problem(
    mode: str, device: torch.device, dtype: torch.dtype | None, head_dim: int | None
) -> str:
    """What rules ``mode`` out, or ``""``; of a mode that stands for others, why each is."""
    if mode in AUTO:
        reasons = [problem(name, device, dtype, head_dim) for name in AUTO[mode]]
        if not all(reasons):
            return ""
        pairs = zip(AUTO[mode], reasons, strict=True)
        return "none of its modes can run: " + "; ".join(f"{n!r}: {why}" for n, why in pairs)
    found = [
        machine_problem(mode, device.type, device.index, dtype),
        "" if head_dim is None else head_dim_problem(mode, head_dim),
    ]
    return "; ".join(reason for reason in found if reason)


@torch.compiler.assume_constant_result
def machine_problem(
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
    if mode == "fp16":
        return fp16.obstacle(sm, kind, dtype, triton and packages.present(fp16.NEEDS))
    return block_sparse.obstacle(sm, kind, dtype, triton)


def head_dim_problem(mode: str, head_dim: int) -> str:
    """What about a head dimension rules ``mode`` out, or ``""``."""
    if mode in packages.DEMANDS:
        words, fits = packages.DEMANDS[mode].head_dims
    elif mode in ("fp8", "fp16", "radial"):
        words, fits = "64 or 128", _is_64_or_128
    else:
        return ""
    return "" if fits(head_dim) else f"head dimension {words} needed, got {head_dim}"


def _is_64_or_128(head_dim: int) -> bool:
    return head_dim in (64, 128)
