"""Radial attention: frames attend to near frames widely and to far frames narrowly.

Source of the mask: section "Radial attention" of the reference of Wan models. With S tokens in a
frame and 2^bits(n) for n's bit length, a query in frame i may see a key in frame j where

* j = 0 (the first frame is seen by all) or i = j: always;
* |i - j| = 1: if the tokens' positions in their frames are at most S/2 apart;
* otherwise: if they are at most max(2^bits(S) / 2^bits(|i-j|) * decay, block) apart; and where that
  quotient is below ``block``, only if |i-j| is a multiple of floor(block / quotient).

A block of block x block tokens is then computed whole or not at all: it is kept if of its columns
that have any allowed pair more than 60 % have more than a third of their pairs allowed.

The attention is exact softmax attention over the kept blocks: on a GPU in bf16 or fp16 by a Triton
kernel that walks the kept blocks (:mod:`wan_models.attention.radial_triton`); on the CPU, and in
fp32, by ``F.scaled_dot_product_attention`` under the expanded mask, some rows of blocks at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch.nn import functional as F

from contig_pass import AlignedPointer, UnitStrideLast
from wan_models.attention import packages
from wan_models.attention.contracts import bind, check_unit_stride

BLOCKS = (64, 128)
#: Head dimensions of the Triton kernel.
HEAD_DIMS = (64, 128)
MINIMUM_CAPABILITY = (8, 0)
#: Latent pixels a token spans along rows and columns.
_PATCH = 2
#: Elements of a mask that exist at once where the mask is expanded.
_MASK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class RadialPattern:
    """Which blocks of tokens attend to which.

    Args:
        grid: tokens along (time, rows, columns) of the video; q, k and v have their product.
        decay: how fast the window narrows with the distance of frames.
        block: tokens in a block, 64 or 128.

    Raises:
        ValueError: a value out of range, or a size that blocks do not divide: latent rows and
            columns (twice the tokens) must be multiples of block / 8, and the tokens of a frame
            of block.
    """

    grid: tuple[int, int, int]
    decay: float = 0.2
    block: int = 128

    def __post_init__(self) -> None:
        if self.block not in BLOCKS:
            raise ValueError(f"radial attention: block={self.block!r}, use one of {BLOCKS}")
        if not isinstance(self.decay, (int, float)) or not 0 < self.decay < float("inf"):
            raise ValueError(f"radial attention: decay={self.decay!r}, use a positive number")
        sizes = self.grid
        if not isinstance(sizes, tuple) or len(sizes) != 3 or any(
            not isinstance(n, int) or n < 1 for n in sizes
        ):
            raise ValueError(
                f"radial attention: grid={sizes!r}, use a tuple of tokens along time, rows and "
                "columns"
            )
        unit = self.block // 8
        rows, columns = sizes[1] * _PATCH, sizes[2] * _PATCH
        if rows % unit or columns % unit or self.frame % self.block:
            raise ValueError(
                f"radial attention with block {self.block} needs latent rows and columns that are "
                f"multiples of {unit} and frames of a multiple of {self.block} tokens: "
                f"{rows} mod {unit} = {rows % unit}, {columns} mod {unit} = {columns % unit}, "
                f"{sizes[1]}*{sizes[2]} = {self.frame} mod {self.block} = {self.frame % self.block}"
            )

    @property
    def frame(self) -> int:
        """Tokens in a frame, S."""
        return self.grid[1] * self.grid[2]

    @property
    def tokens(self) -> int:
        """Tokens in the video."""
        return self.grid[0] * self.frame

    def block_mask(self) -> torch.Tensor:
        """(tokens / block, tokens / block) bool on the CPU: kept blocks, queries by keys."""
        return torch.from_numpy(_block_mask(self).copy())

    def density(self) -> float:
        """Kept blocks as a part of all."""
        return float(_block_mask(self).mean())


def window(tokens: int, distance: int, decay: float, block: int) -> float:
    """How far apart in their frames two tokens may be that are ``distance`` >= 2 frames apart."""
    return max(_quotient(tokens, distance) * decay, block)


def sieved(tokens: int, distance: int, block: int) -> bool:
    """Whether frames ``distance`` apart do not see one another at all."""
    quotient = _quotient(tokens, distance)
    return quotient < block and distance % int(block // quotient) != 0


def run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_lens: torch.Tensor | None,
    pattern: RadialPattern,
) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v over the kept blocks of ``pattern``.

    Args:
        q, k, v: (B, L, H, D) with L the pattern's tokens, last dimensions unit-stride.
        k_lens: (B,) valid keys.
        pattern: decides which blocks are kept.

    Returns:
        (B, L, H, D) dense.

    Raises:
        ValueError: another number of tokens, or a last dimension that is not unit-stride.
    """
    if not q.shape[1] == k.shape[1] == pattern.tokens:
        raise ValueError(
            f"radial attention over {pattern.grid} takes {pattern.tokens} tokens, got "
            f"{q.shape[1]} queries and {k.shape[1]} keys"
        )
    lens = None if k_lens is None else k_lens.to(k.device)
    return radial_attention(q, k, v, lens, pattern.grid, pattern.decay, pattern.block)


def obstacle(
    sm: tuple[int, int] | None, kind: str, dtype: torch.dtype | None, triton: bool
) -> str:
    """What rules the mode out on a device, in a few words, or ``""``.

    Args:
        sm: compute capability, ``None`` if it is not known.
        kind: ``"cuda"``, ``"cpu"``, ...
        dtype: of q, k and v, if known.
        triton: whether Triton is installed.
    """
    if kind != "cuda" or dtype not in packages.HALF:
        return ""
    if sm is None or sm < MINIMUM_CAPABILITY:
        found = "no CUDA device is visible" if sm is None else f"found {sm[0]}.{sm[1]}"
        return f"compute capability {'{}.{}'.format(*MINIMUM_CAPABILITY)} or later needed, {found}"
    return "" if triton else "package triton needed, not installed"


@torch.library.custom_op("wan_models::radial_attention", mutates_args=())
def radial_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_lens: torch.Tensor | None,
    grid: Sequence[int], decay: float, block: int,
) -> torch.Tensor:
    """The op behind :func:`run`; the last three arguments are the pattern's."""
    check_unit_stride("radial", q=q, k=k, v=v)
    pattern = RadialPattern(tuple(grid), decay, block)
    if q.device.type == "cuda" and q.dtype in packages.HALF:
        from wan_models.attention import radial_triton

        starts, columns = kept_blocks(pattern, q.device)
        return radial_triton.forward(q, k, v, k_lens, starts, columns, block)
    return masked(q, k, v, k_lens, pattern)


@radial_attention.register_fake
def _fake(q: torch.Tensor, *_: object) -> torch.Tensor:
    return q.new_empty(q.shape)


def masked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_lens: torch.Tensor | None,
    pattern: RadialPattern,
) -> torch.Tensor:
    """The same attention under an expanded mask, in pieces whose masks stay small."""
    out = q.new_empty(q.shape)
    blocks = torch.from_numpy(_block_mask(pattern).copy()).to(q.device)
    size, tokens = pattern.block, pattern.tokens
    valid = None
    if k_lens is not None:
        valid = (torch.arange(tokens, device=k.device) < k_lens[:, None])[:, None, None, :]
    heads_first = [x.transpose(1, 2) for x in (k, v)]
    step = max(1, _MASK_ELEMENTS // (size * tokens * (1 if valid is None else q.shape[0])))
    for first in range(0, len(blocks), step):
        rows = slice(first * size, (first + step) * size)
        mask = blocks[first : first + step].repeat_interleave(size, 0).repeat_interleave(size, 1)
        if valid is not None:
            mask = mask & valid
        part = F.scaled_dot_product_attention(
            q[:, rows].transpose(1, 2), *heads_first, attn_mask=mask
        )
        out[:, rows] = part.transpose(1, 2)
    return out


@lru_cache(maxsize=16)
def kept_blocks(
    pattern: RadialPattern, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kept blocks by rows, int32 on ``device``: where each row's list starts, and the lists."""
    mask = _block_mask(pattern)
    starts = np.concatenate([[0], np.cumsum(mask.sum(1))])
    lists = (starts, np.nonzero(mask)[1])
    return tuple(torch.from_numpy(x.astype(np.int32)).to(device) for x in lists)


@lru_cache(maxsize=16)
def _block_mask(pattern: RadialPattern) -> np.ndarray:
    frames, frame, block = pattern.grid[0], pattern.frame, pattern.block
    side = frame // block
    near = [_frame_blocks(pattern, distance) for distance in range(frames)]
    mask = np.empty((frames, side, frames, side), dtype=bool)
    for i in range(frames):
        for j in range(frames):
            mask[i, :, j, :] = True if j == 0 else near[abs(i - j)]
    mask.setflags(write=False)
    return mask.reshape(frames * side, frames * side)


def _frame_blocks(pattern: RadialPattern, distance: int) -> np.ndarray:
    """Kept blocks of a pair of frames that are ``distance`` apart, the first frame apart."""
    frame, block = pattern.frame, pattern.block
    side = frame // block
    if distance == 0:
        return np.ones((side, side), dtype=bool)
    if distance > 1 and sieved(frame, distance, block):
        return np.zeros((side, side), dtype=bool)
    reach = frame / 2 if distance == 1 else window(frame, distance, pattern.decay, block)
    position = np.arange(frame, dtype=np.int32)
    allowed = np.abs(position[:, None] - position[None, :]) <= reach
    counts = allowed.reshape(side, block, side, block).sum(1)  # of each column of each block
    dense, any_allowed = (counts * 3 > block).sum(-1), (counts > 0).sum(-1)
    return dense * 5 > any_allowed * 3


def _quotient(tokens: int, distance: int) -> float:
    return 2 ** tokens.bit_length() / 2 ** distance.bit_length()


bind(
    "wan_models::radial_attention", ("q", "k", "v"), (UnitStrideLast(), AlignedPointer(16)),
    "wan_models/attention/radial_triton.py reads rows of the last dimension by vectors of 16 "
    "bytes; off those, Triton compiles a kernel that reads single elements",
)
