"""Which recipe each linear gets under an ``auto`` name, and the measurements that say so.

Times are medians of CUDA events on one NVIDIA H100 80GB HBM3, torch 2.11.0+cu130, Triton 3.6.0,
November 2026. A quantised product is counted with the pass that quantises its input (0.178 ms for
5,120 channels, 0.455 ms for 13,824) and with the expansion of an FP4 weight. Accuracy is against
float64 on activations with outlier channels (every 97th channel 30 times the others).

Static scales pass at activations of size 1 (cosine 0.9993, relative L1 0.037) and are 3% faster a
linear, but not where activations are small or large: at size 0.001 relative L1 is 0.18, at size
100 0.84. One dynamic scale of the tensor passes, but needs a pass over the input before the one
that quantises. Rows pass at every size (cosine 0.99934, relative L1 0.036), so that is what is
chosen wherever 8 bits pay.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

#: The recipe of each ``auto`` name where quantising pays.
AUTO = {"auto_fp8": "fp8_e4m3fn_rowwise_fast", "auto_fp4": "fp4_scaled_fast"}


class Measured(NamedTuple):
    """A linear at 32,760 rows.

    Attributes:
        k, n: in and out features.
        wide: ms in bf16.
        static: ms of the product with one static scale.
        row_wise: ms with scales of rows and channels.
        quantise: ms of the pass that quantises the input.
        relative_l1: of the row-wise linear.
    """

    k: int
    n: int
    wide: float
    static: float
    row_wise: float
    quantise: float
    relative_l1: float


ROWS = 32_760
TABLE = (
    Measured(5120, 5120, 2.110, 1.117, 1.148, 0.178, 0.0358),
    Measured(5120, 15360, 7.196, 3.633, 3.733, 0.178, 0.0359),
    Measured(5120, 13824, 6.451, 3.229, 3.493, 0.178, 0.0359),
    Measured(13824, 5120, 6.131, 3.130, 3.060, 0.455, 0.0369),
)
#: Bytes that are read and written to make e4m3 of an NVFP4 weight, and how many a millisecond.
EXPANDED_BYTES, EXPANDED_BYTES_A_MS = 1.5625, 1.739e9
#: Out features from which quantising pays: reading K 16-bit numbers a row and writing 8-bit ones
#: takes 3 K bytes at 3.0 TB/s, and a product of N columns gains 2 K N flops at 1350 instead of 700
#: TFLOP/s. The two are equal at N = 727.
LEAST_COLUMNS = 768


def chosen(auto: str, linear: nn.Linear) -> tuple[str | None, str]:
    """The recipe for ``linear`` and why; None for 16 bits.

    Args:
        auto: a name in :data:`AUTO`.
        linear: any.
    """
    k, n = linear.in_features, linear.out_features
    if n < LEAST_COLUMNS:
        return None, (
            f"N={n} is below {LEAST_COLUMNS}: quantising a row takes longer than its product gains"
        )
    recipe = AUTO[auto]
    for row in TABLE:
        if (row.k, row.n) == (k, n):
            counted = row.row_wise + row.quantise
            if auto == "auto_fp4":
                counted += k * n * EXPANDED_BYTES / EXPANDED_BYTES_A_MS
            return recipe, (
                f"{recipe}: {counted:.2f} ms with quantising against {row.wide:.2f} ms in bf16 "
                f"({ROWS} rows, H100)"
            )
    return recipe, f"{recipe}: N={n} is {LEAST_COLUMNS} or more; not measured, by the cost model"
