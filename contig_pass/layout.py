"""What an operand's memory is: sizes, strides, byte offset, item size.

A :class:`Layout` is a fact about one tensor, taken from a real or a fake tensor. Its predicates
answer ``True``, ``False`` or ``None``: ``None`` means that the answer depends on a symbolic size,
stride or offset and is not known statically. No predicate adds a guard or looks at a hint, so
asking never changes what a compiled graph may be reused for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

#: Size, stride or offset: exact, or symbolic.
IntLike = int | torch.SymInt
#: Answer of a predicate: yes, no, or not statically known.
Known = bool | None

#: Alignment in bytes that Inductor's run-time check gives every graph input that is checked.
INPUT_ALIGNMENT = 16
#: Alignment in bytes of every fresh allocation: 64 on the CPU (c10::gAlignment), 512 on CUDA.
FRESH_ALIGNMENT = 64
#: ``base_alignment`` of a layout whose ``byte_offset`` is the address itself.
ABSOLUTE = 0


def known(condition: bool | torch.SymBool) -> Known:
    """``condition`` as ``True``, ``False``, or ``None`` where it is not statically known."""
    if isinstance(condition, bool):
        return condition
    if statically_known_true(condition):
        return True
    if statically_known_true(torch.sym_not(condition)):
        return False
    return None


def all_known(*answers: Known) -> Known:
    """Three-valued *and*: ``False`` wins, then ``None``."""
    if False in answers:
        return False
    return None if None in answers else True


@dataclass(frozen=True, eq=False)
class Layout:
    """The memory of one operand.

    Attributes:
        shape: sizes in elements (of storage: ``float4_e2m1fn_x2`` counts pairs).
        strides: strides in elements, as many as ``shape``.
        byte_offset: bytes from a base address to the first element.
        base_alignment: what that base address is known to be a multiple of, in bytes;
            :data:`ABSOLUTE` (0) where ``byte_offset`` is the address itself.
        dtype: element type; packed and 1-byte types count storage bytes.
        device: where the data lies.
    """

    shape: tuple[IntLike, ...]
    strides: tuple[IntLike, ...]
    byte_offset: IntLike
    base_alignment: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Layout:
        """The layout of ``tensor``.

        A real tensor gives its address. A fake or meta tensor has none: its storage is taken to
        start on a fresh allocation's alignment. Sparse and nested tensors have no strides.

        Raises:
            TypeError: ``tensor`` is not a strided tensor.
        """
        if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
            what = tensor.layout if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise TypeError(f"a Layout needs a strided tensor, got {what}")
        if isinstance(tensor, FakeTensor) or tensor.device.type == "meta":
            offset, base = tensor.storage_offset() * tensor.dtype.itemsize, FRESH_ALIGNMENT
        else:
            offset, base = tensor.data_ptr(), ABSOLUTE
        return cls(
            tuple(tensor.shape), tuple(tensor.stride()), offset, base, tensor.dtype, tensor.device
        )

    # -- sizes -----------------------------------------------------------------------------------

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes of one storage element."""
        return self.dtype.itemsize

    @property
    def numel(self) -> IntLike:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> IntLike:
        """Bytes of the elements, each counted once per index (not of the storage)."""
        return self.numel * self.itemsize

    def is_empty(self) -> Known:
        """Whether some dimension has size 0."""
        answers = [known(size == 0) for size in self.shape]
        if True in answers:
            return True
        return None if None in answers else False

    # -- order and density -----------------------------------------------------------------------

    def unit_stride(self, dim: int = -1, *, ignore_size_one: bool = True) -> Known:
        """Whether neighbours along ``dim`` are neighbours in memory."""
        if self.ndim == 0:
            return True
        if ignore_size_one and known(self.shape[dim] <= 1):
            return True
        return known(self.strides[dim] == 1)

    def row_major(self, *, ignore_size_one: bool = True) -> Known:
        """Last two dimensions in row-major order: unit-stride columns, rows that do not overlap.

        Rows may be padded. With ``ignore_size_one=False`` the strides of size-1 dimensions are
        judged as well, as ``_scaled_mm`` does: a (1, 16) tensor with strides (1, 1) is refused.
        """
        return self._major(-2, -1, ignore_size_one)

    def column_major(self, *, ignore_size_one: bool = True) -> Known:
        """Last two dimensions in column-major order; see :meth:`row_major`."""
        return self._major(-1, -2, ignore_size_one)

    def _major(self, major: int, minor: int, ignore_size_one: bool) -> Known:
        if self.ndim < 2:
            return self.unit_stride(ignore_size_one=ignore_size_one)
        pitch_covers_row = known(self.strides[major] >= self.shape[minor])
        if not ignore_size_one:
            steeper = known(self.strides[major] > self.strides[minor])
            return all_known(known(self.strides[minor] == 1), steeper, pitch_covers_row)
        if known(self.shape[major] <= 1):
            return self.unit_stride(minor)
        return all_known(self.unit_stride(minor), pitch_covers_row)

    def dense(self) -> Known:
        """Whether the elements fill one block of memory, in any order of dimensions."""
        if self.is_empty():
            return True
        dims = [i for i in range(self.ndim) if not known(self.shape[i] == 1)]
        ordered = _outermost_first(self.strides, self.shape, dims)
        if ordered is None:
            return None
        return self._dense_along(ordered)

    def dense_in(self, order: Sequence[int]) -> Known:
        """Whether the elements fill one block with dimensions from outermost to innermost
        as ``order`` lists them; the strides of size-1 dimensions do not matter."""
        if self.is_empty():
            return True
        return self._dense_along([d for d in order if not known(self.shape[d] == 1)])

    def contiguous(self) -> Known:
        """Dense with the dimensions in their own order (row-major)."""
        return self.dense_in(range(self.ndim))

    def _dense_along(self, dims: Sequence[int]) -> Known:
        expected: IntLike = 1
        answers = []
        for dim in reversed(dims):
            answers.append(known(self.strides[dim] == expected))
            expected = expected * self.shape[dim]
        return all_known(*answers)

    # -- addresses -------------------------------------------------------------------------------

    def pointer_aligned(self, nbytes: int) -> Known:
        """Whether the first element's address is a multiple of ``nbytes``."""
        provable = math.gcd(self.base_alignment, nbytes)
        aligned = known(self.byte_offset % provable == 0)
        if provable == nbytes or aligned is False:
            return aligned
        return None

    def known_alignment(self) -> int:
        """Largest power of two up to :data:`FRESH_ALIGNMENT` that the address is known to be a
        multiple of."""
        return next((n for n in (64, 32, 16, 8, 4, 2) if self.pointer_aligned(n)), 1)

    def pitch_aligned(self, nbytes: int) -> Known:
        """Whether every stride that a kernel steps by is a multiple of ``nbytes``.

        That is the stride, in bytes, of each dimension of more than one element but the
        unit-stride one. A kernel that loads ``nbytes`` at a time needs it beside an aligned
        pointer.
        """
        answers = []
        for size, stride in zip(self.shape, self.strides, strict=True):
            if known(size <= 1) or known(stride == 1):
                continue
            answers.append(known((stride * self.itemsize) % nbytes == 0))
        return all_known(*answers)

    def size_multiple(self, n: int, dim: int = -1) -> Known:
        """Whether the size of ``dim`` is a multiple of ``n``."""
        return known(self.shape[dim] % n == 0)

    def overlaps(self) -> Known:
        """Whether two different indices share an element.

        Exact for ints; ``None`` where a symbolic size or stride leaves it open.
        """
        if self.is_empty():
            return False
        dims = [i for i in range(self.ndim) if not known(self.shape[i] == 1)]
        if all(isinstance(v, int) for d in dims for v in (self.shape[d], self.strides[d])):
            return _has_collision([(self.strides[d], self.shape[d] - 1) for d in dims])
        for d in dims:
            if known(self.strides[d] == 0) and known(self.shape[d] > 1):
                return True
        ordered = _outermost_first(self.strides, self.shape, dims)
        if ordered is None:
            return None
        extent: IntLike = 0
        for dim in reversed(ordered):
            if known(self.strides[dim] > extent) is not True:
                return None
            extent = extent + self.strides[dim] * (self.shape[dim] - 1)
        return False

    def dim_order(self) -> tuple[int, ...] | None:
        """Dimensions from outermost to innermost in memory, as ``torch.empty_like`` keeps them.

        Size-1 and equal-stride dimensions stay in place. ``None`` where symbolic strides leave
        the order open.
        """
        ordered = _outermost_first(self.strides, self.shape, range(self.ndim))
        return None if ordered is None else tuple(ordered)

    # -- words -----------------------------------------------------------------------------------

    def describe(self) -> str:
        """Shape, strides and offset in one short line, for reports and errors."""
        where = "address" if self.base_alignment == ABSOLUTE else "offset"
        offset = self.byte_offset % 16 if self.base_alignment == ABSOLUTE else self.byte_offset
        unit = " mod 16" if self.base_alignment == ABSOLUTE else " B"
        return (
            f"{_numbers(self.shape)} strides {_numbers(self.strides)} {where} {offset}{unit}"
        )


def dense_strides(shape: Sequence[IntLike], order: Sequence[int]) -> tuple[IntLike, ...]:
    """Strides of a dense tensor of ``shape`` with dimensions, outermost first, as in ``order``.

    Sizes of 0 count as 1, as in torch.
    """
    strides: list[IntLike] = [1] * len(shape)
    step: IntLike = 1
    for dim in reversed(order):
        strides[dim] = step
        step = step * torch.sym_max(shape[dim], 1)
    return tuple(strides)


def _numbers(values: Sequence[IntLike]) -> str:
    return "(" + ", ".join(str(v) for v in values) + ")"


def _outermost_first(
    strides: Sequence[IntLike], shape: Sequence[IntLike], dims: Sequence[int]
) -> list[int] | None:
    """``dims`` by falling stride, stable; insertion sort, since each comparison may be unknown.

    A dimension of size 1 has no say in the order: it is moved by nobody and moves past nobody.
    """
    dims = list(dims)
    if all(isinstance(strides[d], int) and isinstance(shape[d], int) for d in dims):
        free = [d for d in dims if shape[d] > 1]
        ranked = iter(sorted(free, key=lambda d: -strides[d]))
        return [next(ranked) if shape[d] > 1 else d for d in dims]
    ordered: list[int] = []
    slots = [i for i, d in enumerate(dims) if not known(shape[d] <= 1)]
    for dim in (dims[i] for i in slots):
        at = len(ordered)
        while at > 0:
            outer = known(strides[ordered[at - 1]] >= strides[dim])
            if outer is None:
                return None
            if outer:
                break
            at -= 1
        ordered.insert(at, dim)
    result = list(dims)
    for slot, dim in zip(slots, ordered, strict=True):
        result[slot] = dim
    return result


def _has_collision(dims: list[tuple[int, int]]) -> bool:
    """Whether sum(d_i * stride_i) = 0 has a solution other than all d_i = 0 with
    |d_i| <= limit_i, for ``dims`` of (stride, limit): then two indices share an element."""
    dims = sorted((s, n) for s, n in dims if n > 0)
    if any(s == 0 for s, _ in dims):
        return True
    while dims and dims[-1][0] > sum(s * n for s, n in dims[:-1]):
        dims.pop()  # steps further than all the others together reach: d_i must be 0
    if len(dims) < 2:
        return False
    (stride, limit), rest = dims[-1], dims[:-1]
    if _has_collision(rest):
        return True
    return any(_reachable(-d * stride, rest) for d in range(1, limit + 1))


def _reachable(total: int, dims: list[tuple[int, int]]) -> bool:
    """Whether ``total`` is sum(d_i * stride_i) with |d_i| <= limit_i; ``dims`` by rising stride."""
    reach = sum(s * n for s, n in dims)
    if abs(total) > reach or (dims and total % math.gcd(*(s for s, _ in dims))):
        return False
    if not dims:
        return total == 0
    (stride, limit), rest = dims[-1], dims[:-1]
    if not rest:
        return True  # a multiple of the only stride, within reach
    slack = reach - stride * limit
    low = max(-limit, -((slack - total) // stride))
    high = min(limit, (total + slack) // stride)
    return any(_reachable(total - d * stride, rest) for d in range(low, high + 1))
