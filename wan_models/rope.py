"""Rotary position embeddings: of video tokens, of positions along one axis, of body joints.

Pairs are the interleaved channels (2i, 2i + 1); along an axis of width d the pair i turns by
position * 10000^(-2i/d). No complex numbers, so the whole of it compiles.
"""

from __future__ import annotations

import torch


def axis_widths(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head that carry time, row and column: 128 gives (44, 42, 42).

    (D - 2w, w, w) with w = 2 * (D // 6).
    """
    width = 2 * (head_dim // 6)
    return head_dim - 2 * width, width, width


def motion_widths(head_dim: int) -> tuple[int, int, int, int]:
    """Channels of a head that carry a joint's frame, x, y and z: 128 gives (44, 28, 28, 28)."""
    width = 2 * ((head_dim - axis_widths(head_dim)[0]) // 6)
    return head_dim - 3 * width, width, width, width


def rope_table(
    grid: tuple[int, int, int],
    head_dim: int,
    *,
    theta: float = 10000.0,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Cosines and sines of every video token's angles.

    Args:
        grid: tokens along (time, rows, columns); token order is time-major, then rows.
        head_dim: D, split over the axes by :func:`axis_widths`.
        theta: base of the frequencies.
        device: where the table is put.

    Returns:
        (2, L, 1, D/2) fp32, cosines first; angles are computed in fp64.
    """
    parts = []
    for axis, (size, width) in enumerate(zip(grid, axis_widths(head_dim), strict=True)):
        positions = torch.arange(size, dtype=torch.float64, device=device)
        shape = [1, 1, 1, width // 2]
        shape[axis] = size
        parts.append(_angles(positions, width, theta).view(shape).expand(*grid, width // 2))
    return _table(torch.cat(parts, dim=-1).reshape(-1, head_dim // 2))


def rope_table_1d(
    positions: torch.Tensor, head_dim: int, *, theta: float = 10000.0
) -> torch.Tensor:
    """Cosines and sines of positions along one axis, which all pairs of a head carry.

    Args:
        positions: (L,), or (B, L) for positions of each sample; they need not be whole.
        head_dim: D.
        theta: base of the frequencies.

    Returns:
        (2, L, 1, D/2) or (2, B, L, 1, D/2) fp32, cosines first; angles are computed in fp32.
    """
    return _table(_angles(positions.float(), head_dim, theta))


def motion_rope_table(
    frames: int, joints: torch.Tensor, head_dim: int, *, theta: float = 10000.0
) -> torch.Tensor:
    """Cosines and sines of the motion tokens of MTV-Crafter.

    A token is one joint in one latent frame, frame-major. Its angles come from the frame's index
    and from the joint's mean coordinates, centred over the joints.

    Args:
        frames: latent frames of the motion.
        joints: (J, 3) mean x, y, z of each joint.
        head_dim: D, split over the axes by :func:`motion_widths`.
        theta: base of the frequencies.

    Returns:
        (2, frames * J, 1, D/2) fp32, cosines first; angles are computed in fp64.

    Raises:
        ValueError: ``joints`` has another shape, or ``frames`` is below 1.
    """
    if joints.dim() != 2 or joints.shape[1] != 3:
        raise ValueError(f"joints has shape {tuple(joints.shape)}: use (J, 3) mean coordinates")
    if frames < 1:
        raise ValueError(f"frames={frames}: use at least 1")
    time, *space = motion_widths(head_dim)
    centred = joints.double() - joints.double().mean(0)
    count = joints.shape[0]
    when = torch.arange(frames, dtype=torch.float64, device=joints.device)
    parts = [_angles(when, time, theta)[:, None].expand(-1, count, -1)]
    for axis, width in enumerate(space):
        parts.append(_angles(centred[:, axis], width, theta).expand(frames, -1, -1))
    return _table(torch.cat(parts, dim=-1).flatten(0, 1))


def apply_rope(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Turn the pairs of ``x`` by the table's angles; tokens beyond the table stay unturned.

    Args:
        x: (B, L, H, D).
        table: of this module, for at most L tokens; shared by the samples, or one for each.

    Returns:
        (B, L, H, D), dense, in the dtype of ``x``; computed in fp32.

    Raises:
        ValueError: the table is for more tokens than ``x`` has, or for another head dimension.
    """
    tokens = table.shape[-3]
    if tokens > x.shape[1] or 2 * table.shape[-1] != x.shape[-1]:
        raise ValueError(
            f"rotary table is for {tokens} tokens of head dimension {2 * table.shape[-1]}, "
            f"got {x.shape[1]} tokens of {x.shape[-1]}"
        )
    turned = turn_pairs(x[:, :tokens], table[0], table[1])
    return turned if tokens == x.shape[1] else torch.cat([turned, x[:, tokens:]], dim=1)


def turn_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Each pair (a, b) becomes (a cos - b sin, a sin + b cos).

    Args:
        x: (..., D).
        cos, sin: fp32, broadcast to (..., D/2).

    Returns:
        (..., D), dense in the order of its dimensions, in the dtype of ``x``.
    """
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return turned.flatten(-2).to(x.dtype)


def _angles(positions: torch.Tensor, width: int, theta: float) -> torch.Tensor:
    """(..., width/2) of (...), in the dtype of the positions."""
    exponents = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / width
    return positions[..., None] * (theta**-exponents).to(positions.dtype)


def _table(angles: torch.Tensor) -> torch.Tensor:
    """(2, ..., L, 1, D/2) fp32 of (..., L, D/2)."""
    return torch.stack([angles.cos(), angles.sin()]).unsqueeze(-2).float()
