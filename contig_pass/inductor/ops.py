"""The two ops that a repaired graph is made of.

``contig_pass::contiguous(x, order)`` is a fresh, aligned, dense copy of ``x`` with its dimensions
in a named order. ``contig_pass::pin(x, alignment)`` is ``x`` itself, with the compiler held to
the layout that ``x`` has in the graph; it copies only where lowering broke that layout. Both run
eagerly as well, so that a repaired graph can be executed, exported and constant-folded anywhere.
"""

from __future__ import annotations

import torch

from contig_pass.contracts.rules import parse_order
from contig_pass.layout import dense_strides

_LIBRARY = torch.library.Library("contig_pass", "DEF")
_TAGS = (torch.Tag.flexible_layout, torch.Tag.pt2_compliant_tag)
_LIBRARY.define("contiguous(Tensor x, str order) -> Tensor", tags=_TAGS)
_LIBRARY.define("pin(Tensor(a) x, int alignment) -> Tensor(a)", tags=_TAGS)


def empty_in_order(
    x: torch.Tensor, order: str, device: torch.device | str | None = None
) -> torch.Tensor:
    """An uninitialised dense tensor like ``x``, on ``device``, with its dimensions in ``order``."""
    strides = dense_strides(x.shape, parse_order(order, x.dim()))
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=device or x.device)


def _contiguous(x: torch.Tensor, order: str) -> torch.Tensor:
    return empty_in_order(x, order).copy_(x)


def _pin(x: torch.Tensor, alignment: int) -> torch.Tensor:
    del alignment  # eager memory lies as the graph says
    return torch.ops.aten.alias.default(x)


_LIBRARY.impl("contiguous", _contiguous, "CompositeExplicitAutograd")
_LIBRARY.impl("pin", _pin, "CompositeExplicitAutograd")
torch.library.register_fake("contig_pass::contiguous", empty_in_order, lib=_LIBRARY)
torch.library.register_fake("contig_pass::pin", _pin, lib=_LIBRARY)


def contiguous_op() -> torch._ops.OpOverload:
    """``contig_pass::contiguous(Tensor x, str order) -> Tensor``."""
    return torch.ops.contig_pass.contiguous.default


def pin_op() -> torch._ops.OpOverload:
    """``contig_pass::pin(Tensor(a) x, int alignment) -> Tensor(a)``."""
    return torch.ops.contig_pass.pin.default
