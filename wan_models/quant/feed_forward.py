"""The feed-forward on row-wise 8-bit operands as one op, so that its hidden states stay small.

Between the two products lie (M, ffn) hidden states, the largest tensor of a block: 906 MB in 16
bits at 32,760 tokens of the 14B model. Here they are made, activated, quantised and multiplied a
slice of tokens at a time, so that only a slice of them exists. The first product is taken bare, by
the tensor-wise kernel with scales of 1, and its scales and bias are applied by the kernel that
activates: 3.17 + 0.56 ms against 3.49 + 0.46 with the scales in the product (32,760 tokens, H100).
The second one is complete.
"""

from __future__ import annotations

import torch

from wan_models.quant.binding import bind
from wan_models.quant.fused import gelu_quantise
from wan_models.quant.linear import QuantizedLinear
from wan_models.quant.rows import QuantizedRows
from wan_models.quant.rows_linear import MATRIX, SOURCE, VECTOR, bare_product, product_into

#: Tokens of a slice: 66 tiles of 128 rows. With 54 tiles of 256 columns (13,824) they make 27
#: rounds of an H100's 132 multiprocessors to the tile, with 20 (5,120) 10 rounds: slicing costs no
#: idle round.
SLICE = 66 * 128


@torch.library.custom_op("wan_models::fp8_feed_forward", mutates_args=())
def fp8_feed_forward(
    values: torch.Tensor, row_scale: torch.Tensor,
    weight0: torch.Tensor, column_scale0: torch.Tensor, bias0: torch.Tensor | None,
    weight2: torch.Tensor, column_scale2: torch.Tensor, bias2: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """GELU(x W0^T + b0), by row in e4m3, times W2^T, plus b2.

    Args:
        values, row_scale: x as e4m3 (M, K) and (M, 1).
        weight0: (F, K) e4m3; ``column_scale0`` (F,) or (1,) fp32; ``bias0`` (F,) or None.
        weight2: (N, F) e4m3; ``column_scale2`` (N,) or (1,) fp32; ``bias2`` (N,) or None.
        dtype: of the result.

    Returns:
        (M, N) ``dtype``, dense.
    """
    first, second = (weight0, column_scale0, bias0), (weight2, column_scale2, bias2)
    return in_slices(values, row_scale, first, second, dtype, SLICE)


@fp8_feed_forward.register_fake
def _(
    values: torch.Tensor, row_scale: torch.Tensor,
    weight0: torch.Tensor, column_scale0: torch.Tensor, bias0: torch.Tensor | None,
    weight2: torch.Tensor, column_scale2: torch.Tensor, bias2: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    return values.new_empty((values.shape[0], weight2.shape[0]), dtype=dtype)


#: Weight, its scales and the bias of a linear.
Layer = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def in_slices(
    values: torch.Tensor, row_scale: torch.Tensor, first: Layer, second: Layer,
    dtype: torch.dtype, tokens: int,
) -> torch.Tensor:
    """What :func:`fp8_feed_forward` does, ``tokens`` to a slice."""
    rows = values.shape[0]
    if rows <= tokens:
        return _slice(values, row_scale, first, second, dtype)
    out = values.new_empty((rows, second[0].shape[0]), dtype=dtype)
    for start in range(0, rows, tokens):
        part = slice(start, start + tokens)
        _slice(values[part], row_scale[part], first, second, dtype, out[part])
    return out


def _slice(
    values: torch.Tensor, row_scale: torch.Tensor, first: Layer, second: Layer,
    dtype: torch.dtype, out: torch.Tensor | None = None,
) -> torch.Tensor:
    weight, column_scale, bias = first
    hidden = gelu_quantise(bare_product(values, weight), row_scale, column_scale, bias)
    return product_into(out, *hidden, *second, dtype)


bind("wan_models::fp8_feed_forward", ("values", "weight0", "weight2"), MATRIX, SOURCE)
bind(
    "wan_models::fp8_feed_forward",
    ("row_scale", "column_scale0", "bias0", "column_scale2", "bias2"), VECTOR, SOURCE,
)


def feed_forward(
    x: QuantizedRows, first: QuantizedLinear, second: QuantizedLinear
) -> torch.Tensor:
    """second(GELU(first(x))): (..., N) in the type of ``x``."""
    out = fp8_feed_forward(
        x.values.reshape(-1, x.shape[-1]), x.scale.reshape(-1, 1),
        *first.operands(), first.bias, *second.operands(), second.bias, x.dtype,
    )
    return out.view(*x.shape[:-1], -1)
