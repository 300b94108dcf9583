"""From tokens back to latents: the last modulated linear, and unpatchify."""

from __future__ import annotations

import torch
from torch import nn

from wan_models.layers import WanLayerNorm, modulate


class Head(nn.Module):
    """y = Linear(LN(x) * (1 + scale) + shift), with shift and scale = modulation + e.

    Args:
        dim: model dimension C.
        out_features: values of one token: channels times latent positions of a patch.
        eps: of the norm.
    """

    def __init__(self, dim: int, out_features: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm = WanLayerNorm(dim, eps)
        self.head = nn.Linear(dim, out_features)
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    def forward(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        """x: (B, L, C); e: time embedding (B, C), or per token (B, L, C), fp32.

        Returns (B, L, out_features) in the dtype of ``x``; the modulation is fp32.
        """
        if e.dim() == 2:
            e = e.unsqueeze(1)
        shift, scale = (self.modulation.float() + e.float().unsqueeze(-2)).unbind(-2)
        return self.head(modulate(self.norm(x), shift, scale).to(x.dtype))


def unpatchify(
    x: torch.Tensor, grid: tuple[int, int, int], patch_size: tuple[int, int, int]
) -> torch.Tensor:
    """Tokens of (frame, row, column, channel) values, channel fastest, to latents.

    Args:
        x: (B, L, values); tokens beyond the grid are padding and are dropped.
        grid: tokens along (time, rows, columns).
        patch_size: latent positions that one token covers along each.

    Returns:
        (B, channels, T, rows, columns).
    """
    tokens = grid[0] * grid[1] * grid[2]
    patches = x[:, :tokens].unflatten(-1, (*patch_size, -1)).unflatten(1, grid)
    sizes = [size * patch for size, patch in zip(grid, patch_size, strict=True)]
    return patches.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(x.shape[0], -1, *sizes)
