"""Attention of a Wan block to speech (HuMo)."""

from __future__ import annotations

import torch

from wan_models.attention.base import QKVAttention, check_grid, to_frames


class WanHuMoCrossAttention(QKVAttention):
    """The tokens of each latent frame attend to that frame's audio tokens.

    Args:
        dim: model dimension C.
        num_heads: heads H.
        eps: of the norms.
        mode: attention kernel, see :func:`wan_models.attention.kernels.attention`.
        audio_dim: width of the audio tokens.
        audio_tokens: A, audio tokens of a latent frame.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        eps: float = 1e-6,
        mode: str = "sdpa",
        *,
        audio_dim: int = 1536,
        audio_tokens: int = 16,
    ) -> None:
        super().__init__(dim, num_heads, eps, mode, source_dim=audio_dim)
        self.audio_tokens = audio_tokens

    def forward(
        self, x: torch.Tensor, audio: torch.Tensor, grid: tuple[int, int, int]
    ) -> torch.Tensor:
        """One attention to the audio.

        Args:
            x: (B, L, C).
            audio: (B, T*A, audio_dim).
            grid: video tokens along (time, rows, columns); their product is L.

        Returns:
            (B, L, C), to be added to ``x`` by its strength.

        Raises:
            ValueError: L is not what the grid holds, or the audio is for other frames.
        """
        check_grid(x.shape[1], grid, type(self).__name__)
        frames = grid[0]
        if audio.shape[1] != frames * self.audio_tokens:
            raise ValueError(
                f"audio has {audio.shape[1]} tokens, but {frames} latent frames need "
                f"{frames * self.audio_tokens}, {self.audio_tokens} for each"
            )
        k, v = self.key_value(audio)
        out = self.attend_per_frame(
            self.query(x), to_frames(k, frames), to_frames(v, frames), frames
        )
        return self.o(out.flatten(2))
