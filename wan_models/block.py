"""One transformer block of a Wan model."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from wan_models.attention import WanCrossAttention, WanSelfAttention
from wan_models.config import WanConfig
from wan_models.layers import WanLayerNorm, feed_forward, modulate
from wan_models.rope import rope_table


class WanBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, modulated by the time embedding.

    x <- x + gate_sa * SelfAttn(LN(x) * (1 + scale_sa) + shift_sa)
    x <- x + CrossAttn(LN_affine(x), context)
    x <- x + gate_ff * FFN(LN(x) * (1 + scale_ff) + shift_ff)

    Modulation and the gated residual sums are fp32 and cast back, as in the official model.
    Parameter names are the official ones.

    Args:
        config: sizes.
        mode: attention kernel, see :func:`wan_models.attention.kernels.attention`.
    """

    def __init__(self, config: WanConfig, mode: str = "sdpa") -> None:
        super().__init__()
        dim, eps = config.dim, config.eps
        self.norm1 = WanLayerNorm(dim, eps)
        self.self_attn = WanSelfAttention(dim, config.num_heads, eps, mode)
        self.norm3 = WanLayerNorm(dim, eps, affine=True)
        self.cross_attn = WanCrossAttention(dim, config.num_heads, eps, mode)
        self.norm2 = WanLayerNorm(dim, eps)
        self.ffn = feed_forward(dim, config.ffn_dim)
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self,
        x: torch.Tensor,
        e0: torch.Tensor,
        context: torch.Tensor,
        rope: torch.Tensor,
        seq_lens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One block.

        Args:
            x: (B, L, C).
            e0: time embedding (B, 6, C), or per token (B, L, 6, C).
            context: text states (B, Lt, C).
            rope: from :func:`wan_models.rope.rope_table`.
            seq_lens: (B,) valid tokens of each sample.

        Returns:
            (B, L, C) in the dtype of ``x``.

        Raises:
            ValueError: ``e0`` has another shape.
        """
        tokens, dim = x.shape[1:]
        if e0.shape[1:] not in ((6, dim), (tokens, 6, dim)):
            raise ValueError(
                f"e0 has shape {tuple(e0.shape)}: use (B, 6, {dim}), or (B, {tokens}, 6, {dim}) "
                "for one time step per token"
            )
        e = self.modulation.float() + e0.float()
        if e0.dim() == 3:
            e = e.unsqueeze(1)
        shift_sa, scale_sa, gate_sa, shift_ff, scale_ff, gate_ff = e.unbind(2)
        dtype = x.dtype
        attended = self.self_attn(
            modulate(self.norm1(x), shift_sa, scale_sa).to(dtype), rope, seq_lens
        )
        x = (x.float() + attended.float() * gate_sa).to(dtype)
        x = x + self.cross_attn(self.norm3(x), context)
        fed = self.ffn(modulate(self.norm2(x), shift_ff, scale_ff).to(dtype))
        return (x.float() + fed.float() * gate_ff).to(dtype)


class BlockInputs(NamedTuple):
    """Positional inputs of :class:`WanBlock`."""

    x: torch.Tensor
    e0: torch.Tensor
    context: torch.Tensor
    rope: torch.Tensor


def block_inputs(
    config: WanConfig,
    grid: tuple[int, int, int],
    *,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    column_major: bool = False,
) -> BlockInputs:
    """Random inputs for a block.

    Args:
        config: sizes.
        grid: tokens along (time, rows, columns); L is their product.
        batch: B.
        dtype: of x and context; e0 and the rotary table are fp32.
        device: where to make them; ``"meta"`` gives shapes and strides alone.
        seed: of the random numbers.
        column_major: give x the strides (C*L, 1, L) that patchifying by ``flatten(2)`` and
            ``transpose(1, 2)`` leaves behind, instead of dense rows.
    """
    # The meta device has no generator, and no numbers either.
    meta = torch.device(device).type == "meta"
    generator = None if meta else torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        made = torch.randn(*shape, generator=generator, device=device, dtype=torch.float32)
        return made.to(of)

    tokens = grid[0] * grid[1] * grid[2]
    if column_major:
        x = normal(batch, config.dim, *grid).flatten(2).transpose(1, 2)
    else:
        x = normal(batch, tokens, config.dim)
    return BlockInputs(
        x,
        normal(batch, 6, config.dim, of=torch.float32) / config.dim**0.5,
        normal(batch, config.text_len, config.dim),
        rope_table(grid, config.head_dim, device=device),
    )
