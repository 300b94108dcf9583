"""Self-attention in 8 bits from the projections on, with norms and rotary in the quantisation.

What :class:`wan_models.attention.WanSelfAttention` computes between its projections in mode
``"fp8"``, as one op: RMS norm of q and k over all heads, rotary, and
:func:`wan_models.attention.fp8.run`, with v in 8 bits already
(:mod:`wan_models.attention.fp8_values`). No q or k in 16 bits is written; norm and rotary are fp32,
but for the rotary table, which is fp16, where the steps by themselves round to 16 bits three times.
So the two agree within rounding, which 8 bits make visible: results differ by half of what either
differs from exact attention.
"""

from __future__ import annotations

import torch

from contig_pass import AlignedPitch, AlignedPointer, Dense, UnitStrideLast
from wan_models.attention import fp8_values
from wan_models.attention.checks import check_lengths
from wan_models.attention.contracts import bind, check_unit_stride
from wan_models.attention.fp8_arithmetic import E4M3, HEAD_DIMS, padded, reference
from wan_models.rope import apply_rope


def run(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, norm_q_weight: torch.Tensor,
    norm_k_weight: torch.Tensor, rope: torch.Tensor, eps: float, k_lens: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of a layer's projections.

    Args:
        q, k, v: (B, L, H * D), of one dtype, last dimensions unit-stride, D one of
            :data:`wan_models.attention.fp8_arithmetic.HEAD_DIMS`.
        norm_q_weight, norm_k_weight: (H * D,) of the RMS norms.
        rope: (2, L', 1, D/2), or (2, B, L', 1, D/2), of :mod:`wan_models.rope`; tokens from L' on
            are not turned.
        eps: of the norms.
        k_lens: (B,) valid tokens; a sample without any gives zeros.

    Returns:
        (B, L, H, D) dense, in the dtype of q.

    Raises:
        ValueError: shapes that do not fit one another, or a last dimension that is not unit-stride.
    """
    if v.shape != q.shape or v.dtype != q.dtype:
        raise ValueError(
            f"fp8 self-attention: v {tuple(v.shape)} of {v.dtype} must be as q {tuple(q.shape)} of "
            f"{q.dtype} is"
        )
    _check_shapes(q, k, norm_q_weight, norm_k_weight, rope)
    values = fp8_values.run(v, 2 * rope.shape[-1], k_lens)
    return attend(q, k, *values, norm_q_weight, norm_k_weight, rope, eps, k_lens)


def attend(
    q: torch.Tensor, k: torch.Tensor, values: torch.Tensor, scales: torch.Tensor,
    norm_q_weight: torch.Tensor, norm_k_weight: torch.Tensor, rope: torch.Tensor, eps: float,
    k_lens: torch.Tensor | None,
) -> torch.Tensor:
    """:func:`run`, with what :func:`wan_models.attention.fp8_values.run` made of v by the same
    ``k_lens``."""
    _check_shapes(q, k, norm_q_weight, norm_k_weight, rope)
    _check_values(q, values, scales, 2 * rope.shape[-1])
    check_lengths(k_lens, *q.shape[:2])
    lengths = None if k_lens is None else k_lens.to(k.device)
    weights = norm_q_weight, norm_k_weight
    return fp8_self_attention(q, k, values, scales, *weights, rope, eps, lengths)


@torch.library.custom_op("wan_models::fp8_self_attention", mutates_args=())
def fp8_self_attention(
    q: torch.Tensor, k: torch.Tensor, values: torch.Tensor, scales: torch.Tensor,
    norm_q_weight: torch.Tensor, norm_k_weight: torch.Tensor, rope: torch.Tensor, eps: float,
    k_lens: torch.Tensor | None,
) -> torch.Tensor:
    """The op behind :func:`attend`; ``k_lens`` on the device of k."""
    weights = norm_q_weight, norm_k_weight
    check_unit_stride("fp8", q=q, k=k, norm_q_weight=weights[0], norm_k_weight=weights[1])
    _check_dense(values=values, scales=scales)
    q_heads, k_heads = (x.unflatten(-1, (-1, 2 * rope.shape[-1])) for x in (q, k))
    if q.device.type == "cuda":
        from wan_models.attention import fp8_operands, fp8_triton

        producer = fp8_operands.Producer(*weights, rope, eps)
        return fp8_triton.forward_narrow(q_heads, k_heads, (values, scales), k_lens, producer)
    v_heads = fp8_values.restored(values, scales, *q.shape[:2])
    return fused_reference(q_heads, k_heads, v_heads, *weights, rope, eps, k_lens)


@fp8_self_attention.register_fake
def _fake(
    q: torch.Tensor, k: torch.Tensor, values: torch.Tensor, scales: torch.Tensor,
    norm_q_weight: torch.Tensor, norm_k_weight: torch.Tensor, rope: torch.Tensor, eps: float,
    k_lens: torch.Tensor | None,
) -> torch.Tensor:
    size = 2 * rope.shape[-1]
    return q.new_empty((q.shape[0], q.shape[1], q.shape[2] // size, size))


def fused_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, norm_q_weight: torch.Tensor,
    norm_k_weight: torch.Tensor, rope: torch.Tensor, eps: float, k_lens: torch.Tensor | None,
    **options: int,
) -> torch.Tensor:
    """The kernels' arithmetic in plain torch, on any device.

    Args:
        q, k, v: (B, L, H, D), projections; v of any dtype.
        options: of :func:`wan_models.attention.fp8_arithmetic.reference`.

    Returns:
        (B, L, H, D) dense, in the dtype of q.
    """
    table = rope.half().float()
    factors = [_factors(x, eps) for x in (q, k)]
    weights = [w.float().unflatten(-1, q.shape[-2:]) for w in (norm_q_weight, norm_k_weight)]
    turned_q = apply_rope(q.float() * weights[0], table)
    turned_k = apply_rope(k.float() * factors[1][..., None, None] * weights[1], table)
    out = reference(turned_q, turned_k, v, k_lens, q_factors=factors[0], **options)
    return out.to(q.dtype)


def _factors(x: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / rms over H and D of x (B, L, H, D): (B, L) fp32."""
    return 1 / (x.float().square().mean((-2, -1)) + eps).sqrt()


def _check_shapes(
    q: torch.Tensor, k: torch.Tensor, norm_q_weight: torch.Tensor, norm_k_weight: torch.Tensor,
    rope: torch.Tensor,
) -> None:
    if q.dim() != 3 or q.shape != k.shape:
        raise ValueError(
            f"fp8 self-attention: q {tuple(q.shape)} and k {tuple(k.shape)} must be (B, L, H * D), "
            "both alike"
        )
    if q.dtype != k.dtype:
        raise ValueError(
            f"fp8 self-attention: q and k must share a dtype, got {q.dtype} and {k.dtype}"
        )
    width, size = q.shape[-1], 2 * rope.shape[-1]
    if size not in HEAD_DIMS or width % size:
        raise ValueError(
            f"fp8 self-attention: the rotary table is for heads of {size}: use one for heads of "
            f"{' or '.join(map(str, HEAD_DIMS))} that divide the {width} channels of q"
        )
    if rope.shape[-3] > q.shape[1]:
        raise ValueError(
            f"rotary table is for {rope.shape[-3]} tokens of head dimension {size}, got "
            f"{q.shape[1]} tokens of {size}"
        )
    for name, weight in (("norm_q_weight", norm_q_weight), ("norm_k_weight", norm_k_weight)):
        if weight.shape != (width,):
            raise ValueError(
                f"fp8 self-attention: {name} has shape {tuple(weight.shape)}: use ({width},)"
            )


def _check_dense(**tensors: torch.Tensor) -> None:
    """Raise a ValueError of one line unless each lies as a kernel that knows its shape assumes."""
    for name, tensor in tensors.items():
        expected = torch.empty(tensor.shape, device="meta").stride()
        if tensor.stride() != expected:
            raise ValueError(
                f"attention mode 'fp8': {name} must be dense, with strides {expected}, got "
                f"{tensor.stride()}"
            )


def _check_values(
    q: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, size: int
) -> None:
    planes = q.shape[0] * (q.shape[2] // size)
    expected = (planes, size, padded(q.shape[1]))
    if values.shape != expected or scales.shape != expected[:2]:
        raise ValueError(
            f"fp8 self-attention: values {tuple(values.shape)} and scales {tuple(scales.shape)} "
            f"must be {expected} and {expected[:2]} for q {tuple(q.shape)} and heads of {size}"
        )
    if values.dtype != E4M3 or scales.dtype != torch.float32:
        raise ValueError(
            f"fp8 self-attention: values and scales must be of {E4M3} and torch.float32, got "
            f"{values.dtype} and {scales.dtype}"
        )


bind(
    "wan_models::fp8_self_attention", ("q", "k"),
    (UnitStrideLast(), AlignedPointer(16), AlignedPitch(16)),
    "wan_models/attention/fp8_quantise.py reads rows of channels by vectors of 16 bytes; off those "
    "Triton compiles a kernel that reads single elements",
)
bind(
    "wan_models::fp8_self_attention", ("values",), (Dense("0,1,2"), AlignedPointer(16)),
    "wan_models/attention/fp8_triton.py goes by its shape alone; TMA descriptors take addresses "
    "that are multiples of 16 bytes",
)
bind(
    "wan_models::fp8_self_attention", ("scales",), (Dense("0,1"),),
    "wan_models/attention/fp8_triton.py goes by its shape alone",
)
bind(
    "wan_models::fp8_self_attention", ("norm_q_weight", "norm_k_weight"), (UnitStrideLast(),),
    "wan_models/attention/fp8_quantise.py reads the weights of neighbouring channels side by side",
)
