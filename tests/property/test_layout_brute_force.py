"""The predicates of Layout against brute force over the addresses of real tensors."""

from __future__ import annotations

import itertools
import math

import torch
from hypothesis import HealthCheck, assume, given, seed, settings
from hypothesis import strategies as st

from contig_pass.layout import Layout, dense_strides

DTYPES = (
    torch.float32, torch.bfloat16, torch.int8, torch.uint8, torch.float8_e4m3fn,
    torch.float8_e8m0fnu, torch.float4_e2m1fn_x2, torch.float64,
)
MEMORY = 1 << 16
_buffer = torch.zeros(MEMORY, dtype=torch.uint8)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Strided tensors over one buffer: arbitrary, dense in some order, or nearly so."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
    kind = draw(st.sampled_from(("any", "dense", "padded")))
    if kind == "any":
        strides = tuple(draw(st.integers(0, 24)) for _ in shape)
    else:
        order = draw(st.permutations(range(len(shape))))
        strides = dense_strides(shape, order)
        if kind == "padded" and shape:
            outer = draw(st.integers(0, len(shape) - 1))
            factor = draw(st.sampled_from((1, 2, 3)))
            strides = tuple(s * factor if i == outer else s for i, s in enumerate(strides))
    start = draw(st.integers(0, 40))
    view = _buffer[start * dtype.itemsize :]
    view = view[: view.numel() // dtype.itemsize * dtype.itemsize]
    extent = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True) if n > 0)
    assume(extent * dtype.itemsize < view.numel())
    return view.view(dtype).as_strided(shape, strides)


def _positions(tensor: torch.Tensor) -> list[int]:
    """Element positions of every index, in row-major order of the indices."""
    indices = itertools.product(*(range(n) for n in tensor.shape))
    return [sum(i * s for i, s in zip(index, tensor.stride(), strict=True)) for index in indices]


def _fills_one_block(tensor: torch.Tensor) -> bool:
    return sorted(_positions(tensor)) == list(range(tensor.numel()))


@seed(20260)
@settings(
    max_examples=20_000, deadline=None, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
@given(tensors(), st.sampled_from((1, 2, 4, 8, 16, 32, 64)), st.integers(1, 20))
def test_predicates_agree_with_brute_force(tensor: torch.Tensor, nbytes: int, n: int) -> None:
    layout = Layout.of(tensor)
    positions = _positions(tensor)
    shape, strides, itemsize = tensor.shape, tensor.stride(), tensor.element_size()

    assert layout.numel == len(positions)
    assert layout.nbytes == len(positions) * itemsize
    assert layout.is_empty() is (not positions)
    assert layout.pointer_aligned(nbytes) is (tensor.data_ptr() % nbytes == 0)
    assert layout.overlaps() is (len(set(positions)) < len(positions))
    assert layout.dense() is (not positions or _fills_one_block(tensor))
    assert layout.contiguous() is tensor.is_contiguous()
    stepped = [s * itemsize for d, s in zip(shape, strides, strict=True) if d > 1 and s != 1]
    assert layout.pitch_aligned(nbytes) is all(s % nbytes == 0 for s in stepped)
    if not shape:
        return
    assert layout.size_multiple(n) is (shape[-1] % n == 0)
    if positions:
        width = shape[-1]
        lines = [positions[at : at + width] for at in range(0, len(positions), width)]
        steps = {b - a for line in lines for a, b in itertools.pairwise(line)}
        assert layout.unit_stride(-1) is (steps <= {1})
    if positions and layout.overlaps() is False:
        order = layout.dim_order()
        assert order is not None
        counted = [strides[d] for d in order if shape[d] > 1]
        assert counted == sorted(counted, reverse=True)
    if len(shape) >= 2 and positions:
        rows, columns = shape[-2:]
        unit_last = columns == 1 or strides[-1] == 1
        unit_second = rows == 1 or strides[-2] == 1
        assert layout.row_major() is (unit_last and (rows == 1 or strides[-2] >= columns))
        assert layout.column_major() is (unit_second and (columns == 1 or strides[-1] >= rows))


@seed(20261)
@settings(max_examples=500, deadline=None, database=None)
@given(st.lists(st.integers(0, 5), max_size=4), st.randoms(use_true_random=False))
def test_dense_strides_are_those_of_a_permuted_empty(shape: list[int], random: object) -> None:
    order = list(range(len(shape)))
    random.shuffle(order)  # type: ignore[attr-defined]
    stored = torch.empty([shape[d] for d in order])
    back = [order.index(d) for d in range(len(shape))]
    assert dense_strides(shape, order) == stored.permute(back).stride()
    assert math.prod(shape) == stored.numel()
