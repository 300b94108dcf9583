"""What a faulty program is, and the layouts that are planted in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

E4M3 = torch.float8_e4m3fn
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """A program made for one device.

    Attributes:
        function: the program.
        calls: arguments of each call, in order; the outputs of all of them count.
        dynamic: compile with symbolic shapes.
    """

    function: Callable[..., object]
    calls: Sequence[tuple]
    dynamic: bool | None = None


@dataclass(frozen=True)
class Program:
    """One row of the fault table.

    Attributes:
        name: unique.
        group: heading of the row.
        build: makes the case on a device.
        devices: where it can run.
        illegal: no layout makes it legal: every way of running it must raise, none may return.
        beyond: why the project's present stage does not promise it; shown, not required.
    """

    name: str
    group: str
    build: Callable[[str], Case]
    devices: tuple[str, ...] = ("cpu", "cuda")
    illegal: bool = False
    beyond: str | None = None


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
