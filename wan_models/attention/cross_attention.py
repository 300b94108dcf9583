"""Cross-attention of a Wan block to the text."""

from __future__ import annotations

import torch
from torch import nn

from wan_models.attention.kernels import attention
from wan_models.layers import WanRMSNorm


class WanCrossAttention(nn.Module):
    """Video tokens attend to text tokens; no rotary, and padding is attended as in training.

    Args:
        dim: model dimension C.
        num_heads: heads H.
        eps: of the norms.
        mode: attention kernel, see :func:`wan_models.attention.kernels.attention`.
    """

    def __init__(self, dim: int, num_heads: int, eps: float = 1e-6, mode: str = "sdpa") -> None:
        super().__init__()
        self.num_heads = num_heads
        self.mode = mode
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = WanRMSNorm(dim, eps)
        self.norm_k = WanRMSNorm(dim, eps)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """x: (B, L, C); context: (B, Lt, C). Returns (B, L, C)."""
        heads = (self.num_heads, -1)
        q = self.norm_q(self.q(x)).unflatten(-1, heads)
        k = self.norm_k(self.k(context)).unflatten(-1, heads)
        v = self.v(context).unflatten(-1, heads)
        return self.o(attention(q, k, v, mode=self.mode).flatten(2))
