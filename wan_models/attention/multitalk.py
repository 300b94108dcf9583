"""Attention of a Wan block to one or several speakers (MultiTalk, InfiniteTalk)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from wan_models.attention.base import from_frames, grid_text, to_frames
from wan_models.attention.kernels import attention
from wan_models.attention.speakers import key_positions, query_positions
from wan_models.rope import apply_rope, rope_table_1d


class SingleStreamAttention(nn.Module):
    """The tokens of each latent frame attend to that frame's audio tokens.

    Args:
        dim: model dimension C.
        num_heads: heads H.
        eps: taken so that all attention classes are made alike; there is no norm here.
        mode: attention kernel, see :func:`wan_models.attention.kernels.attention`.
        audio_dim: width of the audio tokens.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        eps: float = 1e-6,
        mode: str = "sdpa",
        *,
        audio_dim: int = 768,
    ) -> None:
        super().__init__()
        del eps
        self.num_heads = num_heads
        self.mode = mode
        self.q_linear = nn.Linear(dim, dim)
        self.kv_linear = nn.Linear(audio_dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x: torch.Tensor, audio: torch.Tensor, grid: tuple[int, int, int]
    ) -> torch.Tensor:
        """One attention to the audio.

        Args:
            x: (B, L, C), normed. L is what the grid holds, or one frame more: that last frame has
                no audio, and its rows of the result are zero.
            audio: (B*T, A, audio_dim).
            grid: video tokens along (time, rows, columns).

        Returns:
            (B, L, C), to be added to ``x`` by its strength.

        Raises:
            ValueError: tokens or audio for another number of frames.
        """
        tokens = self._processed(x, audio, grid)
        k, v = self._key_value(audio)
        return self._attend(self._query(x[:, :tokens]), k, v, x.shape[1])

    def _query(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T*S, H, D)."""
        return self.q_linear(x).unflatten(-1, (self.num_heads, -1))

    def _key_value(self, audio: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """k and v, each (B*T, A, H, D) with strides (A*2C, 2C, D, 1), v at offset C."""
        return self.kv_linear(audio).unflatten(-1, (2, self.num_heads, -1)).unbind(2)

    def _attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tokens: int
    ) -> torch.Tensor:
        """(B, tokens, C) of q (B, T*S, H, D) and k, v (B*T, A, H, D); zeros after T*S."""
        batch, processed = q.shape[:2]
        q = to_frames(q, k.shape[0] // batch)
        out = self.proj(from_frames(attention(q, k, v, mode=self.mode).flatten(2), batch))
        return out if tokens == processed else F.pad(out, (0, 0, 0, tokens - processed))

    def _processed(
        self, x: torch.Tensor, audio: torch.Tensor, grid: tuple[int, int, int]
    ) -> int:
        """T*S, the tokens that have audio."""
        frames, frame = grid[0], grid[1] * grid[2]
        batch, tokens = x.shape[:2]
        if tokens not in (frames * frame, (frames + 1) * frame):
            raise ValueError(
                f"{type(self).__name__}: got {tokens} tokens, but the grid is {grid_text(grid)}; "
                f"only one frame more, {(frames + 1) * frame}, may come without audio"
            )
        if audio.dim() != 3 or audio.shape[0] != batch * frames:
            raise ValueError(
                f"audio has shape {tuple(audio.shape)}: use ({batch * frames}, A, width), {frames} "
                f"latent frames for each of {batch} samples"
            )
        return frames * frame


class SingleStreamMultiAttention(SingleStreamAttention):
    """Several speakers: a 1-D rotary ties each token to the audio of whom it shows.

    Args:
        dim: model dimension C.
        num_heads: heads H.
        eps: as in the base class.
        mode: attention kernel, see :func:`wan_models.attention.kernels.attention`.
        audio_dim: width of the audio tokens.
        audio_tokens: A, audio tokens of one speaker in a latent frame.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        eps: float = 1e-6,
        mode: str = "sdpa",
        *,
        audio_dim: int = 768,
        audio_tokens: int = 32,
    ) -> None:
        super().__init__(dim, num_heads, eps, mode, audio_dim=audio_dim)
        self.audio_tokens = audio_tokens

    def forward(
        self,
        x: torch.Tensor,
        audio: torch.Tensor,
        grid: tuple[int, int, int],
        maps: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One attention to the audio.

        Args:
            x: (B, L, C), as in the base class.
            audio: (B*T, P*A, audio_dim), one speaker after the other.
            grid: video tokens along (time, rows, columns).
            maps: (classes, L) for all samples, or (B, classes, L), of
                :meth:`WanSelfAttention.forward_multitalk`; one speaker needs none.

        Returns:
            (B, L, C), to be added to ``x`` by its strength.

        Raises:
            ValueError: as in the base class; audio that is no whole number of speakers; maps that
                are missing or do not fit.
        """
        tokens = self._processed(x, audio, grid)
        people = self._people(audio)
        if people == 1:
            return super().forward(x, audio, grid)
        self._check_maps(maps, x, people)
        q, (k, v) = self._query(x[:, :tokens]), self._key_value(audio)
        width = q.shape[-1]
        queries = query_positions(maps[..., :tokens], people)
        q = apply_rope(q, rope_table_1d(queries, width))
        keys = key_positions(people, self.audio_tokens, k.device)
        k = apply_rope(k, rope_table_1d(keys, width))
        return self._attend(q, k, v, x.shape[1])

    def _people(self, audio: torch.Tensor) -> int:
        tokens = audio.shape[1]
        if tokens == 0 or tokens % self.audio_tokens:
            raise ValueError(
                f"audio has {tokens} tokens in a frame: use {self.audio_tokens} for each speaker"
            )
        return tokens // self.audio_tokens

    @staticmethod
    def _check_maps(maps: torch.Tensor | None, x: torch.Tensor, people: int) -> None:
        if maps is None:
            raise ValueError(f"{people} speakers need maps: see WanSelfAttention.forward_multitalk")
        batch, tokens = x.shape[:2]
        fits = maps.dim() == 2 or (maps.dim() == 3 and maps.shape[0] == batch)
        if not fits or maps.shape[-1] != tokens:
            raise ValueError(
                f"maps have shape {tuple(maps.shape)}: use (classes, {tokens}) or "
                f"({batch}, classes, {tokens}) for the {tokens} video tokens"
            )
