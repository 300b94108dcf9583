"""The compiled loop over addresses agrees with Python's, and Python's serves without it."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from contig_pass import inputs
from contig_pass.inductor import addresses

COUNT = 200


def _tensors(bad: set[int]) -> list[object]:
    """Tensors that start ``4 * position`` bytes off 16 where ``bad`` says so."""
    return [torch.zeros(20)[(1 + i % 3) * (i in bad) :] for i in range(COUNT)]


def test_it_finds_what_is_misaligned_and_looks_nowhere_else() -> None:
    generator = random.Random(0)
    for _ in range(50):
        positions = sorted(generator.sample(range(COUNT), 80))
        bad = set(generator.sample(range(COUNT), generator.choice((0, 1, 3))))
        quick = addresses.all_aligned(positions)
        assert quick is not None
        assert quick(_tensors(bad)) is bad.isdisjoint(positions)


def test_what_has_no_address_is_not_called_aligned() -> None:
    quick = addresses.all_aligned(range(COUNT))
    assert quick is not None
    for odd in (None, 3, torch.eye(3).to_sparse()):
        given = _tensors(set())
        given[7] = odd
        assert not quick(given)
    with pytest.raises(IndexError):
        quick(_tensors(set())[:100])


def test_few_inputs_are_left_to_python() -> None:
    assert addresses.all_aligned(range(addresses.WORTH_IT - 1)) is None


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> Iterator[None]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", lambda: "no-such-compiler")
    addresses._loop.cache_clear()
    yield
    addresses._loop.cache_clear()


def _realigned() -> None:
    seen: list[list[int]] = []

    def graph(values: list[object]) -> list[object]:
        seen.append([v.data_ptr() % 16 for v in values])  # type: ignore[attr-defined]
        return values

    run = inputs.realigning(graph, range(COUNT))
    aligned = _tensors(set())
    assert run(aligned) is aligned
    run(_tensors({0, 5, COUNT - 1}))
    assert seen == [[0] * COUNT] * 2


def test_inputs_are_realigned_behind_it() -> None:
    assert addresses.all_aligned(range(COUNT)) is not None
    _realigned()


@pytest.mark.usefixtures("no_compiler")
def test_inputs_are_realigned_without_a_compiler() -> None:
    assert addresses.all_aligned(range(COUNT)) is None
    _realigned()
