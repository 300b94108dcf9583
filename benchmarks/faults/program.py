"""What a faulty program is, how a mode runs it, and the layouts that are planted in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

E4M3 = torch.float8_e4m3fn
BF16 = torch.bfloat16

EAGER, AOT_EAGER, INDUCTOR, CONTIG_SAFE = "eager", "aot_eager", "inductor", "contig_safe"
MODES = (EAGER, AOT_EAGER, INDUCTOR, CONTIG_SAFE)


@dataclass(frozen=True)
class Case:
    """A program made for one device.

    Attributes:
        function: the program.
        calls: arguments of each call, in order; the outputs of all of them count.
        dynamic: compile with symbolic shapes.
        prepare: what a mode runs, from ``function`` and the mode's name, where that is not
            ``compiled(function, mode)``; the reference always runs ``function`` itself.
        grad: run with autograd on.
        caches: compile with the compiler's caches on, in a directory of the process's own.
    """

    function: Callable[..., object]
    calls: Sequence[tuple]
    dynamic: bool | None = None
    prepare: Callable[[Callable[..., Any], str], Callable[..., Any]] | None = None
    grad: bool = False
    caches: bool = False


@dataclass(frozen=True)
class Program:
    """One row of the fault table.

    Attributes:
        name: unique.
        group: heading of the row.
        build: makes the case on a device.
        devices: where it can run.
        illegal: no layout makes it legal: every way of running it must raise, none may return.
    """

    name: str
    group: str
    build: Callable[[str], Case]
    devices: tuple[str, ...] = ("cpu", "cuda")
    illegal: bool = False


def compiled(
    function: Callable[..., Any], mode: str, /, *, dynamic: bool | None = None, **more: Any
) -> Callable[..., Any]:
    """``function`` as ``mode`` runs it.

    Args:
        function: what to compile.
        mode: one of :data:`MODES`.
        dynamic: as ``torch.compile`` takes it.
        more: ``options`` or ``mode`` of ``torch.compile``; only for the modes with Inductor.
    """
    if mode == EAGER:
        return function
    if mode == AOT_EAGER:
        return torch.compile(function, backend=mode, dynamic=dynamic)
    backend: Any = mode
    if mode == CONTIG_SAFE:
        from contig_pass import contig_safe

        backend = contig_safe
    return torch.compile(function, backend=backend, dynamic=dynamic, **more)


def around(
    inner: Callable[..., Any],
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]],
    calls: Sequence[tuple],
    *,
    dynamic: bool | None = None,
    grad: bool = False,
) -> Case:
    """A case that compiles ``inner`` and calls it from ``wrap(inner)``, which is not compiled."""

    def prepare(function: Callable[..., Any], mode: str) -> Callable[..., Any]:
        return wrap(compiled(inner, mode, dynamic=dynamic))

    return Case(wrap(inner), calls, prepare=prepare, grad=grad)


# -- values --------------------------------------------------------------------------------------


def normal(device: str, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal values."""
    return torch.randn(*shape, device=device).to(dtype)


def integers(device: str, *shape: int) -> torch.Tensor:
    """Small integers as fp32: exact in whatever order and precision they are summed."""
    return torch.randint(-4, 5, shape, device=device).float()


def finite_bytes(device: str, *shape: int) -> torch.Tensor:
    """Bytes that are finite numbers in every one-byte type."""
    return torch.randint(1, 120, shape, device=device, dtype=torch.uint8)


def window(flat: torch.Tensor, offset: int, *shape: int) -> torch.Tensor:
    """A dense view of ``shape`` that starts at element ``offset`` of ``flat``."""
    return flat[offset : offset + torch.Size(shape).numel()].view(shape)


def windows(device: str, *offsets: int, rows: int = 40, columns: int = 64) -> list[torch.Tensor]:
    """One matrix per offset, each in a buffer of its own."""
    return [
        window(integers(device, rows * columns + 64), offset, rows, columns) for offset in offsets
    ]


def simple(
    function: Callable[..., object], *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> Callable[[str], Case]:
    """One call of ``function`` on normal values."""

    def build(device: str) -> Case:
        return Case(function, [tuple(normal(device, *shape, dtype=dtype) for shape in shapes)])

    return build


# -- layouts -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planted:
    """A layout to plant: how a dense value is stored, and how the operand is taken from that.

    ``take`` runs either before the program, so that the operand is a graph input, or inside it,
    so that it is a view made in the graph.
    """

    store: Callable[[torch.Tensor], torch.Tensor]
    take: Callable[[torch.Tensor], torch.Tensor]


def dense() -> Planted:
    """As it is."""
    return Planted(lambda value: value, lambda stored: stored)


def in_bytes(value: torch.Tensor, offset: int = 0, padding: int = 0) -> Planted:
    """Rows of ``value`` at byte ``offset`` of a buffer, each followed by ``padding`` bytes."""
    itemsize, dtype, shape = value.element_size(), value.dtype, tuple(value.shape)
    columns = shape[-1] if shape else 1
    rows = max(value.numel() // columns, 1)
    pitch = columns * itemsize + padding
    end = offset + rows * pitch

    def take(buffer: torch.Tensor) -> torch.Tensor:
        matrix = buffer[offset:end].view(dtype).view(rows, pitch // itemsize)[:, :columns]
        if padding:
            return matrix.unflatten(0, shape[:-1]) if len(shape) > 2 else matrix
        return matrix.view(shape)

    def store(dense_value: torch.Tensor) -> torch.Tensor:
        buffer = torch.zeros(end + 64, dtype=torch.uint8, device=dense_value.device)
        take(buffer).copy_(dense_value)
        return buffer

    return Planted(store, take)


def inner_stride(step: int = 2) -> Planted:
    """Every ``step``-th element along the last dimension of a wider buffer."""

    def store(value: torch.Tensor) -> torch.Tensor:
        wide = torch.zeros(
            *value.shape[:-1], value.shape[-1] * step, dtype=value.dtype, device=value.device
        )
        wide[..., ::step].copy_(value)
        return wide

    return Planted(store, lambda wide: wide[..., ::step])


def transposed() -> Planted:
    """The last two dimensions stored the other way round."""
    return Planted(
        lambda value: value.transpose(-1, -2).contiguous(), lambda stored: stored.transpose(-1, -2)
    )


def expanded(value: torch.Tensor) -> Planted:
    """One row that stands for all of them."""
    shape = tuple(value.shape)
    return Planted(lambda dense_value: dense_value[:1].clone(), lambda row: row.expand(shape))


def planted_program(
    kernel: Callable[..., torch.Tensor],
    values: Sequence[torch.Tensor | None],
    faults: dict[int, Planted],
    *,
    inside: bool,
) -> Case:
    """A program that calls ``kernel`` on ``values`` with ``faults`` planted at some positions.

    Args:
        kernel: takes as many operands as there are values.
        values: dense values; ``None`` for an operand that is not given.
        faults: layout by position.
        inside: whether the planted views are made in the program or before it.
    """
    takes = [faults[i].take if i in faults else None for i in range(len(values))]
    stored = [
        faults[i].store(value) if i in faults else value for i, value in enumerate(values)
    ]
    if inside:

        def function(*given: torch.Tensor | None) -> torch.Tensor:
            return kernel(
                *(g if take is None else take(g) for g, take in zip(given, takes, strict=True))
            )

        return Case(function, [tuple(stored)])
    taken = [s if take is None else take(s) for s, take in zip(stored, takes, strict=True)]
    return Case(kernel, [tuple(taken)])
