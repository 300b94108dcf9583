"""Random programs with copies in them: taking out what is without effect changes nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

import contig_pass
from contig_pass.contracts import REGISTRY
from tests import kernels

SEED = 20260115
Step = Callable[[list[torch.Tensor]], torch.Tensor]
_COMMON = {
    "deadline": None, "database": None, "suppress_health_check": list(HealthCheck),
    "print_blob": True,
}


@dataclass(frozen=True)
class Program:
    """Steps that each append a tensor to a list, or write to one in it; then some are returned.

    Attributes:
        steps: (description, function) each.
        returned: positions in the list.
    """

    steps: tuple[tuple[str, Step], ...]
    returned: tuple[int, ...]

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values = [x, y, x[:, 1:]]
        for _, step in self.steps:
            values.append(step(values))
        return tuple(values[at] for at in self.returned)

    def __repr__(self) -> str:
        return f"{'; '.join(name for name, _ in self.steps)} -> {self.returned}"


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(6, 6, generator=generator)
    return x, torch.randn(40, generator=generator)[1:37].view(6, 6).t()


def _square(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1)[:9].view(3, 3)


#: Twice as many that copy as of others, and each other kind of reader.
_UNARY: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "clone": lambda x: x.clone(),
    "contiguous": lambda x: x.contiguous(),
    "t-contiguous-t": lambda x: x.t().contiguous().t(),
    "column": lambda x: x.t().clone(memory_format=torch.contiguous_format).t(),
    "to": lambda x: x.to(torch.float32, copy=True),
    "reshape": lambda x: x.t().reshape(-1).view(x.shape[1], x.shape[0]),
    "t": lambda x: x.t(),
    "narrow": lambda x: x[:, : max(x.shape[1] - 1, 4)],
    "square": _square,
    "add": lambda x: x + 1,
    "mul": lambda x: x * 0.5,
    "exp": lambda x: (x * 0.01).exp(),
    "product": lambda x: x @ x.t() * 0.01,
    "sum": lambda x: x + x.sum(0, keepdim=True),
    "cat": lambda x: torch.cat([x, x])[: x.shape[0]],
    "rows": lambda x: kernels.rows(x),
    "block": lambda x: kernels.block(x),
    "add_": lambda x: x.add_(1),
    "mul_ view": lambda x: (x, x[1:].mul_(0.5))[0],
}
_COPYING = ("clone", "contiguous", "t-contiguous-t", "column", "to")


@st.composite
def programs(draw: st.DrawFn) -> Program:
    steps = []
    count = draw(st.integers(2, 9))
    for number in range(count):
        name = draw(st.sampled_from((*_UNARY, *_COPYING, *_COPYING)))
        at = draw(st.integers(0, number + 2))
        if draw(st.booleans()):
            at = number + 2  # a chain

        def step(values: list[torch.Tensor], name: str = name, at: int = at) -> torch.Tensor:
            return _UNARY[name](values[at])

        steps.append((f"{number + 3} = {name} {at}", step))
    ends = draw(st.lists(st.integers(0, count + 2), min_size=1, max_size=3))
    return Program(tuple(steps), (count + 2, *ends))


def _run(program: Program, options: dict[str, object] | None) -> tuple[torch.Tensor, ...]:
    """Outputs and inputs afterwards."""
    given_ = inputs()
    if options is None:
        return (*program(*given_), *given_)
    torch._dynamo.reset()
    function = torch.compile(
        lambda x, y: program(x, y), backend=contig_pass.contig_safe, options=options,
        fullgraph=True, dynamic=False,
    )
    return (*function(*given_), *given_)


def _same(got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]) -> None:
    for one, other in zip(got, want, strict=True):
        assert one.stride() == other.stride()
        assert torch.equal(one.view(torch.int32), other.view(torch.int32))
    assert _aliases(got) == _aliases(want)


def _aliases(values: tuple[torch.Tensor, ...]) -> list[tuple[bool, int]]:
    """For each pair whether they share a storage, and how far apart in it they start."""
    found = []
    for one, other in itertools.combinations(values, 2):
        shared = one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
        found.append((shared, one.storage_offset() - other.storage_offset() if shared else 0))
    return found


def test_run_as_they_stand() -> None:
    removed = 0

    @seed(SEED)
    @settings(max_examples=160, **_COMMON)
    @given(programs())
    def check(program: Program) -> None:
        nonlocal removed
        expected = _run(program, None)
        options = {"inner": "aot_eager", "policy": "contract"}
        _same(_run(program, options), expected)
        contig_pass.forget_reports()
        _same(_run(program, {**options, "remove_redundant": True}), expected)
        for report in contig_pass.last_reports():
            removed += sum(copy.verdict == "removed" for copy in report.copies)
            assert all(copy.verdict != "redundant" for copy in report.copies)

    with kernels.contracts():
        check()
    assert removed > 40  # else nothing was put to the test


def test_compiled() -> None:
    @seed(SEED + 1)
    @settings(max_examples=15, **_COMMON)
    @given(programs())
    def check(program: Program) -> None:
        with REGISTRY.scope():
            kept = _run(program, {})
            _same(_run(program, {"remove_redundant": True}), kept)

    with kernels.contracts():
        check()
