"""The ops that a repaired graph is made of.

``contig_pass::contiguous(x, order)`` is a fresh, aligned, dense copy of ``x`` with its dimensions
in a named order, or with the strides of ``x`` where the order is ``"strides"``.
``contig_pass::pin(x, alignment)`` is ``x`` itself, with the compiler held to the layout that ``x``
has in the graph; it copies only where lowering broke that layout. ``contig_pass::checked(x,
alignment)`` looks at the address at run time and copies where it is not aligned: for memory that
an opaque op allocated. All run eagerly as well, so that a repaired graph can be executed, exported
and constant-folded anywhere.
"""

from __future__ import annotations

from typing import Any

import torch

from contig_pass.contracts.rules import STRIDES, parse_order
from contig_pass.layout import dense_strides

_LIBRARY = torch.library.Library("contig_pass", "DEF")
_TAGS = (torch.Tag.flexible_layout, torch.Tag.pt2_compliant_tag)
_LIBRARY.define("contiguous(Tensor x, str order) -> Tensor", tags=_TAGS)
_LIBRARY.define("checked(Tensor(a) x, int alignment) -> Tensor(a)", tags=_TAGS)
_LIBRARY.define("pin(Tensor(a) x, int alignment) -> Tensor(a)", tags=_TAGS)


def empty_in_order(
    x: torch.Tensor, order: str, device: torch.device | str | None = None
) -> torch.Tensor:
    """An uninitialised tensor like ``x``, on ``device``, with its dimensions in ``order``."""
    if order == STRIDES:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device or x.device)
    strides = dense_strides(x.shape, parse_order(order, x.dim()))
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=device or x.device)


def _contiguous(x: torch.Tensor, order: str) -> torch.Tensor:
    if order == STRIDES:
        return copy_with_strides(x)
    return empty_in_order(x, order).copy_(x)


def _contiguous_backward(context: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
    del context
    return grad, None


def copy_with_strides(x: torch.Tensor) -> torch.Tensor:
    """A fresh copy with the same strides; it spans the same extent, gaps and overlaps included."""
    if x.numel() == 0:
        return empty_in_order(x, STRIDES)
    extent = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    flat = torch.as_strided(x, (extent,), (1,)).clone()
    return torch.as_strided(flat, x.shape, x.stride())


def _checked(x: torch.Tensor, alignment: int) -> torch.Tensor:
    if x.data_ptr() % alignment == 0:
        return torch.ops.aten.alias.default(x)
    return copy_with_strides(x)


def _pin(x: torch.Tensor, alignment: int) -> torch.Tensor:
    del alignment  # eager memory lies as the graph says
    return torch.ops.aten.alias.default(x)


_LIBRARY.impl("contiguous", _contiguous, "CompositeExplicitAutograd")
_LIBRARY.impl("checked", _checked, "CompositeExplicitAutograd")
_LIBRARY.impl("pin", _pin, "CompositeExplicitAutograd")
torch.library.register_fake("contig_pass::contiguous", empty_in_order, lib=_LIBRARY)
torch.library.register_fake(
    "contig_pass::checked", lambda x, alignment: empty_in_order(x, STRIDES), lib=_LIBRARY
)
torch.library.register_autograd("contig_pass::contiguous", _contiguous_backward, lib=_LIBRARY)
torch.library.register_fake("contig_pass::pin", _pin, lib=_LIBRARY)


def contiguous_op() -> torch._ops.OpOverload:
    """``contig_pass::contiguous(Tensor x, str order) -> Tensor``."""
    return torch.ops.contig_pass.contiguous.default


def checked_op() -> torch._ops.OpOverload:
    """``contig_pass::checked(Tensor(a) x, int alignment) -> Tensor(a)``."""
    return torch.ops.contig_pass.checked.default


def pin_op() -> torch._ops.OpOverload:
    """``contig_pass::pin(Tensor(a) x, int alignment) -> Tensor(a)``."""
    return torch.ops.contig_pass.pin.default
