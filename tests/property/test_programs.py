"""Random programs of view and pointwise ops around contract ops, compiled by contig_safe.

A program is called with one to three inputs of other storage offsets, if it is compiled for
dynamic shapes of other sizes too, and may write to its input. Each kernel must receive operands
that keep its contract; every output and the input must be bit-equal to eager mode's.

``CONTIG_PASS_PROGRAMS`` sets how many programs Inductor compiles (300), ``CONTIG_PASS_SHARDS`` in
how many tests (4), ``CONTIG_PASS_SEED`` the seed of the first test (7000; one more for each).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

import contig_pass
from contig_pass.contracts import REGISTRY
from tests import kernels

PROGRAMS = int(os.environ.get("CONTIG_PASS_PROGRAMS", "300"))
SHARDS = int(os.environ.get("CONTIG_PASS_SHARDS", "4"))
SEED = int(os.environ.get("CONTIG_PASS_SEED", "7000"))
#: Inductor of torch 2.11 computes values from what is written to their input later: most often
#: those of ``flip``, which are left out there. Of clones and slices some are wrong as well.
FLIPS = ["flip"] if torch.__version__ >= "2.12" else []
SINKS = (kernels.rows, kernels.columns, kernels.block, kernels.matrix)

Step = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Mutation:
    """Adds 1 to the input, or to what is left of it from ``start`` on along ``dim``.

    Attributes:
        after: how many steps run before; one more than there are: after all kernels, too.
    """

    after: int
    dim: int
    start: int

    def run(self, x: torch.Tensor) -> None:
        target = x.narrow(self.dim, self.start, x.shape[self.dim] - self.start)
        (target if self.start else x).add_(1)


@dataclass(frozen=True)
class Chain:
    """Steps from an input to a value, and the kernels that take it on the way.

    Attributes:
        calls: storage offset of each call's input, and by how much its dimensions are larger.
        sinks: kernels, each with the number of steps that run before.
        returned: the last value is an output as well.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    calls: tuple[tuple[int, int], ...]
    steps: tuple[tuple[str, Step], ...]
    sinks: tuple[tuple[int, Callable[[torch.Tensor], torch.Tensor]], ...]
    mutation: Mutation | None
    returned: bool
    dynamic: bool

    def __repr__(self) -> str:
        steps = " -> ".join(name for name, _ in self.steps)
        sinks = ", ".join(f"{sink} after {at}" for at, sink in self.sinks)
        return (
            f"{self.dtype}{self.shape} calls (offset, growth) {self.calls}, "
            f"dynamic {self.dynamic}: {steps}; {sinks}; {self.mutation}; returned {self.returned}"
        )

    def given(self, offset: int, growth: int) -> torch.Tensor:
        """An input of small integers, so that every operation is exact."""
        torch.manual_seed(len(self.steps))
        shape = torch.Size(size + growth for size in self.shape)
        flat = torch.randint(0, 3, (shape.numel() + offset,)).to(self.dtype)
        return flat[offset:].view(shape)

    def run(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        value, outputs = x, []
        for at in range(len(self.steps) + 2):
            if self.mutation is not None and self.mutation.after == at:
                self.mutation.run(x)
            outputs += [sink(value) for after, sink in self.sinks if after == at]
            if at < len(self.steps):
                value = self.steps[at][1](value)
        return (*outputs, value) if self.returned else tuple(outputs)


def _to(dtype: torch.dtype) -> Step:
    return lambda x: x.to(dtype)


@st.composite
def _step(draw: st.DrawFn, x: torch.Tensor) -> tuple[str, Step]:
    """One step that is legal on ``x``."""
    exact = x.dtype in (torch.float32, torch.bfloat16)
    kinds = ["transpose", "unsqueeze", "contiguous", "clone", "to fp32", *FLIPS]
    if x.dim():
        kinds += ["slice", "slice", "slice", "select", "expand", "flatten", "split", "repeat"]
    if exact:
        kinds += ["add", "relu", "mul", "to fp8", "to bf16", "cat", "pad"]
    if x.dtype in (torch.int8, torch.float8_e4m3fn):
        kinds += ["bytes"]
    kind = draw(st.sampled_from(kinds))
    dim = draw(st.integers(0, max(x.dim() - 1, 0)))
    size = x.shape[dim] if x.dim() else 1
    start = draw(st.integers(0, max(size - 1, 0)))
    length = draw(st.integers(1, max(size - start, 1)))
    width = draw(st.integers(1, 3))
    other = draw(st.integers(0, max(x.dim() - 1, 0)))
    steps: dict[str, Step] = {
        "transpose": lambda x: x.transpose(dim, other) if x.dim() else x,
        "unsqueeze": lambda x: x.unsqueeze(dim),
        "contiguous": lambda x: x.contiguous(),
        "clone": lambda x: x.clone(),
        "to fp32": _to(torch.float32),
        "to bf16": _to(torch.bfloat16),
        "to fp8": _to(torch.float8_e4m3fn),
        "flip": lambda x: x.to(torch.float32).flip(dim) if x.dim() else x,
        "slice": lambda x: x.narrow(dim, start, length)[..., ::width],
        "select": lambda x: x.select(dim, start),
        # Inductor takes a slice of symbolic length for longer than 1 and expands it wrongly.
        "expand": lambda x: x.select(dim, start).unsqueeze(dim).expand(x.shape),
        "flatten": lambda x: x.reshape(-1),
        # The second part, which a larger input has as well, in full.
        "split": lambda x: x.split(max(size // 2, 1), dim)[int(size > 1)],
        "repeat": lambda x: x.unsqueeze(0).expand(width, *x.shape),
        "add": lambda x: x + 1,
        "relu": lambda x: x.relu(),
        "mul": lambda x: x * 2,
        "cat": lambda x: torch.cat([x, x + 1], dim) if x.dim() else x,
        "pad": lambda x: torch.nn.functional.pad(x, (width, 1)) if x.dim() else x,
        "bytes": lambda x: x.view(torch.int8),
    }
    return f"{kind}({dim},{start},{length},{width},{other})", steps[kind]


@st.composite
def chains(draw: st.DrawFn) -> Chain:
    shape = tuple(draw(st.lists(st.integers(1, 20), min_size=1, max_size=3)))
    dtype = draw(st.sampled_from((torch.float32, torch.bfloat16, torch.int8)))
    dynamic = draw(st.sampled_from((False, False, True)))
    offsets = draw(st.lists(st.integers(0, 9), min_size=1 + dynamic, max_size=3))
    growths = draw(st.permutations((0, 1, 4))) if dynamic else (0, 0, 0)
    value = torch.zeros(shape, dtype=dtype)
    steps: list[tuple[str, Step]] = []
    for _ in range(draw(st.integers(1, 6))):
        step = draw(_step(value))
        if step[0].startswith("clone") and any(name.startswith("clone") for name, _ in steps):
            # Inductor takes the second clone of an input away, and its result then sees what is
            # written to the input later (torch 2.13, remove_noop_ops).
            continue
        value = step[1](value)
        steps.append(step)
        if value.dim() > 4 or value.numel() > 20_000:
            break
    sinks = [(len(steps), draw(st.sampled_from(SINKS)))]
    for _ in range(draw(st.sampled_from((0, 0, 1, 2)))):
        sinks.append((draw(st.integers(0, len(steps))), draw(st.sampled_from(SINKS))))
    return Chain(
        shape, dtype, tuple(zip(offsets, growths, strict=False)), tuple(steps), tuple(sinks),
        draw(st.none() | _mutations(shape, len(steps))), draw(st.booleans()), dynamic,
    )


@st.composite
def _mutations(draw: st.DrawFn, shape: tuple[int, ...], steps: int) -> Mutation:
    dim = draw(st.integers(0, len(shape) - 1))
    return Mutation(draw(st.integers(0, steps + 1)), dim, draw(st.integers(0, shape[dim] - 1)))


def _check(chain: Chain, inner: str) -> None:
    torch._dynamo.reset()
    contig_pass.forget_reports()
    compiled = torch.compile(
        lambda x: chain.run(x), backend=contig_pass.contig_safe, options={"inner": inner},
        fullgraph=True, dynamic=chain.dynamic,
    )
    with kernels.contracts():
        for call in chain.calls:
            _compare(chain, compiled, call)
    for report in contig_pass.last_reports():
        # Equal kernels on one value are one.
        assert 1 <= report.totals.uses <= len(chain.sinks)
        assert report.totals.fixed_uses + report.totals.clean == report.totals.uses


def _compare(
    chain: Chain, compiled: Callable[[torch.Tensor], tuple], call: tuple[int, int]
) -> None:
    x, same = chain.given(*call), chain.given(*call)
    expected = chain.run(same)
    kernels.received.clear()
    actual = compiled(x)
    assert kernels.received
    assert kernels.bad() == []
    for got, want in zip((*actual, x), (*expected, same), strict=True):
        assert got.shape == want.shape
        assert got.dtype == want.dtype
        assert torch.equal(got.double(), want.double())


_COMMON = {
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
    "print_blob": True,
}


@pytest.mark.parametrize("shard", range(SHARDS))
def test_inductor(shard: int) -> None:
    @seed(SEED + shard)
    @settings(max_examples=-(-PROGRAMS // SHARDS), **_COMMON)
    @given(chains())
    def check(chain: Chain) -> None:
        with REGISTRY.scope():
            _check(chain, "inductor")

    check()


@pytest.mark.parametrize("shard", range(2))
def test_aot_eager(shard: int) -> None:
    @seed(SEED + 1000 + shard)
    @settings(max_examples=100, **_COMMON)
    @given(chains())
    def check(chain: Chain) -> None:
        _check(chain, "aot_eager")

    check()
