"""What an opaque op allocated is given back when it was read last, and taken over by nothing."""

from __future__ import annotations

import weakref

import pytest
import torch

import contig_pass

_LIBRARY = torch.library.Library("freeing_tests", "DEF")
_LIBRARY.define("step(Tensor x) -> Tensor")
_alive: list[list[bool]] = []
_made: list[weakref.ref] = []
_start = {"byte": 4}


def _step(x: torch.Tensor) -> torch.Tensor:
    """x + 1, off 16 bytes, and which earlier results are alive while it runs."""
    _alive.append([made() is not None for made in _made])
    memory = torch.empty(x.numel() * 4 + 65, dtype=torch.uint8)
    start = -memory.data_ptr() % 64 + _start["byte"]
    out = memory[start : start + x.numel() * 4].view(torch.float32).view(x.shape)
    out.copy_(x + 1)
    _made.append(weakref.ref(out))
    return out


_LIBRARY.impl("step", _step, "CPU")
torch.library.register_fake("freeing_tests::step", lambda x: torch.empty_like(x), lib=_LIBRARY)
step = torch.ops.freeing_tests.step


def _program(x: torch.Tensor) -> torch.Tensor:
    for _ in range(4):
        x = step(x)
    return x * 2


@pytest.mark.parametrize("bound", [True, False])
def test_results_are_freed_one_after_the_other(bound: bool) -> None:
    if bound:
        contig_pass.register_contract(
            "freeing_tests::step", "x", [contig_pass.AlignedPointer(4)]
        )
    x = torch.arange(32.0).view(4, 8)
    compiled = torch.compile(_program, backend=contig_pass.contig_safe, fullgraph=True)
    assert torch.equal(compiled(x), _program(x))
    _alive.clear()
    _made.clear()
    out = compiled(x)
    assert torch.equal(out, 2 * (x + 4))
    # Only what the op itself reads is alive.
    assert [sum(alive) for alive in _alive] == [0, 1, 1, 1]


def test_results_that_are_checked_are_freed_as_well() -> None:
    """A copy serves the op where its operand does not start on 16 bytes."""
    contig_pass.register_contract("freeing_tests::step", "x", [contig_pass.AlignedPointer(16)])
    x = torch.arange(32.0).view(4, 8)
    compiled = torch.compile(_program, backend=contig_pass.contig_safe, fullgraph=True)
    compiled(x)
    _alive.clear()
    _made.clear()
    assert torch.equal(compiled(x), 2 * (x + 4))
    assert [sum(alive) for alive in _alive] == [0, 1, 1, 1]


def test_plain_inductor_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_start, "byte", 0)  # it asserts that results start on 16 bytes
    x = torch.arange(32.0).view(4, 8)
    contig_pass.register_contract("freeing_tests::step", "x", [contig_pass.AlignedPointer(16)])
    torch.compile(_program, backend=contig_pass.contig_safe)(x)
    torch._dynamo.reset()
    plain = torch.compile(lambda x: step(step(x) + 1), backend="inductor")
    assert torch.equal(plain(x), x + 3)
