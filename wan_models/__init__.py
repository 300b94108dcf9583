"""The Wan video transformers on quantised linears: the proving ground of contig_pass."""

from wan_models.block import BlockInputs, WanBlock, block_inputs
from wan_models.config import CONFIGS, TINY, WAN_1_3B, WAN_5B, WAN_14B, WanConfig, token_grid
from wan_models.quant import Fp8Linear, SlabLinear, quantize_
from wan_models.rope import rope_table

__all__ = [
    "CONFIGS",
    "TINY",
    "WAN_1_3B",
    "WAN_5B",
    "WAN_14B",
    "BlockInputs",
    "Fp8Linear",
    "SlabLinear",
    "WanBlock",
    "WanConfig",
    "block_inputs",
    "quantize_",
    "rope_table",
    "token_grid",
]
