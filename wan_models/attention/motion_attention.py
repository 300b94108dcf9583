"""Attention of a Wan block to body motion (MTV-Crafter)."""

from __future__ import annotations

import torch

from wan_models.attention.base import QKVAttention
from wan_models.rope import apply_rope, turn_pairs


class MTVCrafterMotionAttention(QKVAttention):
    """Video tokens attend to motion tokens, one for each joint in each latent frame.

    The keys' memory (M, C) is read as (H, M, D) and not as (M, H, D): the published weights are
    trained so. Head h takes the channels of tokens around M * h / H, not a slice of every token.
    The kernel therefore gets keys of strides (M*C, D, M*D, 1). The original runs ``"sdpa"``
    alone; here :attr:`mode` is free.

    Args:
        dim: model dimension C, of the motion tokens too (padded with zeros).
        num_heads: heads H.
        eps: of the norms.
        mode: attention kernel, see :func:`wan_models.attention.kernels.attention`.
    """

    def forward(
        self,
        x: torch.Tensor,
        rope: torch.Tensor,
        motion: torch.Tensor,
        motion_rope: torch.Tensor,
    ) -> torch.Tensor:
        """One attention to the motion.

        Args:
            x: (B, L, C).
            rope: table of the video tokens.
            motion: (B, M, C).
            motion_rope: from :func:`wan_models.rope.motion_rope_table`, for M tokens.

        Returns:
            (B, L, C), to be added to ``x`` by its strength.

        Raises:
            ValueError: the table is for another number of motion tokens.
        """
        q = apply_rope(self.query(x), rope)
        tokens = motion.shape[1]
        head_dim = q.shape[-1]
        if motion_rope.shape[1] != tokens or 2 * motion_rope.shape[-1] != head_dim:
            raise ValueError(
                f"motion rotary table is for {motion_rope.shape[1]} tokens of head dimension "
                f"{2 * motion_rope.shape[-1]}, got {tokens} motion tokens of {head_dim}"
            )
        k = self.norm_k(self.k(motion)).flatten(1).unflatten(1, (self.num_heads, tokens, head_dim))
        cos, sin = motion_rope.squeeze(-2).unbind(0)
        k = turn_pairs(k, cos, sin).transpose(1, 2)
        return self.o(self.attend(q, k, self.heads(self.v(motion))).flatten(2))
