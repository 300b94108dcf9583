"""What stands between two linears of a block, made in the form that the second one reads.

Where all readers of a normed state take quantised rows, the state is made as such in one pass, and
once for all of them; else in 16 bits by the plain formulas.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from wan_models.layers import WanLayerNorm
from wan_models.quant.feed_forward import feed_forward
from wan_models.quant.fused import add_norm_quantise, norm_quantise
from wan_models.quant.linear import QuantizedLinear
from wan_models.quant.rows import QuantizedRows

Tensor = torch.Tensor
#: An activation, quantised or not.
State = Tensor | QuantizedRows


def all_take_rows(readers: Sequence[nn.Module]) -> bool:
    """Whether quantised rows serve every one of ``readers``."""
    return all(isinstance(reader, QuantizedLinear) and reader.takes_rows for reader in readers)


def normed(
    norm: WanLayerNorm, x: Tensor, shift: Tensor | None, scale: Tensor | None,
    readers: Sequence[nn.Module],
) -> State:
    """LN(x) * (1 + scale) + shift, for ``readers``.

    Args:
        norm: computed in fp32.
        x: (B, L, C).
        shift, scale: (B, 1 or L, C) fp32, or None for no modulation.
        readers: what reads the result.

    Returns:
        (B, L, C) in the type of ``x``, as quantised rows if all readers take them.
    """
    if all_take_rows(readers):
        made = norm_quantise(x, norm.weight, norm.bias, shift, scale, norm.constant_eps())
        return QuantizedRows(*made, x.dtype)
    y = norm(x)
    return y if shift is None else (y.float() * (1 + scale) + shift).to(x.dtype)


def add(x: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    """x + gate * branch, summed in fp32 and cast back; without a gate in the type of ``x``."""
    if gate is None:
        return x + branch
    return (x.float() + branch.float() * gate).to(x.dtype)


def add_normed(
    x: Tensor, branch: Tensor, gate: Tensor | None,
    norm: WanLayerNorm, shift: Tensor | None, scale: Tensor | None,
    readers: Sequence[nn.Module],
) -> tuple[Tensor, State]:
    """:func:`add`, and :func:`normed` of the sum; in one pass where readers take quantised rows.

    Args:
        x, branch: (B, L, C).
        gate: (B, 1 or L, C) fp32, or None for 1.
        norm, shift, scale, readers: as of :func:`normed`.
    """
    if not all_take_rows(readers):
        total = add(x, branch, gate)
        return total, normed(norm, total, shift, scale, readers)
    total, *made = add_norm_quantise(
        x, branch, gate, norm.weight, norm.bias, shift, scale, norm.constant_eps()
    )
    return total, QuantizedRows(*made, x.dtype)


def fed(ffn: nn.Sequential, x: State) -> Tensor:
    """Linear, tanh-approximated GELU, Linear of ``x`` (B, L, C)."""
    if isinstance(x, QuantizedRows) and all_take_rows((ffn[0], ffn[2])):
        return feed_forward(x, ffn[0], ffn[2])
    return ffn(x)
