"""The dispatcher: one call for every attention kernel, on (B, L, H, D) tensors."""

from __future__ import annotations

import contextlib

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

_BACKENDS = {
    "sdpa": None,
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_math": SDPBackend.MATH,
}
_CUDA_ONLY = ("sdpa_cudnn", "sdpa_efficient")
#: Backends that have no kernel for wider types on CUDA.
_CUDA_HALF_ONLY = ("sdpa_cudnn", "sdpa_flash")


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mode: str = "sdpa",
    k_lens: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v.

    Args:
        q: (B, L, H, D); k, v: (B, S, H, D). Any strides; nothing is copied here.
        mode: ``"sdpa"`` (torch chooses the backend), or one backend by name: ``"sdpa_flash"``,
            ``"sdpa_cudnn"``, ``"sdpa_efficient"``, ``"sdpa_math"``. Never another one instead.
        k_lens: (B,) valid keys of each sample; the keys beyond are masked.

    Returns:
        (B, L, H, D).

    Raises:
        ValueError: an unknown mode, one that this device or these arguments rule out, or shapes
            that do not fit one another.
    """
    check_mode(mode, q.device, masked=k_lens is not None, dtype=q.dtype)
    _check_shapes(q, k, v, k_lens)
    mask = None
    if k_lens is not None:
        keys = torch.arange(k.shape[1], device=k.device)
        mask = (keys < k_lens.to(k.device)[:, None])[:, None, None, :]
    backend = _BACKENDS[mode]
    with sdpa_kernel(backend) if backend is not None else contextlib.nullcontext():
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask
        )
    return out.transpose(1, 2)


def check_mode(
    mode: str, device: torch.device, *, masked: bool = False, dtype: torch.dtype | None = None
) -> None:
    """Raise a ValueError of one line if ``mode`` cannot run on ``device``.

    Args:
        mode: see :func:`attention`.
        device: where q, k and v are.
        masked: whether ``k_lens`` is given.
        dtype: of q, k and v, if known.
    """
    if mode not in _BACKENDS:
        raise ValueError(f"attention mode {mode!r}: use one of {', '.join(map(repr, _BACKENDS))}")
    if mode in _CUDA_ONLY and device.type not in ("cuda", "meta"):
        raise ValueError(f"attention mode {mode!r} needs a CUDA device, got {device.type}")
    if mode == "sdpa_flash" and masked and device.type == "cuda":
        raise ValueError("attention mode 'sdpa_flash' takes no mask on CUDA: use 'sdpa_cudnn'")
    if (
        mode in _CUDA_HALF_ONLY
        and device.type == "cuda"
        and dtype not in (None, torch.bfloat16, torch.float16)
    ):
        raise ValueError(f"attention mode {mode!r} needs bfloat16 or float16 on CUDA, got {dtype}")


def _check_shapes(
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
    if k_lens is not None and k_lens.shape != q.shape[:1]:
        raise ValueError(
            f"k_lens has shape {tuple(k_lens.shape)}: use one length for each of {q.shape[0]}"
        )
