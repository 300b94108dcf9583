"""The Wan video transformers on quantised linears: the proving ground of contig_pass."""

from wan_models import addons, zoo
from wan_models.block import BlockConditions, WanBlock
from wan_models.config import CONFIGS, TINY, WAN_1_3B, WAN_5B, WAN_14B, WanConfig, token_grid
from wan_models.inputs import (
    BlockInputs,
    ModelInputs,
    block_conditions,
    block_inputs,
    model_inputs,
)
from wan_models.model import WanModel
from wan_models.quant import Fp8Linear, SlabLinear, quantize_
from wan_models.rope import rope_table

__all__ = [
    "CONFIGS",
    "TINY",
    "WAN_1_3B",
    "WAN_5B",
    "WAN_14B",
    "BlockConditions",
    "BlockInputs",
    "Fp8Linear",
    "ModelInputs",
    "SlabLinear",
    "WanBlock",
    "WanConfig",
    "WanModel",
    "addons",
    "block_conditions",
    "block_inputs",
    "model_inputs",
    "quantize_",
    "rope_table",
    "token_grid",
    "zoo",
]
