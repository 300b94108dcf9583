"""NVFP4: e2m1 values, two to a byte, with an e4m3 scale for every 16 along K.

x is about e2m1 * block scale * tensor scale, with one fp32 tensor scale. The e2m1 codes 0 to 7
stand for 0, 0.5, 1, 1.5, 2, 3, 4, 6; code + 8 is the negative. Of two neighbours along K the first
lies in the low half of the byte, as ``torch.float4_e2m1fn_x2`` and cuBLAS have it. Buffers hold
uint8: a float4 tensor cannot be cast, filled or compared, so it would survive neither ``half()``
nor a checkpoint. Source: NVIDIA's description of the format, and cuBLAS on scale layouts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F

from wan_models.quant.recipes import E4M3

#: Values along K that share a block scale.
BLOCK = 16
#: Largest values.
E2M1_MAX, E4M3_MAX = 6.0, 448.0
#: Smallest e4m3 value above 0: a block scale of 0 would divide by 0.
E4M3_LEAST = 2.0**-9
#: Halfway between the values of codes i and i + 1.
_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
#: e4m3 with an e2m1 value's bits has this fraction of the value: exponents are biased by 7, not 1.
_BIAS = 64.0
#: Rows and columns of a tile of block scales in cuBLAS's order.
_TILE_ROWS, _TILE_COLUMNS = 128, 4


class Nvfp4(NamedTuple):
    """A quantised tensor of shape (..., K).

    Attributes:
        packed: (..., K / 2) uint8.
        block_scale: (..., K / 16) e4m3.
        tensor_scale: fp32 of shape ().
    """

    packed: torch.Tensor
    block_scale: torch.Tensor
    tensor_scale: torch.Tensor


def quantize_nvfp4(x: torch.Tensor, *, scaled: bool = True) -> Nvfp4:
    """``x`` in NVFP4.

    The tensor scale is amax / (448 * 6), so that the largest block scale is 448, or 1 if not
    ``scaled``; a block scale is amax of the block / 6 / tensor scale, rounded to e4m3 and at
    least 2^-9; values are rounded to the nearest e2m1, ties to the even code, beyond 6 to 6.

    Args:
        x: (..., K) of any float type, K a multiple of 16, at least one element.
        scaled: whether there is a tensor scale.
    """
    blocks = x.float().unflatten(-1, (-1, BLOCK))
    largest = blocks.abs().amax(-1)
    if scaled:
        tensor_scale = largest.amax() / (E4M3_MAX * E2M1_MAX)
        tensor_scale = tensor_scale.clamp(min=torch.finfo(torch.float32).tiny)
    else:
        tensor_scale = torch.ones((), dtype=torch.float32, device=x.device)
    block_scale = (largest / E2M1_MAX / tensor_scale).clamp(E4M3_LEAST, E4M3_MAX).to(E4M3)
    step = block_scale.float() * tensor_scale
    codes = round_to_e2m1(blocks / step.unsqueeze(-1)).flatten(-2)
    return Nvfp4(pack(codes), block_scale, tensor_scale)


def dequantize_nvfp4(x: Nvfp4, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The values that ``x`` stands for: (..., K), computed in fp32 and cast to ``dtype``."""
    step = x.block_scale.float() * (x.tensor_scale * _BIAS)
    return _times_blocks(x.packed, step).to(dtype)


def nvfp4_to_e4m3(x: Nvfp4) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` as e4m3 with a tensor scale, for a kernel that knows no block scales.

    e2m1 * block scale goes up to 6 * 448; an eighth of it fits into e4m3 and is rounded no
    further where e2m1 is a power of two.

    Returns:
        (..., K) e4m3, and its scale, fp32 of shape ().
    """
    eighths = x.block_scale.float() * (_BIAS / 8.0)
    return _times_blocks(x.packed, eighths).to(E4M3), x.tensor_scale * 8.0


def _times_blocks(packed: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """The values / 64 of ``packed`` times ``step``, one for each block: (..., K) fp32."""
    blocks = _e4m3_of(packed).float().unflatten(-1, (-1, BLOCK))
    return (blocks * step.unsqueeze(-1)).flatten(-2)


def _e4m3_of(packed: torch.Tensor) -> torch.Tensor:
    """Every packed value / 64 as e4m3, by moving its four bits: (..., K).

    Sign stays first; the two exponent bits become the low ones of four, the mantissa bit the
    high one of three. The subnormal 0.5 becomes a subnormal, so this is exact for all 16 codes.
    """
    low = (packed & 0x08) << 4 | (packed & 0x07) << 2
    high = (packed & 0x80) | (packed & 0x70) >> 2
    return torch.stack((low, high), -1).flatten(-2).view(E4M3)


def round_to_e2m1(x: torch.Tensor) -> torch.Tensor:
    """Codes 0 to 15 of the nearest e2m1 values, uint8: ties to the even code, beyond 6 to 6.

    NaN has no code and gives 0; in :func:`quantize_nvfp4` its block scale is NaN as well.
    """
    size = x.abs()
    code = torch.signbit(x).to(torch.uint8) << 3
    for below, midpoint in enumerate(_MIDPOINTS):
        # A tie belongs to the even one of the two codes.
        code = code + (size >= midpoint if below % 2 else size > midpoint)
    return code


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Codes (..., K) uint8, two to a byte: (..., K / 2), the first in the low half."""
    pairs = codes.unflatten(-1, (-1, 2))
    return pairs[..., 0] | pairs[..., 1] << 4


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """Codes (..., K) uint8 of (..., K / 2) bytes: what :func:`pack` was given."""
    return torch.stack((packed & 0x0F, packed >> 4), -1).flatten(-2)


def swap_halves(packed: torch.Tensor) -> torch.Tensor:
    """Bytes with their halves exchanged: to and from files with the first value in the high one."""
    return packed << 4 | packed >> 4


def swizzle_scales(scales: torch.Tensor) -> torch.Tensor:
    """Block scales in the order that cuBLAS reads them in.

    Rows and columns are padded with 0 to multiples of 128 and 4. Tiles of 128 by 4 follow each
    other row by row; in a tile, scale (r, c) lies at byte (r mod 32) * 16 + (r div 32) * 4 + c.

    Args:
        scales: (rows, columns) e4m3.

    Returns:
        e4m3, 1-D.
    """
    rows, columns = scales.shape
    row_tiles, column_tiles = -(-rows // _TILE_ROWS), -(-columns // _TILE_COLUMNS)
    padding = (0, column_tiles * _TILE_COLUMNS - columns, 0, row_tiles * _TILE_ROWS - rows)
    padded = F.pad(scales.view(torch.uint8), padding)
    tiles = padded.reshape(row_tiles, 4, 32, column_tiles, _TILE_COLUMNS).permute(0, 3, 2, 1, 4)
    return tiles.reshape(-1).view(E4M3)


def unswizzle_scales(swizzled: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """What :func:`swizzle_scales` was given: (rows, columns) e4m3, dense.

    Args:
        swizzled: e4m3 of any shape, in cuBLAS's order with its padding.
        shape: rows and columns without padding.

    Raises:
        ValueError: another number of scales than the shape needs.
    """
    rows, columns = shape
    row_tiles, column_tiles = -(-rows // _TILE_ROWS), -(-columns // _TILE_COLUMNS)
    needed = row_tiles * column_tiles * _TILE_ROWS * _TILE_COLUMNS
    if swizzled.numel() != needed:
        raise ValueError(
            f"{swizzled.numel()} swizzled scales: {rows} rows of {columns} need {needed}"
        )
    tiles = swizzled.reshape(-1).view(torch.uint8).view(row_tiles, column_tiles, 32, 4, 4)
    padded = tiles.permute(0, 3, 2, 1, 4).reshape(row_tiles * _TILE_ROWS, -1)
    return padded[:rows, :columns].clone().view(E4M3)
