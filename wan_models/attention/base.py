"""What the attention classes share: projections, heads, latent frames, the guided text branch."""

from __future__ import annotations

import torch
from torch import nn

from wan_models.attention.kernels import attention
from wan_models.attention.nag import DEFAULTS, NagParams, guide
from wan_models.layers import WanRMSNorm


class QKVAttention(nn.Module):
    """q, k, v and o projections, and RMS norms of q and k over the whole width C.

    Args:
        dim: model dimension C.
        num_heads: heads H.
        eps: of the norms.
        mode: attention kernel, see :func:`wan_models.attention.kernels.attention`.
        source_dim: width of what k and v are projected from, if it is not C.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        eps: float = 1e-6,
        mode: str = "sdpa",
        *,
        source_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.mode = mode
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(source_dim or dim, dim)
        self.v = nn.Linear(source_dim or dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = WanRMSNorm(dim, eps)
        self.norm_k = WanRMSNorm(dim, eps)

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        """(..., C) to (..., H, D)."""
        return x.unflatten(-1, (self.num_heads, -1))

    def query(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, H, D) of x (B, L, C)."""
        return self.heads(self.norm_q(self.q(x)))

    def key_value(self, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Twice (B, S, H, D), of source (B, S, C)."""
        return self.heads(self.norm_k(self.k(source))), self.heads(self.v(source))

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        k_lens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The kernel of :attr:`mode`; (B, L, H, D)."""
        return attention(q, k, v, mode=self.mode, k_lens=k_lens)

    def attend_per_frame(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, frames: int
    ) -> torch.Tensor:
        """Every latent frame's tokens attend to that frame's own keys.

        Args:
            q: (B, T*S, H, D); a slice along the tokens will do, whatever B is.
            k, v: (B*T, A, H, D).
            frames: T.

        Returns:
            (B, T*S, H, D).
        """
        return from_frames(self.attend(to_frames(q, frames), k, v), q.shape[0])

    def normalized_attention_guidance(
        self,
        q: torch.Tensor,
        context: torch.Tensor,
        nag_context: torch.Tensor,
        params: NagParams = DEFAULTS,
    ) -> torch.Tensor:
        """Attention to a text, pushed away from attention to another one.

        Args:
            q: (B, L, H, D), normed.
            context: (B, Lt, C), the text that is wanted.
            nag_context: (B, Ln, C), the text that is not.
            params: see :func:`wan_models.attention.nag.guide`.

        Returns:
            (B, L, C), before the output projection.
        """
        wanted = self.attend(q, *self.key_value(context)).flatten(2)
        unwanted = self.attend(q, *self.key_value(nag_context)).flatten(2)
        return guide(wanted, unwanted, params)


def to_frames(x: torch.Tensor, frames: int) -> torch.Tensor:
    """(B, T*S, ...) to (B*T, S, ...): a view where the layout allows one, else a copy."""
    return x.unflatten(1, (frames, -1)).flatten(0, 1)


def from_frames(x: torch.Tensor, batch: int) -> torch.Tensor:
    """(B*T, S, ...) to (B, T*S, ...)."""
    return x.unflatten(0, (batch, -1)).flatten(1, 2)


def add_scaled(
    x: torch.Tensor, branch: torch.Tensor, scale: torch.Tensor | float
) -> torch.Tensor:
    """x + scale * branch, summed in fp32 and cast back to the dtype of ``x``; out of place."""
    return (x.float() + branch.float() * scale).to(x.dtype)


def grid_text(grid: tuple[int, int, int]) -> str:
    """A grid for a message: ``21 latent frames of 30x52 = 32760 tokens``."""
    frames, rows, columns = grid
    return f"{frames} latent frames of {rows}x{columns} = {frames * rows * columns} tokens"


def check_grid(tokens: int, grid: tuple[int, int, int], where: str) -> None:
    """Raise a ValueError of one line unless ``tokens`` is what ``grid`` (T, h, w) holds."""
    if tokens != grid[0] * grid[1] * grid[2]:
        raise ValueError(f"{where}: got {tokens} tokens, but the grid is {grid_text(grid)}")
