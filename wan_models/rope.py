"""3-D rotary position embedding of video tokens.

The head dimension D is split over (time, rows, columns) as (D - 2w, w, w) with w = 2 * (D // 6).
Along an axis of width d the pair i turns by position * 10000^(-2i/d); pairs are the interleaved
channels (2i, 2i + 1). No complex numbers, so the whole of it compiles.
"""

from __future__ import annotations

import torch


def axis_widths(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head that carry time, row and column: 128 gives (44, 42, 42)."""
    width = 2 * (head_dim // 6)
    return head_dim - 2 * width, width, width


def rope_table(
    grid: tuple[int, int, int],
    head_dim: int,
    *,
    theta: float = 10000.0,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Cosines and sines of every token's angles.

    Args:
        grid: tokens along (time, rows, columns); token order is time-major, then rows.
        head_dim: D.
        theta: base of the frequencies.
        device: where the table is put.

    Returns:
        (2, L, 1, D/2) fp32, cosines first; angles are computed in fp64.
    """
    parts = []
    for axis, (size, width) in enumerate(zip(grid, axis_widths(head_dim), strict=True)):
        exponents = torch.arange(0, width, 2, dtype=torch.float64, device=device) / width
        positions = torch.arange(size, dtype=torch.float64, device=device)
        angles = torch.outer(positions, theta**-exponents)
        shape = [1, 1, 1, width // 2]
        shape[axis] = size
        parts.append(angles.view(shape).expand(*grid, width // 2))
    angles = torch.cat(parts, dim=-1).reshape(-1, 1, head_dim // 2)
    return torch.stack([angles.cos(), angles.sin()]).float()


def apply_rope(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Turn the pairs of ``x`` by the table's angles; tokens beyond the table stay unturned.

    Args:
        x: (B, L, H, D).
        table: from :func:`rope_table`, for at most L tokens.

    Returns:
        (B, L, H, D), dense, in the dtype of ``x``; computed in fp32.

    Raises:
        ValueError: the table is for more tokens than ``x`` has, or for another head dimension.
    """
    tokens = table.shape[1]
    if tokens > x.shape[1] or 2 * table.shape[-1] != x.shape[-1]:
        raise ValueError(
            f"rotary table is for {tokens} tokens of head dimension {2 * table.shape[-1]}, "
            f"got {x.shape[1]} tokens of {x.shape[-1]}"
        )
    cos, sin = table[0], table[1]
    even, odd = x[:, :tokens].float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    turned = turned.flatten(-2).to(x.dtype)
    return turned if tokens == x.shape[1] else torch.cat([turned, x[:, tokens:]], dim=1)
