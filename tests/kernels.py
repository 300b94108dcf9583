"""Custom ops for tests: each records the memory that it received and computes from the values.

``layout_tests::rows`` wants unit-stride rows on 16 bytes, ``columns`` unit-stride columns on 16
bytes, ``block`` one dense block on 32 bytes, ``several`` a list of tensors on 16 bytes each. The
checks are arithmetic on real addresses and strides, apart from contig_pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from contig_pass import (
    AlignedPointer,
    ColumnMajor,
    Dense,
    RowMajor,
    UnitStrideLast,
    register_contract,
)
from contig_pass.contracts import REGISTRY


@dataclass(frozen=True)
class Seen:
    """One operand at the moment of the call."""

    op: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    address: int
    itemsize: int

    def problem(self) -> str:
        """What the kernel would object to, or ``""``."""
        return _DEMANDS[self.op](self)


received: list[Seen] = []

_LIBRARY = torch.library.Library("layout_tests", "DEF")


def bad() -> list[tuple[Seen, str]]:
    """Operands received so far that break their kernel's demand."""
    return [(seen, seen.problem()) for seen in received if seen.problem()]


@contextlib.contextmanager
def contracts() -> Iterator[None]:
    """The ops' contracts, for the time of the block."""
    with REGISTRY.scope():
        register_contract("layout_tests::rows", "x", [UnitStrideLast(), AlignedPointer(16)])
        register_contract("layout_tests::columns", "x", [ColumnMajor(), AlignedPointer(16)])
        register_contract("layout_tests::block", "x", [Dense(), AlignedPointer(32)])
        register_contract("layout_tests::several", "xs", [AlignedPointer(16)])
        register_contract("layout_tests::matrix", "x", [RowMajor(), AlignedPointer(16)])
        yield


def note(op: str, x: torch.Tensor) -> None:
    received.append(Seen(op, tuple(x.shape), x.stride(), x.data_ptr(), x.element_size()))


def _values(x: torch.Tensor) -> torch.Tensor:
    if x.element_size() == 1 and x.dtype not in (torch.int8, torch.uint8, torch.bool):
        x = x.view(torch.uint8)
    return x.to(torch.float64).contiguous().float() * 2


def _define(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    def kernel(x: torch.Tensor) -> torch.Tensor:
        note(name, x)
        return _values(x)

    _LIBRARY.define(f"{name}(Tensor x) -> Tensor")
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(
        f"layout_tests::{name}", lambda x: x.new_empty(x.shape, dtype=torch.float32), lib=_LIBRARY
    )
    return getattr(torch.ops.layout_tests, name)


def _several(xs: Sequence[torch.Tensor]) -> torch.Tensor:
    for x in xs:
        note("several", x)
    return torch.stack([_values(x).sum() for x in xs])


def _spans(seen: Seen) -> list[tuple[int, int]]:
    """(stride, size) of the dimensions that count, by falling stride."""
    pairs = zip(seen.strides, seen.shape, strict=True)
    return sorted(((s, n) for s, n in pairs if n > 1), reverse=True)


def _empty(seen: Seen) -> bool:
    return 0 in seen.shape


def _pointer(seen: Seen, nbytes: int) -> str:
    return f"address {seen.address % nbytes} mod {nbytes}" if seen.address % nbytes else ""


def _rows(seen: Seen) -> str:
    if _empty(seen):
        return ""
    if seen.shape and seen.shape[-1] > 1 and seen.strides[-1] != 1:
        return f"last stride {seen.strides[-1]}"
    return _pointer(seen, 16)


def _columns(seen: Seen) -> str:
    if _empty(seen):
        return ""
    if len(seen.shape) < 2:
        return _rows(seen)
    columns, rows = seen.shape[-1], seen.shape[-2]
    if rows > 1 and seen.strides[-2] != 1:
        return f"stride {seen.strides[-2]} down a column"
    if columns > 1 and seen.strides[-1] < rows:
        return "columns overlap"
    return _pointer(seen, 16)


def _matrix(seen: Seen) -> str:
    if not _empty(seen) and len(seen.shape) >= 2:
        rows, columns = seen.shape[-2:]
        if rows > 1 and seen.strides[-2] < columns:
            return "rows overlap"
    return _rows(seen)


def _block(seen: Seen) -> str:
    if _empty(seen):
        return ""
    expected = 1
    for stride, size in reversed(_spans(seen)):
        if stride != expected:
            return f"not dense: {seen.strides}"
        expected *= size
    return _pointer(seen, 32)


_DEMANDS: dict[str, Callable[[Seen], str]] = {
    "rows": _rows,
    "columns": _columns,
    "block": _block,
    "matrix": _matrix,
    "several": lambda seen: "" if _empty(seen) else _pointer(seen, 16),
}

rows, columns, block, matrix = map(_define, ("rows", "columns", "block", "matrix"))
_LIBRARY.define("several(Tensor[] xs) -> Tensor")
_LIBRARY.impl("several", _several, "CompositeExplicitAutograd")
torch.library.register_fake(
    "layout_tests::several",
    lambda xs: xs[0].new_empty((len(xs),), dtype=torch.float32),
    lib=_LIBRARY,
)
several = torch.ops.layout_tests.several
