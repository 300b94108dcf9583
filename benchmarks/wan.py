"""Wan blocks as workloads."""

from __future__ import annotations

import torch

from wan_models import CONFIGS, BlockInputs, WanBlock, block_inputs, quantize_

RECIPE = "fp8_e4m3fn_scaled_fast"
#: Token grids (time, rows, columns) of 81 frames.
GRIDS = {"tiny": (3, 4, 5), "480p": (21, 30, 52), "720p": (21, 45, 80)}


def quantised_block(
    config: str, grid: str, device: str, *, seed: int = 0
) -> tuple[WanBlock, BlockInputs]:
    """A bf16 block with every linear in FP8, and random inputs for it.

    Args:
        config: a name of :data:`wan_models.CONFIGS`.
        grid: a name of :data:`GRIDS`.
        device: where to make both.
        seed: of weights and inputs.
    """
    torch.manual_seed(seed)
    with torch.device(device):
        block = WanBlock(CONFIGS[config]).bfloat16().eval()
    quantize_(block, RECIPE)
    inputs = block_inputs(
        CONFIGS[config], GRIDS[grid], dtype=torch.bfloat16, device=device, seed=seed
    )
    return block, inputs


def tiny_block(device: str = "cpu") -> tuple[WanBlock, BlockInputs]:
    """The tiny block, small enough for a CPU."""
    return quantised_block("tiny", "tiny", device)
