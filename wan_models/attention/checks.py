"""What the attention of any mode demands of its arguments."""

from __future__ import annotations

import torch


def check_tensors(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_lens: torch.Tensor | None
) -> None:
    """Raise a ValueError of one line unless q, k, v and k_lens fit one another.

    The kernels broadcast where they can; a wrong shape must not pass for a right one.
    """
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
    check_lengths(k_lens, q.shape[0], k.shape[1])


def check_lengths(k_lens: torch.Tensor | None, batch: int, keys: int) -> None:
    """Raise a ValueError of one line unless k_lens is (batch,) and, if the host has it, in 1..keys.
    """
    if k_lens is None:
        return
    if k_lens.shape != (batch,):
        raise ValueError(
            f"k_lens has shape {tuple(k_lens.shape)}: use one length for each of {batch}"
        )
    if k_lens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"k_lens has dtype {k_lens.dtype}: use int32 or int64")
    # A subclass may hold no values, as fake tensors do.
    readable = type(k_lens) is torch.Tensor and not torch.compiler.is_compiling()
    if readable and k_lens.device.type == "cpu":
        shortest, longest = (int(n) for n in k_lens.aminmax())
        if shortest < 1 or longest > keys:
            raise ValueError(
                f"k_lens reaches from {shortest} to {longest}: use lengths from 1 to the "
                f"{keys} keys"
            )
