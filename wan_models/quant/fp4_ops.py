"""NVFP4 weights on devices that multiply 8 bits at best, as ops.

The e4m3 copy of a weight lives from its expansion to the product that reads it. It comes from the
caching allocator, which hands the same memory to the next layer of the shape: compiled, in CUDA
graphs and on several streams alike, with nothing to keep in step by hand.
"""

from __future__ import annotations

import torch

from contig_pass import AlignedPointer, Dense, UnitStrideLast
from wan_models.quant.binding import bind
from wan_models.quant.fused import rows_of
from wan_models.quant.nvfp4 import Nvfp4, dequantize_nvfp4, nvfp4_to_e4m3
from wan_models.quant.recipes import E4M3
from wan_models.quant.rows_linear import rows_linear

#: Most rows for which the weight is dequantised inside the product and activations stay in 16 bits.
#: By measurement: a product on tensor cores that dequantises lost to expansion and FP8 from 16 rows
#: on (0.276 against 0.241 ms, (K, N) = (5120, 13824), H100), for each program decodes anew.
FEW_ROWS = 8


@torch.library.custom_op("wan_models::expand_fp4", mutates_args=())
def expand_fp4(packed: torch.Tensor, block_scale: torch.Tensor) -> torch.Tensor:
    """e2m1 * block scale / 8 as e4m3.

    Args:
        packed: (N, K / 2) uint8, dense.
        block_scale: (N, K / 16) e4m3, dense.

    Returns:
        (N, K) e4m3, to be scaled by :func:`expanded_scale`.
    """
    if packed.is_cuda:
        from wan_models.quant import fp4_triton

        return fp4_triton.run_expand(packed, block_scale)
    one = torch.ones((), dtype=torch.float32, device=packed.device)
    return nvfp4_to_e4m3(Nvfp4(packed, block_scale, one))[0]


@expand_fp4.register_fake
def _(packed: torch.Tensor, block_scale: torch.Tensor) -> torch.Tensor:
    return packed.new_empty((packed.shape[0], 2 * packed.shape[1]), dtype=E4M3)


def expanded_scale(tensor_scale: torch.Tensor) -> torch.Tensor:
    """The scale of an expanded weight, (1,): 8 times the tensor scale, since e2m1 * block scale
    goes up to 6 * 448."""
    return (tensor_scale * 8.0).reshape(1)


@torch.library.custom_op("wan_models::fp4_few_rows", mutates_args=())
def fp4_few_rows(
    x: torch.Tensor, packed: torch.Tensor, block_scale: torch.Tensor,
    tensor_scale: torch.Tensor, bias: torch.Tensor | None,
) -> torch.Tensor:
    """x W^T + b with W dequantised inside the product: for few rows, which only read W.

    Args:
        x: (M, K) bf16 or fp16.
        packed, block_scale: as of :func:`expand_fp4`.
        tensor_scale: fp32, one element.
        bias: (N,) or None.

    Returns:
        (M, N) in the type of ``x``; activations are not quantised.
    """
    if x.is_cuda:
        from wan_models.quant import fp4_triton

        return fp4_triton.run_few_rows(x, packed, block_scale, tensor_scale, bias)
    weight = dequantize_nvfp4(Nvfp4(packed, block_scale, tensor_scale))
    out = x.float() @ weight.t()
    return (out if bias is None else out + bias.float()).to(x.dtype)


@fp4_few_rows.register_fake
def _(
    x: torch.Tensor, packed: torch.Tensor, block_scale: torch.Tensor,
    tensor_scale: torch.Tensor, bias: torch.Tensor | None,
) -> torch.Tensor:
    return x.new_empty((x.shape[0], packed.shape[0]))


@torch.library.custom_op("wan_models::fp4_weight_linear", mutates_args=())
def fp4_weight_linear(
    x: torch.Tensor, packed: torch.Tensor, block_scale: torch.Tensor,
    tensor_scale: torch.Tensor, bias: torch.Tensor | None,
) -> torch.Tensor:
    """x W^T + b, by :func:`fp4_few_rows` up to :data:`FEW_ROWS` rows; from there on W becomes e4m3
    and x is quantised by row.

    One op for both, since a choice made while tracing would be a guard on the number of rows.
    Arguments and result as of :func:`fp4_few_rows`.
    """
    if x.shape[0] <= FEW_ROWS:
        return fp4_few_rows(x, packed, block_scale, tensor_scale, bias)
    return rows_linear(
        rows_of(x), expand_fp4(packed, block_scale), expanded_scale(tensor_scale), bias
    )


@fp4_weight_linear.register_fake
def _(
    x: torch.Tensor, packed: torch.Tensor, block_scale: torch.Tensor,
    tensor_scale: torch.Tensor, bias: torch.Tensor | None,
) -> torch.Tensor:
    return x.new_empty((x.shape[0], packed.shape[0]))


_SOURCE = "wan_models/quant/fp4_triton.py reads this as one dense matrix"
_MATRIX = (Dense("row"), AlignedPointer(16))
bind("wan_models::expand_fp4", ("packed", "block_scale"), _MATRIX, _SOURCE)
for _op in ("wan_models::fp4_few_rows", "wan_models::fp4_weight_linear"):
    bind(_op, ("packed", "block_scale"), _MATRIX, _SOURCE)
    bind(_op, ("bias",), _MATRIX, _SOURCE)
    bind(_op, ("x",), (UnitStrideLast(), AlignedPointer(16)),
         "wan_models/quant/fused_triton.py reads rows by vectors of 16 bytes")
