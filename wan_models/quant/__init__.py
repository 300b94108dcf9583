"""Quantised linears: what changes numbers lives here, apart from the layout pass.

W is (N, K). s is an fp32 scale of the whole weight, Q8 a cast to e4m3 after a clamp to +-448.
x and the product are bf16 or fp16, whichever x is; an fp32 x computes in bf16. Bias and LoRAs are
added to the product and see no scale.

| recipe | stores | computes |
|---|---|---|
| ``fp8_e4m3fn`` | W cast to e4m3, 1 byte a weight | x W^T with W cast to the type of x |
| ``fp8_e5m2`` | the same in e5m2 | the same |
| ``fp8_e4m3fn_scaled`` | W / s in e4m3, s = amax / 448 | x (s W)^T, the scale applied in fp32 |
| ``fp8_e5m2_scaled`` | W / s in e5m2, s = amax / 57344 | the same |
| ``fp8_e4m3fn_fast`` | as ``fp8_e4m3fn`` | ``_scaled_mm`` of Q8(x) and W; K and N multiples of 16 |
| ``fp8_e5m2_fast`` | as ``fp8_e5m2`` | the same, Q8(x) against e5m2 |
| ``fp8_e4m3fn_scaled_fast`` | as ``fp8_e4m3fn_scaled`` | the same, times s |
| ``fp8_e5m2_scaled_fast`` | as ``fp8_e5m2_scaled`` | the same, times s |
| ``fp8_e4m3fn_dynamic_fast`` | as ``fp8_e4m3fn_scaled`` | ``_scaled_mm`` of Q8(x / a) and W, \
times a s, with a = amax of x / 448 in every call |
| ``fp8_e4m3fn_rowwise_fast`` | W / s in e4m3, an s = amax / 448 for every output channel | the \
same with an a for every row of x: accurate whatever the sizes of tokens are, and what \
:mod:`wan_models.quant.measured` chooses |
| ``fp4_experimental`` | NVFP4 with s = 1: e2m1 in half a byte a weight, an e4m3 scale for every \
16 along K; blocks whose largest weight is below 6 * 2^-9 lose precision; K a multiple of 16 | \
x W^T with W dequantised to the type of x |
| ``fp4_scaled`` | NVFP4 with s = amax / (448 * 6) | the same |
| ``fp4_scaled_fast`` | as ``fp4_scaled`` | NVIDIA capability 10 on, K a multiple of 32: FP4 \
product, x quantised to NVFP4 in every call. Elsewhere: up to 8 rows of x times W dequantised \
inside the product; then W becomes e4m3 with the scale 8 s in memory that all layers share, and x \
is quantised by row as in ``fp8_e4m3fn_rowwise_fast``; N a multiple of 16 |
| ``auto_fp8``, ``auto_fp4`` | ``fp8_e4m3fn_rowwise_fast`` or ``fp4_scaled_fast`` where 8 bits pay \
by measurement, 16 bits elsewhere: names for :func:`quantize_` | |

There is no recipe with a scale for every 128x128 block of W and 128 channels of x. It is the more
accurate one on outlier channels (relative L1 0.029 against 0.036), but rows pass every bar, and its
product has to rescale its sums every 128 channels: the best public kernel reaches 926 TFLOP/s at
these shapes on an H100, where rows and channels reach 1328 to 1516.

A normed state that quantised rows serve is made as such, once for all linears that read it (q, k
and v): :mod:`wan_models.quant.producers`. Three products that share it are faster than one fused
(K, 3 K) product, 3.44 against 3.73 ms at 32,760 rows on an H100, so projections stay apart.

All scaled products sum with ``use_fast_accum``, without fp32 sums on the way. On sums of
both signs that costs nothing that the bars see: figures in :mod:`wan_models.quant.rows_linear`.

Fast recipes need a GPU of capability 8.9 or later; all of them run on the CPU. What stays in high
precision is named in :mod:`wan_models.quant.precision`, LoRAs are in :mod:`wan_models.quant.lora`.
"""

from wan_models.quant.convert import QuantizedRow, quantize_, quantized
from wan_models.quant.fp4 import Fp4Linear
from wan_models.quant.fp8 import Fp8Linear
from wan_models.quant.linear import QuantizedLinear
from wan_models.quant.lora import attach_lora, detach_lora, merge_lora_, set_lora_strength
from wan_models.quant.precision import HIGH_PRECISION, TEXT, high_precision
from wan_models.quant.recipes import RECIPES, Recipe
from wan_models.quant.slab import SlabLinear

__all__ = [
    "HIGH_PRECISION",
    "RECIPES",
    "TEXT",
    "Fp4Linear",
    "Fp8Linear",
    "QuantizedLinear",
    "QuantizedRow",
    "Recipe",
    "SlabLinear",
    "attach_lora",
    "detach_lora",
    "high_precision",
    "merge_lora_",
    "quantize_",
    "quantized",
    "set_lora_strength",
]
