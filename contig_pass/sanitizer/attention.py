"""Which operand's layout keeps an attention call from a fused kernel.

The kernel is chosen before anything is dispatched, by strides among other things. Whether a
layout is to blame is found by asking again with operands of the same shape that are dense.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.attention import SDPBackend

#: Operands of attention whose layout the choice looks at, in the order of the arguments.
OPERANDS = ("query", "key", "value", "attn_mask")

#: No kernel takes the call: those that would are not allowed.
NONE = None


def chosen(tensors: Sequence[torch.Tensor | None], rest: Mapping[str, Any]) -> int | None:
    """The backend of ``torch.nn.attention.SDPBackend`` that takes the call, or :data:`NONE`.

    Args:
        tensors: query, key, value and mask.
        rest: the other arguments by name.
    """
    try:
        return int(torch.ops.aten._fused_sdp_choice.default(*tensors, **rest))
    except RuntimeError:
        return NONE


def is_fused(backend: int | None) -> bool:
    """Whether a fused kernel takes the call."""
    return backend is not NONE and backend != SDPBackend.MATH.value


def to_blame(tensors: Sequence[torch.Tensor | None], rest: Mapping[str, Any]) -> tuple[str, ...]:
    """The operands whose layout alone keeps the call from a fused kernel.

    Empty if the call gets none however its operands lie.
    """
    dense = [t if t is None else _dense(t) for t in tensors]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # why each kernel does not take what is only asked about
        return _guilty(tensors, dense, rest)


def _guilty(
    tensors: Sequence[torch.Tensor | None],
    dense: Sequence[torch.Tensor | None],
    rest: Mapping[str, Any],
) -> tuple[str, ...]:
    if not is_fused(chosen(dense, rest)):
        return ()
    guilty = []
    for position, tensor in enumerate(tensors):
        one = [*dense[:position], tensor, *dense[position + 1 :]]
        if tensor is not None and not is_fused(chosen(one, rest)):
            guilty.append(OPERANDS[position])
    # Each is taken beside dense ones, and all together are not.
    given = [name for name, tensor in zip(OPERANDS, tensors, strict=True) if tensor is not None]
    return tuple(guilty or given)


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """Dense memory of the same shape: the choice reads no values."""
    return torch.empty(
        tensor.shape, dtype=tensor.dtype, device=tensor.device, requires_grad=tensor.requires_grad
    )
