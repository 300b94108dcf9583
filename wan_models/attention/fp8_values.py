"""v of a layer's projection in 8 bits, as one op: what 8-bit self-attention takes in v's place.

By itself, because then v in 16 bits is done with before q and k are projected: it would be the
largest of what the attention keeps alive beside them.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from contig_pass import AlignedPitch, AlignedPointer, UnitStrideLast
from wan_models.attention.checks import check_lengths
from wan_models.attention.contracts import bind, check_unit_stride
from wan_models.attention.fp8_arithmetic import E4M3, HEAD_DIMS, padded, quantise_values


def run(
    v: torch.Tensor, size: int, k_lens: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """v in e4m3 by channel, with tokens together.

    Args:
        v: (B, S, H * D), last dimension unit-stride.
        size: D, one of :data:`wan_models.attention.fp8_arithmetic.HEAD_DIMS`.
        k_lens: (B,) valid tokens; those beyond become zeros and count in no scale.

    Returns:
        Values (B * H, D, S') e4m3 with S' as of
        :func:`wan_models.attention.fp8_arithmetic.padded`, zeros from S on; scales (B * H, D) fp32,
        NaN for a channel with a valid token that is not finite.

    Raises:
        ValueError: a shape that does not fit, or a last dimension that is not unit-stride.
    """
    if v.dim() != 3 or size not in HEAD_DIMS or v.shape[2] % size:
        raise ValueError(
            f"fp8 values: v has shape {tuple(v.shape)} for heads of {size}: use (B, S, H * D) for "
            f"heads of {' or '.join(map(str, HEAD_DIMS))}"
        )
    check_lengths(k_lens, *v.shape[:2])
    return fp8_values(v, size, None if k_lens is None else k_lens.to(v.device))


@torch.library.custom_op("wan_models::fp8_values", mutates_args=())
def fp8_values(
    v: torch.Tensor, size: int, k_lens: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The op behind :func:`run`; ``k_lens`` on the device of v."""
    check_unit_stride("fp8", v=v)
    heads = v.unflatten(-1, (-1, size))
    if v.device.type == "cuda":
        from wan_models.attention import fp8_operands

        return fp8_operands.quantise_values(heads, k_lens)
    tokens = v.shape[1]
    values, scales = quantise_values(heads, k_lens)
    rows = F.pad(values.transpose(-1, -2), (0, padded(tokens) - tokens))
    return rows.flatten(0, 1).to(E4M3), scales.flatten(0, 2)


@fp8_values.register_fake
def _fake(
    v: torch.Tensor, size: int, k_lens: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    planes = v.shape[0] * (v.shape[2] // size)
    values = v.new_empty((planes, size, padded(v.shape[1])), dtype=E4M3)
    return values, v.new_empty((planes, size), dtype=torch.float32)


def restored(
    values: torch.Tensor, scales: torch.Tensor, batch: int, tokens: int
) -> torch.Tensor:
    """v (B, S, H, D) fp32 of what :func:`run` made of it; in 8 bits again it gives the same."""
    wide = values.float() * scales[..., None]
    return wide[..., :tokens].unflatten(0, (batch, -1)).permute(0, 3, 1, 2)


bind(
    "wan_models::fp8_values", ("v",), (UnitStrideLast(), AlignedPointer(16), AlignedPitch(16)),
    "wan_models/attention/fp8_quantise.py reads rows of channels by vectors of 16 bytes; off those "
    "Triton compiles a kernel that reads single elements",
)
