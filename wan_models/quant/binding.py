"""What the quantising ops demand of memory, stated as contracts and checked in eager mode."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch

from contig_pass import ContigPassError, Rule, register_contract, unregister_contract


def bind(op: str, operands: Sequence[str], rules: Sequence[Rule], source: str) -> None:
    """Register ``rules`` for each of ``operands`` of ``op``, in place of what stood there.

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


def check_unit_stride(op: str, **tensors: torch.Tensor | None) -> None:
    """Raise a ValueError of one line unless every last dimension is unit-stride.

    In a graph compiled under ``contig_safe`` the contract sees to it; eagerly only the caller can.
    """
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(
                f"{op}: the last dimension of {name} must be unit-stride, got strides "
                f"{tensor.stride()}"
            )
