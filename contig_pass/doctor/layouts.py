"""Layouts to try an operand in: broken on purpose, and their legal neighbours.

Which of them are legal is for the contract to say; this file only knows ways to lie in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from contig_pass.contracts.rules import AlignedPitch, AlignedPointer, Rule
from contig_pass.layout import ABSOLUTE, Layout, dense_strides

#: Bytes that a planted operand's base is a multiple of, as a fresh CUDA allocation's is.
BASE = 512
_BYTES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Lie:
    """One way for a tensor to lie in memory.

    Attributes:
        words: what is special about it.
        strides: in elements.
        offset: bytes from an aligned base to the first element.
    """

    words: str
    strides: tuple[int, ...]
    offset: int = 0

    def layout(self, value: torch.Tensor) -> Layout:
        """The layout that ``value`` has when it lies so."""
        return Layout(
            tuple(value.shape), self.strides, self.offset, ABSOLUTE, value.dtype, value.device
        )


def lies(value: torch.Tensor, rules: Sequence[Rule]) -> Iterator[Lie]:
    """Ways to lie for an operand that is as its contract wants it in ``value``.

    Args:
        value: dense, in the order of dimensions that the op takes.
        rules: the contract's; they say up to which power of two offsets and pitches are tried.
    """
    strides, item = tuple(value.stride()), value.element_size()
    pointer, pitch = _asked(rules, AlignedPointer, item), _asked(rules, AlignedPitch, item)
    for nbytes in (*_powers(item, pointer), pointer):
        yield Lie(f"pointer off by {nbytes} B", strides, nbytes)
    # Dimensions of one element have no say in any of what follows.
    free = [d for d in Layout.of(value).dim_order() or () if value.shape[d] > 1]
    if not free:
        return
    yield Lie("inner stride 2", _scaled(strides, free, 2))
    if len(free) == 1:
        yield Lie("expanded from one element", _with(strides, {free[0]: 0}))
        return
    for nbytes in (*_powers(item, pitch), pitch):
        yield Lie(f"pitch {nbytes} B longer", _padded(value, free, free[-2], nbytes // item))
    if len(free) > 2:
        outer = _padded(value, free, free[0], 1)
        yield Lie(f"outermost stride {item} B longer", outer)
    yield Lie("outermost dimension expanded", _with(strides, {free[0]: 0}))
    if len(free) == 2 and value.shape[free[1]] > 16:
        yield Lie("rows that overlap", _padded(value, free, free[0], -16))
    yield from _reordered(value, free)


def _reordered(value: torch.Tensor, free: Sequence[int]) -> Iterator[Lie]:
    """Dense, with the dimensions in another order."""
    order = list(Layout.of(value).dim_order() or range(value.dim()))
    inner, major = order.index(free[-1]), order.index(free[-2])
    swapped = list(order)
    swapped[inner], swapped[major] = swapped[major], swapped[inner]
    yield Lie("inner two dimensions swapped", dense_strides(value.shape, swapped))
    if value.dim() == 4 and len(free) == 4:
        turned = [order[0], order[2], order[1], order[3]]
        yield Lie("middle dimensions swapped", dense_strides(value.shape, turned))


def _asked(rules: Sequence[Rule], kind: type[Rule], item: int) -> int:
    """The alignment that a rule of ``kind`` asks for, at least an element's size."""
    return max([item, *(rule.nbytes for rule in rules if isinstance(rule, kind))])


def _powers(least: int, below: int) -> list[int]:
    return [1 << n for n in range(below.bit_length()) if least <= 1 << n < below]


def _scaled(strides: tuple[int, ...], free: Sequence[int], factor: int) -> tuple[int, ...]:
    return _with(strides, {d: strides[d] * factor for d in free})


def _padded(value: torch.Tensor, free: Sequence[int], dim: int, by: int) -> tuple[int, ...]:
    """The stride of ``dim`` longer by so many elements, and those outside of it in step."""
    changed: dict[int, int] = {}
    step = 0
    for d in reversed(free):
        if d == dim:
            changed[d] = step = value.stride(d) + by
        elif step:
            changed[d] = step
        step *= value.shape[d]
    return _with(tuple(value.stride()), changed)


def _with(strides: tuple[int, ...], changed: dict[int, int]) -> tuple[int, ...]:
    return tuple(changed.get(d, stride) for d, stride in enumerate(strides))


# -- memory --------------------------------------------------------------------------------------


def plant(value: torch.Tensor, lie: Lie) -> torch.Tensor:
    """``value`` as ``lie`` has it. What lies between its elements is zero.

    Where elements share memory the values are those that ``value``'s first elements fill it with.
    """
    item = value.element_size()
    extent = 1 + sum((n - 1) * s for n, s in zip(value.shape, lie.strides, strict=True))
    raw = torch.zeros(
        lie.offset + extent * item + 2 * BASE, dtype=torch.uint8, device=value.device
    )
    start = -raw.data_ptr() % BASE + lie.offset
    flat = raw[start : start + extent * item].view(value.dtype)
    planted = flat.as_strided(value.shape, lie.strides)
    if lie.layout(value).overlaps():
        memory = value.as_strided((value.numel(),), (1,))
        _bytes(flat).copy_(_bytes(memory)[:extent])
    else:
        _bytes(planted).copy_(_bytes(value))
    return planted


def dense_like(planted: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The values of ``planted`` in fresh memory, as ``value`` lies."""
    dense = torch.empty_strided(
        value.shape, value.stride(), dtype=value.dtype, device=value.device
    )
    _bytes(dense).copy_(_bytes(planted))
    return dense


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """As integers: not every type can be copied, and integers are copied bit by bit."""
    return tensor.view(_BYTES[tensor.element_size()])
