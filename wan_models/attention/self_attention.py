"""Self-attention of a Wan block."""

from __future__ import annotations

import torch
from torch import nn

from wan_models.attention.kernels import attention
from wan_models.layers import WanRMSNorm
from wan_models.rope import apply_rope


class WanSelfAttention(nn.Module):
    """q, k, v and o projections, RMS norm of q and k over the whole width, 3-D rotary.

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

    def forward(
        self, x: torch.Tensor, rope: torch.Tensor, seq_lens: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x: (B, L, C); rope: from :func:`wan_models.rope.rope_table`; seq_lens: (B,) valid
        tokens of each sample. Returns (B, L, C)."""
        heads = (self.num_heads, -1)
        q = apply_rope(self.norm_q(self.q(x)).unflatten(-1, heads), rope)
        k = apply_rope(self.norm_k(self.k(x)).unflatten(-1, heads), rope)
        v = self.v(x).unflatten(-1, heads)
        return self.o(attention(q, k, v, mode=self.mode, k_lens=seq_lens).flatten(2))
