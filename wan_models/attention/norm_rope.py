"""RMS norm and rotary of a projection in one pass, for attention that takes q and k in 16 bits.

Norm and rotary are fp32 throughout, where the steps by themselves round to 16 bits three times; so
the two agree within rounding.
"""

from __future__ import annotations

import torch

from contig_pass import AlignedPointer, Dense, UnitStrideLast
from wan_models.attention.contracts import bind, check_unit_stride, dense
from wan_models.attention.fp16 import narrowed, score_factor
from wan_models.quant.fused import scaled
from wan_models.rope import apply_rope


@torch.library.custom_op("wan_models::norm_rope", mutates_args=())
def norm_rope(
    x: torch.Tensor, weight: torch.Tensor, rope: torch.Tensor, eps: float,
    scale: bool = False, dtype: torch.dtype | None = None,
    row_scale: torch.Tensor | None = None, column_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x / rms(x) * weight over all heads, then the pairs of each head turned.

    Args:
        x: (B, L, H * D).
        weight: (H * D,).
        rope: (2, L', 1, D/2), or (2, B, L', 1, D/2), of :mod:`wan_models.rope`, fp32; tokens from
            L' on are not turned.
        eps: of the norm.
        scale: multiply by log2(e) / sqrt(D), as queries of :mod:`wan_models.attention.fp16` are.
        dtype: of the result, if it is not that of x; the numbers are rounded to that of x all the
            same: the zeros at the end of a bf16 number save a product in fp16 power and so time.
            What does not fit fp16 is NaN there.
        row_scale, column_scale, bias: where x is the sums of a
            :class:`wan_models.quant.rows.Deferred` product, the rest of it.

    Returns:
        (B, L, H, D) dense.
    """
    check_unit_stride("norm_rope", weight=weight, rope=rope)
    if x.is_cuda:
        from wan_models.attention import norm_rope_triton

        return norm_rope_triton.run(
            x, weight, rope, eps, scale, dtype, row_scale, column_scale, bias
        )
    wide = scaled(x, row_scale, column_scale, bias)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()
    turned = apply_rope(normed.unflatten(-1, (-1, 2 * rope.shape[-1])), rope)
    if scale:
        turned = turned * score_factor(turned.shape[-1])
    turned = turned.to(x.dtype)
    return dense(narrowed(turned) if dtype == torch.float16 else turned.to(dtype or x.dtype))


@norm_rope.register_fake
def _(
    x: torch.Tensor, weight: torch.Tensor, rope: torch.Tensor, eps: float,
    scale: bool = False, dtype: torch.dtype | None = None, *_: torch.Tensor | None,
) -> torch.Tensor:
    size = 2 * rope.shape[-1]
    return x.new_empty((x.shape[0], x.shape[1], x.shape[2] // size, size), dtype=dtype or x.dtype)


def fits(width: int, rope: torch.Tensor, heads: int, tokens: int) -> bool:
    """Whether ``rope`` is for heads that make up ``width``, and for no more tokens than there are.
    """
    return width == heads * 2 * rope.shape[-1] and rope.shape[-3] <= tokens


bind(
    "wan_models::norm_rope", ("x",), (UnitStrideLast(), AlignedPointer(16)),
    "wan_models/attention/norm_rope_triton.py reads rows by vectors of 16 bytes",
)
bind(
    "wan_models::norm_rope", ("weight", "rope"), (UnitStrideLast(),),
    "wan_models/attention/norm_rope_triton.py reads neighbouring numbers side by side",
)
bind(
    "wan_models::norm_rope", ("row_scale", "column_scale", "bias"), (Dense("row"),),
    "wan_models/attention/norm_rope_triton.py reads this as one dense vector",
)
