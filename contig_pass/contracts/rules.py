"""Rules: one checkable demand each, on the layout of one operand.

A rule is a frozen dataclass with ``check(layout) -> True | False | None`` (``None``: not statically
known) and ``describe()``. ``order`` names the order that a copy must have to satisfy it, and
``by_copy`` says whether a fresh dense copy can satisfy it at all: a size cannot be repaired.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from contig_pass.errors import ContractError
from contig_pass.layout import FRESH_ALIGNMENT, Known, Layout, known

ROW = "row"
COLUMN = "column"
KEEP = "keep"
#: Order of a copy that keeps the strides, gaps included.
STRIDES = "strides"


@dataclass(frozen=True)
class Rule:
    """One demand on one operand. Subclasses say which."""

    #: Order that a repairing copy must have: ``"row"``, ``"column"``, or ``None`` for any.
    order: ClassVar[str | None] = None
    #: Whether a fresh, aligned, dense copy can satisfy the rule.
    by_copy: ClassVar[bool] = True

    def check(self, layout: Layout) -> Known:
        """Whether ``layout`` satisfies the rule; ``None`` where that is not statically known."""
        raise ContractError(f"{type(self).__name__} does not define check(layout)")

    def describe(self) -> str:
        """The demand in a few words, as reports print it."""
        raise ContractError(f"{type(self).__name__} does not define describe()")


@dataclass(frozen=True)
class RowMajor(Rule):
    """Last dimension unit-stride, rows apart by at least a row (padding between rows allowed).

    Args:
        size_one_counts: judge the strides of size-1 dimensions too, as ``_scaled_mm`` does.
    """

    order: ClassVar[str | None] = ROW
    size_one_counts: bool = False

    def check(self, layout: Layout) -> Known:
        return layout.row_major(ignore_size_one=not self.size_one_counts)

    def describe(self) -> str:
        return "row-major"


@dataclass(frozen=True)
class ColumnMajor(Rule):
    """Second-last dimension unit-stride, columns apart by at least a column.

    Args:
        size_one_counts: judge the strides of size-1 dimensions too, as ``_scaled_mm`` does.
    """

    order: ClassVar[str | None] = COLUMN
    size_one_counts: bool = False

    def check(self, layout: Layout) -> Known:
        return layout.column_major(ignore_size_one=not self.size_one_counts)

    def describe(self) -> str:
        return "column-major"


@dataclass(frozen=True)
class Dense(Rule):
    """The elements fill one block of memory, in any order of dimensions.

    Args:
        in_order: ``"row"`` or ``"column"`` to ask for that order of the last two dimensions too, or
            all dimensions from outermost to innermost, such as ``"0,2,1,3"``.
    """

    in_order: str | None = None

    def __post_init__(self) -> None:
        if self.in_order in (None, ROW, COLUMN):
            return
        listed = self.in_order.split(",")
        if sorted(listed) != [str(d) for d in range(len(listed))]:
            raise ContractError(
                f"Dense(in_order={self.in_order!r}): use None, {ROW!r}, {COLUMN!r}, or the "
                "dimensions from outermost to innermost, such as '0,2,1,3'"
            )

    @property
    def order(self) -> str | None:  # type: ignore[override]
        return self.in_order

    def check(self, layout: Layout) -> Known:
        if self.in_order is None:
            return layout.dense()
        return layout.dense_in(dim_order(self.in_order, layout))

    def describe(self) -> str:
        return "dense" if self.in_order is None else f"dense in {self.in_order} order"


@dataclass(frozen=True)
class UnitStrideLast(Rule):
    """Neighbours along the last dimension are neighbours in memory."""

    order: ClassVar[str | None] = ROW

    def check(self, layout: Layout) -> Known:
        return layout.unit_stride(-1)

    def describe(self) -> str:
        return "unit-stride last dimension"


@dataclass(frozen=True)
class _PowerOfTwoBytes(Rule):
    nbytes: int = 16

    def __post_init__(self) -> None:
        n = self.nbytes
        if not isinstance(n, int) or n < 1 or n & (n - 1) or n > FRESH_ALIGNMENT:
            raise ContractError(
                f"{type(self).__name__}({n!r}): use a power of two from 1 to {FRESH_ALIGNMENT} "
                "bytes, the alignment that a fresh allocation has everywhere"
            )


@dataclass(frozen=True)
class AlignedPointer(_PowerOfTwoBytes):
    """The address of the first element is a multiple of ``nbytes``."""

    def check(self, layout: Layout) -> Known:
        return layout.pointer_aligned(self.nbytes)

    def describe(self) -> str:
        return f"pointer aligned to {self.nbytes} bytes"


@dataclass(frozen=True)
class AlignedPitch(_PowerOfTwoBytes):
    """Every stride but the unit one is a multiple of ``nbytes`` bytes (size-1 dims excepted)."""

    def check(self, layout: Layout) -> Known:
        return layout.pitch_aligned(self.nbytes)

    def describe(self) -> str:
        return f"pitch aligned to {self.nbytes} bytes"


@dataclass(frozen=True)
class NoOverlap(Rule):
    """No two indices share an element (expanded and overlapping views break it)."""

    def check(self, layout: Layout) -> Known:
        shared = layout.overlaps()
        return None if shared is None else not shared

    def describe(self) -> str:
        return "no overlapping elements"


@dataclass(frozen=True)
class StartsMemory(Rule):
    """The value is no view that starts inside other memory."""

    def check(self, layout: Layout) -> Known:
        return known(layout.byte_offset == 0)

    def describe(self) -> str:
        return "at the start of its memory"


@dataclass(frozen=True)
class Multiple(Rule):
    """The size of ``dim``, in storage elements, is a multiple of ``n``."""

    by_copy: ClassVar[bool] = False
    n: int = 16
    dim: int = -1

    def __post_init__(self) -> None:
        if not isinstance(self.n, int) or self.n < 1 or not isinstance(self.dim, int):
            raise ContractError(
                f"Multiple({self.n!r}, dim={self.dim!r}): use an int n >= 1 and an int dim"
            )

    def check(self, layout: Layout) -> Known:
        if not -layout.ndim <= self.dim < layout.ndim:
            return False
        return layout.size_multiple(self.n, self.dim)

    def describe(self) -> str:
        return f"size of dim {self.dim} a multiple of {self.n}"


def dim_order(order: str, layout: Layout) -> tuple[int, ...]:
    """Dimensions from outermost to innermost for a named order.

    ``"row"``: as they are; ``"column"``: the last two swapped; ``"keep"``: as they lie in
    ``layout`` (row order where symbolic strides leave that open); else a written-out permutation
    such as ``"0,2,1,3"``.
    """
    if order == KEEP:
        return layout.dim_order() or tuple(range(layout.ndim))
    return parse_order(order, layout.ndim)


def parse_order(order: str, ndim: int) -> tuple[int, ...]:
    """The permutation behind an order's name for a tensor of ``ndim`` dimensions.

    Raises:
        ContractError: the name is neither ``row``, ``column`` nor a permutation of the dimensions.
    """
    dims = tuple(range(ndim))
    if order == ROW or (order == COLUMN and ndim < 2):
        return dims
    if order == COLUMN:
        return (*dims[:-2], dims[-1], dims[-2])
    try:
        listed = tuple(int(part) for part in order.split(","))
    except ValueError:
        listed = ()
    if tuple(sorted(listed)) != dims:
        raise ContractError(
            f"order {order!r} of a {ndim}-D tensor: use 'row', 'column', or its dimensions from "
            f"outermost to innermost, such as {','.join(map(str, dims))!r}"
        )
    return listed


def order_name(dims: tuple[int, ...]) -> str:
    """The shortest name that :func:`parse_order` understands for ``dims``."""
    for name in (ROW, COLUMN):
        if parse_order(name, len(dims)) == dims:
            return name
    return ",".join(map(str, dims))
