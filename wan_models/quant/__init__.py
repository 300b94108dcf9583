"""Quantised linears: what changes numbers lives here, apart from the layout pass."""

from wan_models.quant.fp8 import Fp8Linear, QuantizedRow, quantize_
from wan_models.quant.recipes import RECIPES, Recipe
from wan_models.quant.slab import SlabLinear

__all__ = ["RECIPES", "Fp8Linear", "QuantizedRow", "Recipe", "SlabLinear", "quantize_"]
