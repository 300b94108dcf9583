"""What the attention ops demand of memory, and what they promise of theirs."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch

from contig_pass import (
    AlignedPitch,
    AlignedPointer,
    ContigPassError,
    Rule,
    UnitStrideLast,
    register_contract,
    unregister_contract,
)

#: What kernels that load 16 bytes at a time, or by TMA descriptors, demand of q, k and v.
VECTORS = (UnitStrideLast(), AlignedPointer(16), AlignedPitch(16))


def bind(op: str, operands: Sequence[str], rules: Sequence[Rule], source: str) -> None:
    """Register ``rules`` for each of ``operands`` of ``op``, in place of what stood there.

    A module that is loaded anew defines its ops anew, and its contracts with them; registering
    twice would be refused.

    Args:
        op: ``"wan_models::name"``.
        operands: names as in the op's schema.
        rules: what each must satisfy.
        source: where the demand comes from.
    """
    for operand in operands:
        with contextlib.suppress(ContigPassError):  # the first time there is none to remove
            unregister_contract(op, operand)
        register_contract(op, operand, rules, source=source)


def check_unit_stride(mode: str, **tensors: torch.Tensor) -> None:
    """Raise a ValueError of one line unless every last dimension is unit-stride.

    In a graph compiled under ``contig_safe`` the contract sees to it; eagerly only the caller can.
    """
    for name, tensor in tensors.items():
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(
                f"attention mode {mode!r}: the last dimension of {name} must be unit-stride, got "
                f"strides {tensor.stride()}"
            )


def check_vectors(mode: str, **tensors: torch.Tensor) -> None:
    """Raise a ValueError of one line unless each operand is as :data:`VECTORS` demands."""
    check_unit_stride(mode, **tensors)
    for name, tensor in tensors.items():
        size = tensor.element_size()
        pitches = [
            stride * size for n, stride in zip(tensor.shape[:-1], tensor.stride(), strict=False)
            if n > 1
        ]
        if tensor.numel() and any(number % 16 for number in (tensor.data_ptr(), *pitches)):
            raise ValueError(
                f"attention mode {mode!r}: {name} is misaligned: its address and pitches must be "
                f"multiples of 16 bytes, got address {tensor.data_ptr()} and strides "
                f"{tensor.stride()} of {size} bytes"
            )


def dense(out: torch.Tensor) -> torch.Tensor:
    """``out``, or its values in fresh dense memory: for kernels whose results lie one way in one
    version and another in the next, while a fake can promise one way alone."""
    return out if out.is_contiguous() else out.new_empty(out.shape).copy_(out)
