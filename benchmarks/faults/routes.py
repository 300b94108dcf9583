"""Ways by which a bad layout reaches a kernel although the first call, or the graph, looked well:
later calls, memory that is written to, parameters that share memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.faults.program import (
    E4M3,
    Case,
    Program,
    around,
    finite_bytes,
    integers,
    normal,
    window,
    windows,
)

ops = torch.ops.faults
SIZE = 40 * 64


def programs() -> Iterator[Program]:
    """Every program of this file."""
    for group, builders in _GROUPS.items():
        for name, build in builders.items():
            yield Program(name, group, build)


def _called(
    function: Callable[..., object], *offsets: tuple[int, ...], dynamic: bool | None = None
) -> Callable[[str], Case]:
    """One call per tuple of offsets, one matrix per offset."""

    def build(device: str) -> Case:
        return Case(function, [tuple(windows(device, *call)) for call in offsets], dynamic)

    return build


# -- second calls --------------------------------------------------------------------------------


def _two(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return ops.rows(x), ops.rows(y), ops.rows(x - y), ops.matmul(x, y.t(), None)


def _aliasing(device: str) -> Case:
    flat = normal(device, SIZE + 64)
    calls = [(0, 4), (1, 5), (4, 4), (3, 0), (0, 0)]
    return Case(
        lambda x, y: ops.rows(x) - ops.rows(y),
        [tuple(window(flat, offset, 40, 64) for offset in call) for call in calls],
    )


def _dtype_view(device: str) -> Case:
    flat = finite_bytes(device, 4200)
    return Case(
        lambda b: ops.rows(b.view(E4M3).view(32, 64)),
        [(window(flat, offset, 2048),) for offset in (1, 0, 16, 3)],
    )


def _wider_view(device: str) -> Case:
    flat = normal(device, 2100).view(torch.uint8)
    return Case(
        lambda b: ops.rows(b.view(torch.float32)[4:].view(31, 64)),
        [(window(flat, offset, 4 * 31 * 64 + 16),) for offset in (0, 4, 16, 12)],
    )


def _dynamic_shapes(device: str) -> Case:
    flat = normal(device, 6000)
    shapes = [(0, 30, 64), (1, 31, 64), (3, 45, 80), (0, 45, 73), (2, 30, 80)]
    return Case(
        lambda x: (ops.rows(x[:, :32]), ops.rows(x[:, 3:])),
        [(window(flat, *call),) for call in shapes],
        dynamic=True,
    )


def _dynamic_pair(device: str) -> Case:
    flat = integers(device, 8000)
    calls = [((0, 30, 64), (0, 16, 64)), ((1, 31, 64), (0, 17, 64)), ((0, 7, 80), (2, 9, 80))]
    return Case(
        lambda x, w: ops.matmul(x, w.t(), None) + ops.rows(x).sum(),
        [tuple(window(flat, *shape) for shape in call) for call in calls],
        dynamic=True,
    )


def _scalars(device: str) -> Case:
    flat = integers(device, 200)
    calls = [(flat[offset], window(flat, offset, 100)) for offset in (0, 1, 4, 3)]
    return Case(lambda s, x: (ops.total([x, s]), ops.total([s, s * 2, x[1:]])), calls)


def _empty_between(device: str) -> Case:
    flat = normal(device, 4000)
    shapes = [(0, 40, 64), (1, 0, 64), (3, 20, 64), (0, 0, 64), (2, 40, 64)]
    return Case(lambda x: ops.rows(x), [(window(flat, *shape),) for shape in shapes])


def _views_returned(device: str) -> Case:
    case = _dynamic_shapes(device)
    return Case(
        lambda x: (ops.rows(x), x[1:], x.t(), x.narrow(0, 2, 1).expand(x.shape)),
        case.calls,
        dynamic=True,
    )


def _empty_dynamic(device: str) -> Case:
    case = _empty_between(device)
    return Case(lambda x: ops.rows(x[:, 4:]), case.calls, dynamic=True)


class _Layer(torch.nn.Module):
    """A weight and a bias, as parameters or as buffers."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, buffers: bool = False) -> None:
        super().__init__()
        if buffers:
            self.register_buffer("weight", weight)
            self.register_buffer("bias", bias)
        else:
            self.weight = torch.nn.Parameter(weight, requires_grad=False)
            self.bias = torch.nn.Parameter(bias, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.matmul(x, self.weight.t(), self.bias)


def _repointed(*offsets: tuple[int, int], buffers: bool = False) -> Callable[[str], Case]:
    """The layer's memory is swapped before each call, outside what is compiled."""

    def build(device: str) -> Case:
        flat, biases = integers(device, 48 * 64 + 16), integers(device, 64)
        values = [(window(flat, w, 48, 64), window(biases, b, 48)) for w, b in offsets]
        layer = _Layer(*values[0], buffers=buffers)

        def swapping(run: Callable[..., Any]) -> Callable[..., Any]:
            def function(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> object:
                if buffers:
                    layer.weight, layer.bias = weight, bias
                else:
                    layer.weight.data, layer.bias.data = weight, bias
                return run(x)

            return function

        x = integers(device, 16, 64)
        return around(layer, swapping, [(x, *pair) for pair in values])

    return build


# -- mutation ------------------------------------------------------------------------------------


def _mutated_after(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    before = ops.rows(x)
    x.mul_(2)
    return before, ops.rows(x)


def _mutated_through_view(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x[:, 1:].add_(1)
    return ops.rows(x), ops.rows(x[:, 1:])


def _two_mutated(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    x.add_(y)
    y.sub_(x)
    return ops.rows(x) + ops.rows(y)


def _alias_mutated(*offsets: tuple[int, int]) -> Callable[[str], Case]:
    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        return ops.rows(y)

    def build(device: str) -> Case:
        calls = []
        for call in offsets:
            flat = normal(device, SIZE + 64)
            calls.append(tuple(window(flat, offset, 40, 64) for offset in call))
        return Case(function, calls)

    return build


def _result_copied_in(x: torch.Tensor) -> None:
    x.copy_(ops.rows(x))


def _fill_computed(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    base = torch.cat([y.reshape(-1), y.reshape(-1)]) + 1
    ops.fill(x, window(base, 1, 40, 64))
    return base * 2


def _fill_slice_of_input(x: torch.Tensor, flat: torch.Tensor) -> None:
    ops.fill(x, window(flat, 3, 40, 64))


def _fill_columns_of_input(x: torch.Tensor, wide: torch.Tensor) -> torch.Tensor:
    ops.fill(x, wide[:, 1:65])
    return wide.sum()


def _fill_two_slices(x: torch.Tensor, y: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
    ops.fill(x, window(flat, 0, 40, 64))
    ops.fill(y, window(flat, SIZE + 1, 40, 64))
    return flat + 1


def _fill_then_read(x: torch.Tensor, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    out = window(flat, 1, 40, 64)
    ops.fill(x, out)
    return ops.rows(out), ops.rows(window(flat, 5, 40, 64))


def _fill_input(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    ops.fill(x, out)
    return out * 3


def _fill_from_the_same(flat: torch.Tensor) -> torch.Tensor:
    ops.fill(window(flat, 1, 40, 64), window(flat, SIZE + 2, 40, 64))
    return ops.rows(window(flat, SIZE + 2, 40, 64))


def _accumulate_input(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    ops.accumulate(x[:, 1:], out[:, 1:])
    return ops.rows(out)


def _accumulate_inner(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    ops.accumulate(x[:, 1:33], out[:, 8:40])
    return ops.rows(out)


def _fill_rows(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    ops.fill(x[1:], out[1:])
    return out * 3


def _fill_window(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    ops.fill(window(x.view(-1), 0, 16, 64), window(out.view(-1), 3, 16, 64))
    return out * 3


def _fill_twice(x: torch.Tensor, out: torch.Tensor) -> None:
    ops.fill(x, out)
    ops.fill(ops.rows(out), out)


def _into(function: Callable[..., object], *shape: int) -> Callable[[str], Case]:
    """``function`` of two misaligned matrices, or of as many as it takes, and a buffer."""
    operands = function.__code__.co_argcount - 1

    def build(device: str) -> Case:
        calls = [(*windows(device, *[o] * operands), integers(device, *shape)) for o in (1, 0)]
        return Case(function, calls)

    return build


# -- tied weights --------------------------------------------------------------------------------


class _Tied(torch.nn.Module):
    """Parameters made from one slab, and what is done with them."""

    def __init__(
        self, parameters: list[torch.Tensor], body: Callable[..., torch.Tensor]
    ) -> None:
        super().__init__()
        self.names = [f"weight{number}" for number in range(len(parameters))]
        for name, given in zip(self.names, parameters, strict=True):
            parameter = isinstance(given, torch.nn.Parameter)
            setattr(self, name, given if parameter else torch.nn.Parameter(given, False))
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x, *(getattr(self, name) for name in self.names))


def _tied(
    parameters: Callable[[torch.Tensor], list[torch.Tensor]], body: Callable[..., torch.Tensor]
) -> Callable[[str], Case]:
    def build(device: str) -> Case:
        module = _Tied(parameters(integers(device, 4 * 64 * 64)), body)
        return Case(module, [(integers(device, 16, 64),) for _ in range(2)])

    return build


def _both_ways(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return ops.matmul(ops.matmul(x, w.t(), None), w, None)


def _one_each(x: torch.Tensor, v: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return ops.matmul(ops.matmul(x, v.t(), None), w.t(), None)


def _same_twice(flat: torch.Tensor) -> list[torch.Tensor]:
    parameter = torch.nn.Parameter(window(flat, 1, 64, 64), False)
    return [parameter, parameter]


def _from_slab(x: torch.Tensor, slab: torch.Tensor) -> torch.Tensor:
    at = 1
    for columns in (48, 64, 32):
        end = at + columns * x.shape[1]
        weight, bias = slab[at:end].view(columns, -1), slab[end : end + columns]
        x = ops.matmul(x, weight.t(), bias)
        at = end + columns
    return x


_GROUPS: dict[str, dict[str, Callable[[str], Case]]] = {
    "second calls": {
        "offsets of two inputs change": _called(_two, (0, 0), (1, 0), (0, 3), (2, 1), (0, 0)),
        "offsets of two inputs change, dynamic": _called(
            _two, (0, 0), (0, 1), (3, 2), dynamic=True
        ),
        "inputs alias at different offsets": _aliasing,
        "dtype view of a misaligned input": _dtype_view,
        "wider dtype view of a misaligned input": _wider_view,
        "dynamic shapes and offsets": _dynamic_shapes,
        "dynamic shapes and offsets, two inputs": _dynamic_pair,
        "dynamic shapes, views of the input returned": _views_returned,
        "0-d inputs": _scalars,
        "empty inputs between": _empty_between,
        "empty inputs between, dynamic": _empty_dynamic,
        "parameter swapped by .data between calls": _repointed((0, 0), (1, 0), (4, 1), (3, 4)),
        "buffer re-pointed between calls": _repointed((0, 0), (1, 1), (4, 3), buffers=True),
    },
    "mutation": {
        "input mutated, read before and after": _called(_mutated_after, (1,), (0,), (3,)),
        "input mutated through a view": _called(_mutated_through_view, (1,), (0,), (3,)),
        "two inputs mutated": _called(_two_mutated, (1, 2), (0, 1), (3, 0)),
        "aliased input mutated": _alias_mutated((1, 5), (1, 5)),
        # Plain torch computes wrong values here with any op, for want of a guard on the offsets.
        "aliased input mutated, offsets change": _alias_mutated((1, 5), (0, 3), (4, 0)),
        "result copied into the input": _called(_result_copied_in, (0,), (1,), (2,)),
        "op writes a slice of a computed tensor": _called(_fill_computed, (1, 0), (0, 3)),
        "op writes a slice of an input": _into(_fill_slice_of_input, SIZE + 64),
        "op writes columns of an input": _into(_fill_columns_of_input, 40, 73),
        "op writes a misaligned input": _called(_fill_input, (0, 1), (1, 0), (2, 3)),
        "op writes an input, misaligned first": _called(_fill_input, (1, 1), (0, 0)),
        "op writes a misaligned input twice": _called(_fill_twice, (0, 1), (1, 0)),
        "op writes two slices of one input": _into(_fill_two_slices, 2 * SIZE + 64),
        "op writes a slice, which is then read": _into(_fill_then_read, SIZE + 64),
        "op reads and writes slices of one input": _into(_fill_from_the_same, 2 * SIZE + 64),
        "op writes rows of a misaligned input": _called(_fill_rows, (0, 1), (1, 0), (0, 3)),
        "op writes a window of a misaligned input": _called(_fill_window, (0, 1), (1, 0), (0, 3)),
        "op accumulates in columns of an input": _called(_accumulate_input, (1, 0), (0, 0)),
        # Plain torch counts the columns from the start of the storage, with any op.
        "op accumulates in the last columns of a misaligned input": _called(
            _accumulate_input, (1, 1), (0, 2)
        ),
        "op accumulates in columns of a misaligned input": _called(
            _accumulate_inner, (1, 1), (0, 2), (1, 0)
        ),
    },
    "tied weights": {
        "one parameter row-major and transposed": _tied(
            lambda flat: [window(flat, 0, 64, 64)], _both_ways
        ),
        "one misaligned parameter both ways": _tied(
            lambda flat: [window(flat, 1, 64, 64)], _both_ways
        ),
        "one parameter under two names": _tied(_same_twice, _one_each),
        "two parameters that overlap": _tied(
            lambda flat: [window(flat, 1, 64, 64), window(flat, 67, 64, 64)], _one_each
        ),
        "a parameter and its transpose": _tied(
            lambda flat: [window(flat, 4, 64, 64), window(flat, 4, 64, 64).t()], _one_each
        ),
        "a flat slab of slices": _tied(lambda flat: [flat], _from_slab),
    },
}
