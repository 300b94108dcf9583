"""Random chains of view and pointwise ops into contract ops, compiled by contig_safe.

Each kernel must receive operands that keep its contract, and every value must be bit-equal to
eager mode. ``CONTIG_PASS_PROGRAMS`` sets how many programs Inductor compiles (200).
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

PROGRAMS = int(os.environ.get("CONTIG_PASS_PROGRAMS", "200"))
SHARDS = 4
SINKS = (kernels.rows, kernels.columns, kernels.block, kernels.matrix)

Step = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Chain:
    """Steps from an input to a value, and the kernel that takes it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    steps: tuple[tuple[str, Step], ...]
    sink: Callable[[torch.Tensor], torch.Tensor]
    returned: bool

    def __repr__(self) -> str:
        steps = " -> ".join(name for name, _ in self.steps)
        return f"{self.dtype}{self.shape}@{self.offset} {steps} -> {self.sink}"

    def given(self) -> torch.Tensor:
        """The input: small integers, so that every operation is exact."""
        torch.manual_seed(len(self.steps))
        numel = torch.Size(self.shape).numel()
        flat = torch.randint(0, 5, (numel + self.offset,)).to(self.dtype)
        return flat[self.offset :].view(self.shape)

    def run(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        for _, step in self.steps:
            x = step(x)
        out = self.sink(x)
        return (out, x) if self.returned else (out,)


def _to(dtype: torch.dtype) -> Step:
    return lambda x: x.to(dtype)


@st.composite
def _step(draw: st.DrawFn, x: torch.Tensor) -> tuple[str, Step]:
    """One step that is legal on ``x``."""
    exact = x.dtype in (torch.float32, torch.bfloat16)
    kinds = ["transpose", "unsqueeze", "contiguous", "clone", "to fp32", "flip"]
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
        "expand": lambda x: x.narrow(dim, start, 1).expand(x.shape),
        "flatten": lambda x: x.reshape(-1),
        "split": lambda x: x.split(max(size // 2, 1), dim)[-1],
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
    offset = draw(st.integers(0, 9))
    value = torch.zeros(shape, dtype=dtype)
    steps = []
    for _ in range(draw(st.integers(1, 6))):
        step = draw(_step(value))
        value = step[1](value)
        steps.append(step)
        if value.dim() > 4 or value.numel() > 20_000:
            break
    returned = draw(st.booleans())
    return Chain(shape, dtype, offset, tuple(steps), draw(st.sampled_from(SINKS)), returned)


def _check(chain: Chain, inner: str) -> None:
    torch._dynamo.reset()
    x = chain.given()
    with kernels.contracts():
        expected = chain.run(x)
        kernels.received.clear()
        options = {"inner": inner}
        actual = torch.compile(
            lambda x: chain.run(x), backend=contig_pass.contig_safe, options=options, fullgraph=True
        )(x)
    assert kernels.received
    assert kernels.bad() == []
    for got, want in zip(actual, expected, strict=True):
        assert got.shape == want.shape
        assert got.dtype == want.dtype
        assert torch.equal(got.double(), want.double())
    report = contig_pass.last_reports()[-1]
    assert report.totals.uses == 1
    assert report.totals.fixes + report.totals.clean == 1


_COMMON = {
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
    "print_blob": True,
}


@pytest.mark.parametrize("shard", range(SHARDS))
def test_inductor(shard: int) -> None:
    @seed(7000 + shard)
    @settings(max_examples=-(-PROGRAMS // SHARDS), **_COMMON)
    @given(chains())
    def check(chain: Chain) -> None:
        with REGISTRY.scope():
            _check(chain, "inductor")

    check()


@pytest.mark.parametrize("shard", range(2))
def test_aot_eager(shard: int) -> None:
    @seed(8000 + shard)
    @settings(max_examples=100, **_COMMON)
    @given(chains())
    def check(chain: Chain) -> None:
        _check(chain, "aot_eager")

    check()
