"""Bad layouts that cross the border of a subgraph, of a user's Triton kernel, or of an op whose
fake implementation does not tell where its output starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.faults.program import Case, Program, integers, window, windows

ops = torch.ops.faults
region = torch.compiler.nested_compile_region
SIZE = 32 * 64


def programs() -> Iterator[Program]:
    """Every program of this file."""
    for group, builders in _GROUPS.items():
        for name, build in builders.items():
            yield Program(name, group, build)
    for name, build in _TRITON.items():
        yield Program(name, "triton kernels", build, devices=("cuda",))


def _flat(function: Callable[..., object], calls: int = 1) -> Callable[[str], Case]:
    """``function`` of one flat buffer of 2 * SIZE + 64 elements."""

    def build(device: str) -> Case:
        return Case(function, [(integers(device, 2 * SIZE + 64),) for _ in range(calls)])

    return build


def _matrices(function: Callable[..., object], *offsets: int) -> Callable[[str], Case]:
    """``function`` of one matrix, one call per offset."""

    def build(device: str) -> Case:
        matrices = windows(device, *offsets, rows=32)
        return Case(function, [(matrix,) for matrix in matrices])

    return build


# -- nested compile regions ----------------------------------------------------------------------


@region
def _rows_region(x: torch.Tensor) -> torch.Tensor:
    return ops.rows(x)


@region
def _adding_region(x: torch.Tensor) -> torch.Tensor:
    return ops.rows(x + 1) - ops.rows(x)


@region
def _slicing_region(flat: torch.Tensor) -> torch.Tensor:
    return (flat + 1)[1 : 1 + SIZE].view(32, 64)


@region
def _view_region(flat: torch.Tensor) -> torch.Tensor:
    return ops.rows(window(flat, 3, 32, 64))


@region
def _outer_region(flat: torch.Tensor) -> torch.Tensor:
    return _rows_region(window(flat, 1, 32, 64)) + _rows_region(window(flat, 4, 32, 64))


@region
def _product_region(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return ops.matmul(x, w.t(), None)


def _two_offsets(flat: torch.Tensor) -> torch.Tensor:
    return _rows_region(window(flat, 0, 32, 64)) + _rows_region(window(flat, 1, 32, 64))


def _three_offsets(flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(_adding_region(window(flat + 1, offset, 32, 64)) for offset in (5, 0, 3))


def _region_output(flat: torch.Tensor) -> torch.Tensor:
    return ops.rows(_slicing_region(flat)) + ops.rows(_slicing_region(flat * 2))


def _sliced_inside(flat: torch.Tensor) -> torch.Tensor:
    return _view_region(flat[:3000]) + _view_region(flat[1:3001])


def _called_in_turn(x: torch.Tensor) -> torch.Tensor:
    return _adding_region(x) + _adding_region(_adding_region(x))


class _Layers(torch.nn.Module):
    """One region called with the parameters of each layer, which lie in one slab."""

    def __init__(self, slab: torch.Tensor) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList(
            torch.nn.Parameter(window(slab, offset, 64, 64), False)
            for offset in (0, 64 * 64 + 1, 2 * 64 * 64 + 2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for weight in self.weights:
            x = _product_region(x, weight)
        return x


def _parameters(device: str) -> Case:
    layers = _Layers(integers(device, 3 * 64 * 64 + 64))
    return Case(layers, [(integers(device, 16, 64),) for _ in range(2)])


# -- control flow --------------------------------------------------------------------------------


def _cond(choice: Any, yes: Callable, no: Callable, operands: tuple) -> Any:
    """``torch.cond``; in eager mode, where that would compile, the branch itself."""
    if torch.compiler.is_compiling():
        return torch.cond(choice, yes, no, operands)
    return (yes if choice else no)(*operands)


def _one_branch(x: torch.Tensor) -> torch.Tensor:
    return _cond(x[0, 0] > 0, lambda x: ops.rows(x), lambda x: x * 3, (x,))


def _branches_slice(x: torch.Tensor) -> torch.Tensor:
    return _cond(
        x[0, 0] > 0, lambda x: ops.rows(x[:, 1:]), lambda x: ops.rows(x[:, :-1]) + 1, (x,)
    )


def _sliced_operand(flat: torch.Tensor) -> torch.Tensor:
    operand = window(flat + 1, 1, 32, 64)
    return _cond(flat[0] > 0, lambda x: ops.rows(x), lambda x: ops.rows(x) + 1, (operand,))


def _branch_output(flat: torch.Tensor) -> torch.Tensor:
    chosen = _cond(
        flat[0] > 0,
        lambda flat: window(flat + 1, 1, 32, 64),
        lambda flat: window(flat - 1, 1, 32, 64),
        (flat,),
    )
    return ops.rows(chosen) + ops.rows(chosen * 2)


def _conditional(function: Callable[..., object], *shape: int) -> Callable[[str], Case]:
    """Both branches, with operands that are aligned and ones that are not."""

    def build(device: str) -> Case:
        calls = []
        for first, offset in ((1, 0), (-1, 0), (1, 1), (-1, 3)):
            x = window(integers(device, torch.Size(shape).numel() + 16), offset, *shape)
            x.view(-1)[0] = first
            calls.append((x,))
        return Case(function, calls)

    return build


def _while(x: torch.Tensor) -> torch.Tensor:
    def again(i: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return i < 3

    def body(i: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return i + 1, ops.rows(x) + i

    state = (torch.zeros((), dtype=torch.int64, device=x.device), x)
    if torch.compiler.is_compiling():
        from torch._higher_order_ops.while_loop import while_loop

        return while_loop(again, body, state)[1]
    while again(*state):
        state = body(*state)
    return state[1]


# -- opaque outputs ------------------------------------------------------------------------------


def _shifted_in_view(x: torch.Tensor) -> torch.Tensor:
    late, early = ops.shifted(x)[4:], ops.shifted(x + 1)[:28]
    return ops.rows(late.view(56, 32)) + ops.rows(early.view(56, 32))


def _shifted_in_list(x: torch.Tensor) -> torch.Tensor:
    return ops.total([x, ops.shifted(x), ops.shifted(x + 1)[1:]])


def _shifted_parts(x: torch.Tensor) -> torch.Tensor:
    first, second = ops.shifted_parts(x)
    return ops.rows(first) + ops.rows(second) + ops.total([second, first])


def _shifted_product(x: torch.Tensor) -> torch.Tensor:
    return ops.matmul(ops.shifted(x), ops.shifted(x * 2).t(), None)


def _shifted_written(x: torch.Tensor) -> torch.Tensor:
    out = ops.shifted(x)
    ops.fill(x * 2, out)
    return ops.rows(out)


def _shifted_to_region(x: torch.Tensor) -> torch.Tensor:
    return _rows_region(ops.shifted(x)) + _rows_region(x)


def _shifted_returned(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    out = ops.shifted(x)
    return ops.rows(out), out


# -- Triton kernels ------------------------------------------------------------------------------


def _added(flat: torch.Tensor) -> torch.Tensor:
    from benchmarks.faults.triton_kernels import add

    return add(window(flat, 1, 32, 64), window(flat, SIZE + 3, 32, 64))


def _added_computed(flat: torch.Tensor) -> torch.Tensor:
    from benchmarks.faults.triton_kernels import add

    shifted = flat + 1
    return add(window(shifted, 1, 32, 64), window(flat, 0, 32, 64))


def _strided(x: torch.Tensor) -> torch.Tensor:
    from benchmarks.faults.triton_kernels import double_rows

    return double_rows(x[:, 1:33]) + double_rows((x * 2)[:, 3:35])


def _incremented(flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from benchmarks.faults.triton_kernels import increment

    out = window(flat, 1, 32, 64)
    increment(out)
    return ops.rows(out), flat * 2


def _incremented_input(x: torch.Tensor) -> torch.Tensor:
    from benchmarks.faults.triton_kernels import increment

    increment(x)
    return ops.rows(x)


_TRITON: dict[str, Callable[[str], Case]] = {
    "operands are misaligned slices": _flat(_added),
    "operand is a computed slice": _flat(_added_computed),
    "operand's strides are arguments": _matrices(_strided, 1, 0),
    "kernel mutates a slice of an input": _flat(_incremented),
    "kernel mutates a misaligned input": _matrices(_incremented_input, 1, 0, 3),
}

_GROUPS: dict[str, dict[str, Callable[[str], Case]]] = {
    "subgraphs": {
        "region called with offsets 0 and 1": _flat(_two_offsets),
        "region called with computed slices": _flat(_three_offsets),
        "region over layers' parameters": _parameters,
        "region's output is a misaligned view": _flat(_region_output),
        "region slices its operand": _flat(_sliced_inside),
        "region in a region": _flat(_outer_region),
        "region called on misaligned inputs": _matrices(_called_in_turn, 0, 1, 3),
        "cond, op in one branch": _conditional(_one_branch, 32, 64),
        "cond, branches slice": _conditional(_branches_slice, 32, 64),
        "cond, operand is a computed slice": _conditional(_sliced_operand, SIZE + 16),
        "cond, output is a misaligned view": _conditional(_branch_output, SIZE + 16),
        "while_loop over a misaligned state": _matrices(_while, 1, 0, 3),
    },
    "opaque outputs": {
        "output starts at element 1": _matrices(lambda x: ops.rows(ops.shifted(x)), 0, 1),
        "through a view": _matrices(_shifted_in_view, 0),
        "in a list": _matrices(_shifted_in_list, 0, 1),
        "outputs in a list": _matrices(_shifted_parts, 0),
        "both operands of a product": _matrices(_shifted_product, 0),
        "written to by another op": _matrices(_shifted_written, 0),
        "into a nested region": _matrices(_shifted_to_region, 0, 1),
        "used and returned": _matrices(_shifted_returned, 0),
    },
}
