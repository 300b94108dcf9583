"""Sizes of the classes and of their inputs, and random inputs of those sizes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from wan_models import CONFIGS
from wan_models.attention.radial import RadialPattern
from wan_models.inputs import (
    ADAPTER_TOKENS,
    ADAPTER_WIDTH,
    AUDIO_TOKENS,
    HUMO_TOKENS,
    HUMO_WIDTH,
    JOINTS,
    MULTITALK_TOKENS,
    MULTITALK_WIDTH,
)
from wan_models.rope import rope_table


@dataclass(frozen=True)
class Size:
    """Widths and token counts.

    Attributes:
        name: ``"tiny"`` or ``"full"``.
        dim: model dimension C.
        heads: H.
        grid: video tokens along (time, rows, columns).
        pattern: of radial attention, whose grid has to suit its blocks.
        text, image: tokens of a prompt, and of an image.
        audio, adapter: FantasyTalking's and FantasyPortrait's tokens of a latent frame.
        side_width: width of both.
        speech, speech_width: MultiTalk's tokens of one person in a latent frame, and their width.
        humo, humo_width: the same for HuMo.
        joints: motion tokens of a latent frame.
    """

    name: str
    dim: int
    heads: int
    grid: tuple[int, int, int]
    pattern: RadialPattern
    text: int = 512
    image: int = 257
    audio: int = AUDIO_TOKENS
    adapter: int = ADAPTER_TOKENS
    side_width: int = ADAPTER_WIDTH
    speech: int = MULTITALK_TOKENS
    speech_width: int = MULTITALK_WIDTH
    humo: int = HUMO_TOKENS
    humo_width: int = HUMO_WIDTH
    joints: int = JOINTS

    @property
    def frame(self) -> int:
        """Tokens of a latent frame."""
        return self.grid[1] * self.grid[2]

    @property
    def tokens(self) -> int:
        """Video tokens."""
        return self.grid[0] * self.frame

    @property
    def head_dim(self) -> int:
        """D."""
        return self.dim // self.heads


#: Small enough for a CPU; the head dimension is the real one. Odd counts, so that nothing but the
#: widths is a multiple of 16.
TINY = Size(
    "tiny", CONFIGS["tiny"].dim, CONFIGS["tiny"].num_heads, (3, 2, 4),
    RadialPattern((3, 8, 8), block=64), text=13, image=5, audio=5, adapter=7, side_width=64,
    speech=3, speech_width=64, humo=3, humo_width=64, joints=7,
)
#: The 14B models on 17 frames of 832x480.
FULL = Size(
    "full", CONFIGS["t2v-14b"].dim, CONFIGS["t2v-14b"].num_heads, (5, 30, 52),
    RadialPattern((5, 32, 48)),
)
SIZES = {size.name: size for size in (TINY, FULL)}


class Draw:
    """Random inputs of one call.

    Args:
        size: of what is made.
        batch: B.
        seed: of the numbers; equal seeds give equal inputs.
        device: where they are made.
        dtype: of hidden states; tables, masks and maps are fp32.
    """

    def __init__(
        self,
        size: Size,
        batch: int,
        seed: int,
        device: str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.size, self.batch, self.seed = size, batch, seed
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator(device).manual_seed(seed)

    def states(self, *shape: int) -> torch.Tensor:
        """Normal numbers (B, *shape, C)."""
        return self.normal(self.batch, *shape, self.size.dim)

    def normal(self, *shape: int) -> torch.Tensor:
        """Normal numbers of this shape."""
        made = torch.randn(*shape, generator=self._generator, device=self.device)
        return made.to(self.dtype)

    def uniform(self, *shape: int) -> torch.Tensor:
        """Uniform fp32 numbers from 0 to 1."""
        return torch.rand(*shape, generator=self._generator, device=self.device)

    def video(self, more: int = 0) -> torch.Tensor:
        """Hidden states of the video and of ``more`` tokens after it, (B, L + more, C)."""
        return self.states(self.size.tokens + more)

    def rope(self, grid: tuple[int, int, int] | None = None) -> torch.Tensor:
        """The rotary table of a grid, by default the video's."""
        return rope_table(grid or self.size.grid, self.size.head_dim, device=self.device)

    def people(self) -> torch.Tensor:
        """Masks of two people and the background in the first frame, (3, h * w) fp32."""
        columns = torch.arange(self.size.frame, device=self.device) % self.size.grid[2]
        third = self.size.grid[2] // 3 or 1
        left, right = columns < third, columns >= self.size.grid[2] - third
        return torch.stack([left, right, ~(left | right)]).float()
