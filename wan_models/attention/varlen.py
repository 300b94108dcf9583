"""Padding for kernels that take sequences by their bounds and no mask.

Nothing is gathered and the host reads nothing: each sample becomes two sequences, its valid keys
with all its queries, and its padding with no queries at all. Kernels skip a sequence without
queries, so this is exact, and k and v stay where they are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Packed(NamedTuple):
    """Arguments of a variable-length kernel, in its order.

    Attributes:
        q: (B*L, H, D).
        k, v: (B*S, H, D).
        q_bounds, k_bounds: (2B+1,) int32, where each of the 2B sequences starts, and the end.
        q_longest, k_longest: L and S.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    q_bounds: torch.Tensor
    k_bounds: torch.Tensor
    q_longest: int
    k_longest: int


def pack(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_lens: torch.Tensor) -> Packed:
    """The arguments for q (B, L, H, D), k, v (B, S, H, D) and the valid keys k_lens (B,)."""
    batch, queries, keys = q.shape[0], q.shape[1], k.shape[1]
    sample = torch.arange(batch, device=k.device, dtype=torch.int32)
    lengths = k_lens.to(k.device).clamp(0, keys).to(torch.int32)
    q_bounds = torch.stack([sample * queries, (sample + 1) * queries], dim=1)
    k_bounds = torch.stack([sample * keys, sample * keys + lengths], dim=1)
    return Packed(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        _closed(q_bounds, batch * queries),
        _closed(k_bounds, batch * keys),
        queries,
        keys,
    )


def _closed(starts: torch.Tensor, end: int) -> torch.Tensor:
    """(B, 2) starts as one list, with the end of the last."""
    last = torch.full((1,), end, dtype=torch.int32, device=starts.device)
    return torch.cat([starts.flatten(), last])
