"""Products of row-wise 8-bit activations with 8-bit weights.

All of them sum with ``use_fast_accum``: on an H100 it makes the products 5 to 40% faster and moves
the error of a linear in the fifth digit alone (K = 13,824, activations with outlier channels,
against float64: cosine 0.99931 against 0.99932, relative L1 0.0369 against 0.0368). Where all terms
of a sum have one sign it loses up to K / 2^16 of it, since each term is cut to the bits of the sum:
0.024 at K = 1,536, 0.088 at 5,120 and 0.21 at 13,824, without it 0.002. The weights of a trained
linear have both signs; a layer of which that is not true is for a recipe without ``_fast``.
"""

from __future__ import annotations

import torch

from contig_pass import AlignedPitch, AlignedPointer, Dense, RowMajor
from wan_models.quant.binding import bind
from wan_models.quant.rows import Deferred, QuantizedRows

#: A matrix that ``_scaled_mm`` and tensor descriptors take: rows on 16 bytes, any pitch of such.
MATRIX = (RowMajor(), AlignedPointer(16), AlignedPitch(16))
#: A vector of scales or a bias.
VECTOR = (Dense("row"), AlignedPointer(16))
SOURCE = (
    "torch._scaled_mm, see contig_pass.contracts.scaled_mm; CUtensorMap wants bases and pitches "
    "of 16 bytes"
)


def product_into(
    out: torch.Tensor | None, values: torch.Tensor, row_scale: torch.Tensor,
    weight: torch.Tensor, column_scale: torch.Tensor, bias: torch.Tensor | None,
    dtype: torch.dtype, stored: torch.dtype | None = None,
) -> torch.Tensor:
    """What :func:`fp8_rows_linear` does, to ``out`` (M, N), dense, if that is given."""
    if values.is_cuda:
        from wan_models.quant import rows_gemm

        in_one = dtype == torch.bfloat16 and stored in (None, dtype)
        if rows_gemm.pays(values, weight, in_one):
            return rows_gemm.run(
                values, row_scale, weight, column_scale, bias, dtype, out, stored
            )
    # A CPU has no row-wise scales in torch 2.11.
    if dtype != torch.bfloat16 or not values.is_cuda:
        made = bare_product(values, weight).float() * (row_scale * column_scale)
        made = (made if bias is None else made + bias.float()).to(dtype)
        return made.to(stored or dtype) if out is None else out.copy_(made)
    columns = weight.shape[0]
    scales = {
        "scale_a": row_scale.reshape(-1).unsqueeze(1),  # stride 1 without rows, too
        "scale_b": column_scale.expand(columns).contiguous().view(1, columns),
        "bias": None if bias is None else bias.to(dtype),
        "out_dtype": dtype,
        "use_fast_accum": True,
    }
    if out is None:
        return torch._scaled_mm(values, weight.t(), **scales).to(stored or dtype)
    return torch._scaled_mm(values, weight.t(), **scales, out=out)


@torch.library.custom_op("wan_models::fp8_rows_linear", mutates_args=())
def fp8_rows_linear(
    values: torch.Tensor, row_scale: torch.Tensor, weight: torch.Tensor,
    column_scale: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype,
    stored: torch.dtype | None = None,
) -> torch.Tensor:
    """row_scale * column_scale * values weight^T + bias, by the fastest kernel for the sizes.

    On Hopper that is :mod:`wan_models.quant.rows_gemm` where there is a tile for every
    multiprocessor. Otherwise bf16 comes from ``_scaled_mm`` with row-wise scales, and other types,
    which that refuses, from the bare product; so does all on a CPU.

    Args:
        values, row_scale: (M, K) e4m3 and (M, 1) fp32.
        weight: (N, K) e4m3; K and N multiples of 16.
        column_scale: (N,), or (1,) for one scale of the whole weight; fp32.
        bias: (N,) or None.
        dtype: of the result.
        stored: the type in which it is returned, if not in ``dtype``; rounded to ``dtype`` it is
            all the same. For :mod:`wan_models.attention.fp16`: a product in fp16 takes less power
            and so less time on numbers that have zeros where bf16 ends.

    Returns:
        (M, N), dense.
    """
    return product_into(None, values, row_scale, weight, column_scale, bias, dtype, stored)


@fp8_rows_linear.register_fake
def _(
    values: torch.Tensor, row_scale: torch.Tensor, weight: torch.Tensor,
    column_scale: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype,
    stored: torch.dtype | None = None,
) -> torch.Tensor:
    return values.new_empty((values.shape[0], weight.shape[0]), dtype=stored or dtype)


bind("wan_models::fp8_rows_linear", ("values", "weight"), MATRIX, SOURCE)
bind("wan_models::fp8_rows_linear", ("row_scale", "column_scale", "bias"), VECTOR, SOURCE)


def rows_linear(
    x: QuantizedRows,
    weight: torch.Tensor,
    column_scale: torch.Tensor,
    bias: torch.Tensor | None,
    stored: torch.dtype | None = None,
) -> torch.Tensor:
    """y = s_row * s_column * Q(x) Q(W)^T + b: (..., N) in the type of ``x`` (..., K) or ``stored``.

    The other arguments as of :func:`fp8_rows_linear`.
    """
    out = fp8_rows_linear(
        x.values.reshape(-1, x.shape[-1]), x.scale.reshape(-1, 1), weight, column_scale, bias,
        x.dtype, stored,
    )
    return out.reshape(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("wan_models::fp8_bare_product", mutates_args=())
def fp8_bare_product(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """:func:`bare_product` in bf16 on every device."""
    return bare_product(values, weight).to(torch.bfloat16)


@fp8_bare_product.register_fake
def _(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return values.new_empty((values.shape[0], weight.shape[0]), dtype=torch.bfloat16)


bind("wan_models::fp8_bare_product", ("values", "weight"), MATRIX, SOURCE)


def deferred(
    x: QuantizedRows, weight: torch.Tensor, column_scale: torch.Tensor, bias: torch.Tensor | None
) -> Deferred:
    """:func:`rows_linear` of ``x`` (..., K) with scales and bias left to who reads it."""
    sums = fp8_bare_product(x.values.reshape(-1, x.shape[-1]), weight)
    sums = sums.reshape(*x.shape[:-1], weight.shape[0])
    return Deferred(sums, x.scale, column_scale, bias)


def bare_product(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """values (M, K) times weight (N, K), both e4m3, without scales: (M, N) bf16, on a CPU fp32.

    bf16 has the range of fp32, so the bare sums (up to 448 * 448 * K) fit it and are rounded as
    the scaled ones would be. For who applies the scales in a pass that is made anyway.
    """
    one = torch.ones((), dtype=torch.float32, device=values.device)
    return torch._scaled_mm(
        values, weight.t(), scale_a=one, scale_b=one,
        out_dtype=torch.bfloat16 if values.is_cuda else torch.float32, use_fast_accum=True,
    )
