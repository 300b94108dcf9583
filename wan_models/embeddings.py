"""What a Wan model makes of its inputs: tokens of latents, text, image and time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from wan_models.layers import WanLayerNorm, WideLinear, time_frequencies

#: Epsilon of the two norms of the image embedding; every other norm has the model's.
_IMAGE_EPS = 1e-5


class PatchEmbedding(nn.Conv3d):
    """One token for each patch of the latents.

    Args:
        channels: latent channels.
        dim: model dimension C.
        patch_size: latent (frames, rows, columns) of one patch; patches do not overlap.
    """

    def __init__(self, channels: int, dim: int, patch_size: tuple[int, int, int]) -> None:
        super().__init__(channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """latents: (B, channels, T, rows, columns), cast to the type of the weight.

        Returns (B, L, C), time-major, then rows. The layout is the convolution's, seen through
        the transpose: from a dense result column-major, strides (C * L, 1, L).
        """
        tokens = super().forward(latents.to(self.weight.dtype)).flatten(2).transpose(1, 2)
        # Same memory, but to autograd no view: Dynamo guards a view's base as well, and would
        # compile the first block apart from the others.
        return torch.ops.aten._unsafe_view(tokens, tokens.shape)


class ImageEmbedding(nn.Module):
    """Image encoder states to model width: norm, Linear, exact GELU, Linear, norm.

    Args:
        image_dim: width of the states.
        dim: model dimension C.
        positions: tokens that get a learned position ``emb_pos``, or 0 for none.
    """

    def __init__(self, image_dim: int, dim: int, positions: int = 0) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            WanLayerNorm(image_dim, _IMAGE_EPS, affine=True),
            nn.Linear(image_dim, image_dim),
            nn.GELU(),
            nn.Linear(image_dim, dim),
            WanLayerNorm(dim, _IMAGE_EPS, affine=True),
        )
        self.emb_pos = None
        if positions:
            self.emb_pos = nn.Parameter(torch.zeros(1, positions, image_dim))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """image: (B, Li, image_dim). Returns (B, Li, C)."""
        if self.emb_pos is not None:
            image = image + self.emb_pos.to(image.dtype)
        return self.proj(image)


def text_embedding(text_dim: int, dim: int) -> nn.Sequential:
    """Text encoder states to model width; parameters are named ``0`` and ``2``."""
    return nn.Sequential(nn.Linear(text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim))


def time_embedding(freq_dim: int, dim: int) -> nn.Sequential:
    """Sinusoids to the embedding e, in fp32; parameters are named ``0`` and ``2``."""
    return nn.Sequential(WideLinear(freq_dim, dim), nn.SiLU(), WideLinear(dim, dim))


def time_projection(dim: int) -> nn.Sequential:
    """e to the six modulation vectors of a block, in fp32; parameters are named ``1``."""
    return nn.Sequential(nn.SiLU(), WideLinear(dim, 6 * dim))


def embed_time(
    timesteps: torch.Tensor, embedding: nn.Module, projection: nn.Module, freq_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The embedding e and what the blocks read of it, e0.

    Args:
        timesteps: (B,), or (B, L) for one of each token; 0 to 1000.
        embedding, projection: from :func:`time_embedding` and :func:`time_projection`.
        freq_dim: width of the sinusoids.

    Returns:
        e (B, C) and e0 (B, 6, C), or (B, L, C) and (B, L, 6, C); fp32.
    """
    e = embedding(time_frequencies(timesteps, freq_dim))
    return e, projection(e).unflatten(-1, (6, -1))


def pad_text(
    context: torch.Tensor | Sequence[torch.Tensor], text_len: int, text_dim: int
) -> torch.Tensor:
    """Prompts with zero rows behind them, so that each has ``text_len`` tokens.

    Args:
        context: (B, Lt, text_dim), or one (Lt, text_dim) for each sample.
        text_len: tokens that the model was trained with; the rows of padding are attended.
        text_dim: width of the text encoder's states.

    Raises:
        ValueError: another width or number of dimensions, a prompt that is too long, or none.
    """
    prompts = [context] if isinstance(context, torch.Tensor) else list(context)
    dims = 3 if isinstance(context, torch.Tensor) else 2
    if not prompts:
        raise ValueError("context is empty: give one prompt for each sample")
    for prompt in prompts:
        if prompt.dim() != dims or prompt.shape[-1] != text_dim:
            raise ValueError(
                f"context has a prompt of shape {tuple(prompt.shape)}: use (B, Lt, {text_dim}), "
                f"or a list of (Lt, {text_dim})"
            )
        if prompt.shape[-2] > text_len:
            raise ValueError(f"context has {prompt.shape[-2]} tokens: use at most {text_len}")
    padded = [F.pad(prompt, (0, 0, 0, text_len - prompt.shape[-2])) for prompt in prompts]
    return padded[0] if isinstance(context, torch.Tensor) else torch.stack(padded)
