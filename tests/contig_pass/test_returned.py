"""Views of an input that a program writes to and returns: the same views of the input."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import contig_pass
from tests import kernels

Program = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def _program(write: Callable[[torch.Tensor], None], part: Callable) -> Program:
    def program(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        write(x)
        view = part(x)
        return kernels.rows(view), view

    return program


def _columns(start: int, length: int, step: int) -> Callable:
    # Dynamo makes the integers of a closure symbolic under dynamic=True.
    return lambda x: x.narrow(1, start, length)[..., ::step]


def _rows_written(start: int) -> Callable:
    return lambda x: x.narrow(0, start, x.shape[0] - start).add_(1)


@pytest.mark.parametrize("inner", ["inductor", "aot_eager"])
@pytest.mark.parametrize(
    ("write", "part"),
    [
        (lambda x: x.add_(1), _columns(1, 6, 2)),
        (_rows_written(2), _columns(3, 4, 1)),
        (lambda x: x.mul_(2), lambda x: x.split(5, 1)[1].transpose(0, 1)),
    ],
    ids=["all of it", "some rows", "a part of a split"],
)
@pytest.mark.parametrize("offset", [0, 1, 4])
def test_returned_view_of_a_written_input(
    inner: str, write: Callable, part: Callable, offset: int
) -> None:
    torch._dynamo.reset()
    program = _program(write, part)
    compiled = torch.compile(
        program, backend=contig_pass.contig_safe, options={"inner": inner}, dynamic=True,
        fullgraph=True,
    )
    with kernels.contracts():
        for rows in (4, 7):
            x = torch.arange(200.0)[offset : offset + rows * 16].view(rows, 16)
            same = torch.arange(200.0)[offset : offset + rows * 16].view(rows, 16)
            expected, same_view = program(same)
            kernels.received.clear()
            result, view = compiled(x)
            assert kernels.received
            assert kernels.bad() == []
            assert torch.equal(result, expected)
            assert torch.equal(x, same)
            assert view.data_ptr() - x.data_ptr() == same_view.data_ptr() - same.data_ptr()
            assert view.stride() == same_view.stride()
            view.zero_()
            same_view.zero_()
            assert torch.equal(x, same)


def _writes_and_returns_view(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x.add_(1)
    return kernels.rows(x), x[:, 2:7]


def _returns_view_of_another(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    y = x + 1
    x.copy_(y)
    return kernels.rows(y), y[:, 2:7]


@pytest.mark.parametrize("order", [1, -1])
def test_view_of_a_new_value_stays_one_beside_a_cached_view_of_the_input(order: int) -> None:
    """Both programs are one ATen graph; only torch's own notes tell them apart."""
    programs = [_writes_and_returns_view, _returns_view_of_another][::order]
    for dynamic in (False, True):
        for program in programs:
            torch._dynamo.reset()
            compiled = torch.compile(
                program, backend=contig_pass.contig_safe, fullgraph=True, dynamic=dynamic
            )
            x = torch.arange(100.0)[4:68].view(4, 16)
            with kernels.contracts():
                _, view = compiled(x)
            aliased = view.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
            assert aliased is (program is _writes_and_returns_view)
            assert torch.equal(view, x[:, 2:7])
