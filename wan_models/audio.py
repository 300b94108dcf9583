"""From a speech encoder's states to the audio tokens of the attention classes.

Each add-on cuts the states into one window for each latent frame and projects the windows:
MultiTalk and InfiniteTalk to 32 tokens of 768, HuMo to 16 of 1536, FantasyTalking every state to
one token of 2048, then cut. A latent frame covers four video frames, the first one a single frame.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from wan_models.layers import WanLayerNorm

#: HuMo: the encoder's 33 layers of states make five, by the means of these ranges.
_HUMO_GROUPS = ((0, 8), (8, 16), (16, 24), (24, 32), (32, 33))
_HUMO_WINDOW = 8


class MultiTalkAudioProjection(nn.Module):
    """Windows of wav2vec2 states to audio tokens (MultiTalk, InfiniteTalk).

    The first frame's window (5 steps) and those of the later latent frames (8 steps) have first
    layers of their own; two more layers and a norm follow for both.

    Args:
        blocks: encoder layers whose states are read.
        channels: width of a state.
        hidden: inner width.
        tokens: audio tokens of a latent frame.
        token_dim: their width.
    """

    def __init__(
        self,
        blocks: int = 12,
        channels: int = 768,
        hidden: int = 512,
        tokens: int = 32,
        token_dim: int = 768,
    ) -> None:
        super().__init__()
        self.tokens = tokens
        self.proj1 = nn.Linear(5 * blocks * channels, hidden)
        self.proj1_vf = nn.Linear(8 * blocks * channels, hidden)
        self.proj2 = nn.Linear(hidden, hidden)
        self.proj3 = nn.Linear(hidden, tokens * token_dim)
        self.norm = WanLayerNorm(token_dim, 1e-5, affine=True)

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        """windows: (B, frames, 5, blocks, channels), one for each video frame, see
        :func:`multitalk_windows`. Returns (B, T, tokens, token_dim)."""
        first, later = multitalk_windows(windows)
        hidden = torch.cat(
            [self.proj1(first.flatten(2)).relu(), self.proj1_vf(later.flatten(2)).relu()], dim=1
        )
        out = self.proj3(self.proj2(hidden).relu())
        return self.norm(out.unflatten(-1, (self.tokens, -1)))


def multitalk_windows(windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows of video frames merged into windows of latent frames.

    Of four frames the first gives its window's steps 0 to 2, the middle two their centre, the
    last its steps 2 to 4.

    Args:
        windows: (B, frames, 5, ...), the two steps before each video frame, its own, two after.

    Returns:
        (B, 1, 5, ...) of the first frame and (B, T - 1, 8, ...) of the later latent frames.

    Raises:
        ValueError: no such windows, or frames that are not 1 more than a multiple of 4.
    """
    if windows.dim() < 3 or windows.shape[2] != 5:
        raise ValueError(f"windows has shape {tuple(windows.shape)}: use (B, frames, 5, ...)")
    latent = _latent_frames(windows.shape[1])
    groups = windows[:, 1:].unflatten(1, (latent - 1, 4))
    merged = torch.cat(
        [groups[:, :, 0, :3], groups[:, :, 1:3, 2], groups[:, :, 3, 2:]], dim=2
    )
    return windows[:, :1], merged


def join_speakers(speakers: Sequence[torch.Tensor]) -> torch.Tensor:
    """Audio tokens of several speakers as :class:`SingleStreamMultiAttention` takes them.

    Args:
        speakers: each (B, T, A, W), of :class:`MultiTalkAudioProjection`.

    Returns:
        (B*T, P*A, W), one speaker's tokens after the other's.

    Raises:
        ValueError: no speaker, or speakers of different shapes.
    """
    shapes = [tuple(speaker.shape) for speaker in speakers]
    if not shapes or any(shape != shapes[0] or len(shape) != 4 for shape in shapes):
        raise ValueError(f"speakers have shapes {shapes}: use one or more (B, T, A, W), all alike")
    return torch.cat(list(speakers), dim=2).flatten(0, 1)


class _Wrapped(nn.Module):
    """A layer under the name that HuMo's checkpoints give it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class HuMoAudioProjection(nn.Module):
    """Windows of Whisper states to audio tokens (HuMo): three layers, ReLU between them, a norm.

    Args:
        groups: averaged encoder layers.
        channels: width of a state.
        hidden: inner width.
        tokens: audio tokens of a latent frame.
        token_dim: their width.
    """

    def __init__(
        self,
        groups: int = len(_HUMO_GROUPS),
        channels: int = 1280,
        hidden: int = 512,
        tokens: int = 16,
        token_dim: int = 1536,
    ) -> None:
        super().__init__()
        self.tokens = tokens
        self.audio_proj_glob_1 = _Wrapped(nn.Linear(_HUMO_WINDOW * groups * channels, hidden))
        self.audio_proj_glob_2 = _Wrapped(nn.Linear(hidden, hidden))
        self.audio_proj_glob_3 = _Wrapped(nn.Linear(hidden, tokens * token_dim))
        self.audio_proj_glob_norm = _Wrapped(WanLayerNorm(token_dim, 1e-5, affine=True))

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        """windows: (B, T, 8, groups, channels), see :func:`humo_windows`. Returns
        (B, T * tokens, token_dim)."""
        hidden = self.audio_proj_glob_1(windows.flatten(2)).relu()
        out = self.audio_proj_glob_3(self.audio_proj_glob_2(hidden).relu())
        return self.audio_proj_glob_norm(out.unflatten(-1, (self.tokens, -1))).flatten(1, 2)


def humo_features(states: torch.Tensor) -> torch.Tensor:
    """Whisper's states, averaged over groups of layers and brought from 50 to 25 per second.

    Layers 0-7, 8-15, 16-23 and 24-31 make one each, layer 32 stays. The rate is halved by linear
    interpolation that keeps the first and the last state.

    Args:
        states: (33, steps, W), all layers' states at 50 per second.

    Returns:
        (steps // 2, 5, W) at 25 per second.

    Raises:
        ValueError: another number of layers, or fewer than two steps.
    """
    if states.dim() != 3 or states.shape[0] != _HUMO_GROUPS[-1][1] or states.shape[1] < 2:
        raise ValueError(
            f"states have shape {tuple(states.shape)}: use (33, steps, W), two steps or more"
        )
    means = torch.stack([states[start:end].mean(0) for start, end in _HUMO_GROUPS], dim=1)
    per_channel = means.flatten(1).t()[None]
    halved = F.interpolate(
        per_channel, size=states.shape[1] // 2, mode="linear", align_corners=True
    )
    return halved[0].t().unflatten(1, (len(_HUMO_GROUPS), -1))


def humo_windows(features: torch.Tensor, frames: int) -> torch.Tensor:
    """Eight steps for each latent frame: those of its four video frames, two before, two after.

    The first latent frame is one video frame: three zeros, then its step with two before and two
    after. Steps before the start and after the end are zero.

    Args:
        features: (steps, groups, W), one step a video frame, of :func:`humo_features`.
        frames: video frames, 1 more than a multiple of 4.

    Returns:
        (T, 8, groups, W).

    Raises:
        ValueError: frames that are not 1 more than a multiple of 4.
    """
    latent = _latent_frames(frames)
    # Two zeros in front: video frame n is row n + 2. As many behind as the last window may need.
    padded = F.pad(features, (0, 0, 0, 0, 2, max(frames + 2 - features.shape[0], 0)))
    first = F.pad(padded[:5], (0, 0, 0, 0, 3, 0))
    later = [padded[4 * i - 3 : 4 * i + 5] for i in range(1, latent)]
    return torch.stack([first, *later])


class FantasyTalkingProjection(nn.Module):
    """wav2vec2 states to audio tokens (FantasyTalking): a layer without bias, and a norm.

    Args:
        channels: width of a state.
        token_dim: width of a token.
    """

    def __init__(self, channels: int = 768, token_dim: int = 2048) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, token_dim, bias=False)
        self.norm = WanLayerNorm(token_dim, 1e-5, affine=True)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """states: (B, N, channels). Returns (B, N, token_dim)."""
        return self.norm(self.proj(states))


def fantasy_talking_ranges(tokens: int, frames: int) -> list[tuple[int, int]]:
    """First and last audio token that belong to each latent frame; may lie outside of the audio.

    With r = tokens / frames, a later latent frame i takes h = floor(2r) tokens on either side of
    its centre, the last whole token before the middle r * (4i - 1) of its video frames. The first
    one ends where the second begins.

    Args:
        tokens: of the whole audio.
        frames: video frames, 1 more than a multiple of 4 and at least 5.

    Returns:
        T ranges of 2h + 1 tokens each, ends included.

    Raises:
        ValueError: no tokens, or such frames.
    """
    latent = _latent_frames(frames)
    if latent < 2 or tokens < 1:
        raise ValueError(
            f"{tokens} audio tokens for {frames} video frames: use at least 1 and at least 5"
        )
    half = 2 * tokens // frames
    centres = [tokens * (4 * i - 1) // frames - 1 for i in range(1, latent)]
    later = [(centre - half, centre + half) for centre in centres]
    edge = later[0][0]
    return [(edge - 2 * half, edge), *later]


def fantasy_talking_windows(audio: torch.Tensor, frames: int, widen: int = 4) -> torch.Tensor:
    """Audio tokens cut into one window for each latent frame.

    Args:
        audio: (B, N, W), of :class:`FantasyTalkingProjection`.
        frames: video frames, see :func:`fantasy_talking_ranges`.
        widen: tokens added on either side of each range.

    Returns:
        (B, T, A, W). Where a window reaches beyond the audio its tokens move to the front, and
        zeros follow. 173 tokens for 81 frames give T = 21 and A = 17.

    Raises:
        ValueError: as :func:`fantasy_talking_ranges` does, or a negative ``widen``.
    """
    if widen < 0:
        raise ValueError(f"widen={widen}: use 0 or more")
    windows = []
    for start, end in fantasy_talking_ranges(audio.shape[1], frames):
        part = audio[:, max(start - widen, 0) : max(end + widen + 1, 0)]
        missing = end - start + 1 + 2 * widen - part.shape[1]
        windows.append(F.pad(part, (0, 0, 0, missing)))
    return torch.stack(windows, dim=1)


def _latent_frames(frames: int) -> int:
    """T of a video's frames."""
    if frames < 1 or (frames - 1) % 4:
        raise ValueError(f"{frames} video frames: use 1 more than a multiple of 4")
    return (frames - 1) // 4 + 1
