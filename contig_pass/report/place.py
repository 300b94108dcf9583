"""One state of an operand's memory, as reports tell it."""

from __future__ import annotations

from dataclasses import dataclass

from contig_pass.layout import IntLike, Layout


@dataclass(frozen=True)
class Place:
    """One state of an operand's memory.

    Attributes:
        strides: in elements; symbolic ones as text.
        offset: bytes from the start of its memory (for a graph input: from the input's first
            element, which is realigned at run time); symbolic as text.
        alignment: largest power of two up to 64 that the address is known to be a multiple of.
    """

    strides: tuple[int | str, ...]
    offset: int | str
    alignment: int

    @classmethod
    def of(cls, layout: Layout) -> Place:
        """The place that ``layout`` describes."""
        offset = plain_int(layout.byte_offset)
        return cls(plain(layout.strides), offset, layout.known_alignment())


def plain(values: tuple[IntLike, ...]) -> tuple[int | str, ...]:
    """Numbers as they are, symbolic ones as text."""
    return tuple(plain_int(value) for value in values)


def plain_int(value: IntLike) -> int | str:
    """A number as it is, a symbolic one as text."""
    return value if isinstance(value, int) else str(value)
