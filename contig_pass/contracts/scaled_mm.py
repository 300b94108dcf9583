"""Contracts of the scaled and quantised matrix products.

Which rules bind depends on the scaling recipe. It is read off the scales in the first generation
of ops (``_scaled_mm``, ``_scaled_grouped_mm``) as torch itself does, and off the recipe arguments
in the second (``_scaled_mm_v2``, ``_scaled_grouped_mm_v2``). Shapes: a (M, K), b (K, N).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from contig_pass.contracts.registry import SCALED_MM, Call, Contract, When
from contig_pass.contracts.rules import (
    AlignedPitch,
    AlignedPointer,
    ColumnMajor,
    Dense,
    Multiple,
    RowMajor,
    Rule,
    UnitStrideLast,
)
from contig_pass.inductor.symbols import substituted
from contig_pass.layout import IntLike, Known, Layout, known

H100 = "measured on an H100, torch 2.11.0+cu130, cuBLASLt"
META = "torch._meta_registrations._check_scaled_mm_sizes and ScaledBlas.cpp"
META_V2 = "torch._meta_registrations._check_scaled_mm_sizes_v2"
META_GROUPED = "torch._meta_registrations._meta_grouped_mm_common and GroupedBlas.cpp"
PR_159957 = "pytorch/pytorch#159957: cuBLASLt reads scales from 16-byte boundaries"
INDUCTOR = "torch._inductor.kernel.mm.check_supported_striding"
CUBLASLT_INT8 = "cuBLASLt: int8 matrices start on 4 bytes, leading dimensions are multiples of 4"

TENSOR_WISE = "tensor-wise"
ROW_WISE = "row-wise"
BLOCK_1X128 = "1x128 blocks"
BLOCK_128X128 = "128x128 blocks"
MX = "MX blocks of 32"
NV = "NV blocks of 16"

#: torch.nn.functional.ScalingType, by value.
_RECIPE_BY_VALUE = (TENSOR_WISE, ROW_WISE, NV, MX, BLOCK_1X128, BLOCK_128X128)

_CUDA = When("CUDA", lambda call: call.target.kind == "cuda")
_CPU = When("CPU", lambda call: call.target.kind == "cpu")


def contracts() -> Iterator[Contract]:
    """Every built-in contract of this family."""
    for op in ("aten::_scaled_mm.default", "aten::_scaled_mm.out"):
        yield from _matrices(op, META)
        yield from _bias(op)
        yield from _scales(op, META)
    for op in ("aten::_scaled_mm_v2.default", "aten::_scaled_mm_v2.out"):
        yield from _matrices(op, META_V2)
        yield from _bias(op)
        yield from _scales(op, META_V2)
    for op in ("aten::_scaled_grouped_mm.default", "aten::_scaled_grouped_mm_v2.default"):
        yield from _grouped(op)
    for op in ("aten::_int_mm.default", "aten::_int_mm.out"):
        yield from _int_mm(op)


# -- the recipe of a call ------------------------------------------------------------------------


def recipe(call: Call, side: str) -> str | None:
    """The scaling recipe of operand ``side`` (``"a"`` or ``"b"``); ``None`` if it fits none."""
    listed = call.args.get(f"recipe_{side}")
    if listed is not None:
        values = [int(value) for value in listed]
        # Two-level NVFP4 lists its tensor-wise scale second.
        return _RECIPE_BY_VALUE[values[0]] if values else None
    return _recipe_of_shapes(call, side)


def _recipe_of_shapes(call: Call, side: str) -> str | None:
    """The recipe that the scales' dtypes and shapes mean, as ``_check_scaled_mm_sizes`` reads."""
    a, b = call.operands.get("self"), call.operands.get("mat2")
    scale_a, scale_b = call.operands.get("scale_a"), call.operands.get("scale_b")
    if a is None or b is None or scale_a is None or scale_b is None:
        return None
    if scale_a.dtype == torch.float8_e8m0fnu:
        return MX
    if scale_a.dtype == torch.float8_e4m3fn:
        return NV
    if known(scale_a.numel == 1) and known(scale_b.numel == 1):
        return TENSOR_WISE
    if side == "a":
        return _fp32_recipe(scale_a, a.shape[0], a.shape[1])
    return _fp32_recipe(_transposed(scale_b), b.shape[1], b.shape[0])


def _fp32_recipe(scale: Layout, rows: IntLike, k: IntLike) -> str | None:
    """Recipe of a scale of shape (rows or row blocks, 1 or K blocks)."""
    if scale.ndim != 2:
        return None
    per_row = known(scale.shape[0] == rows)
    if per_row and known(scale.shape[1] == 1):
        return ROW_WISE
    if not known(scale.shape[1] == (k + 127) // 128):
        return None
    if per_row:
        return BLOCK_1X128
    return BLOCK_128X128 if known(scale.shape[0] == (rows + 127) // 128) else None


def _transposed(scale: Layout) -> Layout:
    return Layout(
        scale.shape[::-1],
        scale.strides[::-1],
        scale.byte_offset,
        scale.base_alignment,
        scale.dtype,
        scale.device,
    )


def with_common_k(op: str, layouts: Mapping[str, Layout]) -> Mapping[str, Layout]:
    """``layouts`` with K as an int on both sides where it is one on either.

    torch does not compare the K of a with the K of b while it traces, so that under dynamic shapes
    one may stay symbolic beside a weight's. No product of another K can run.

    Args:
        op: ``namespace::name.overload``; ops of other families are left as they are.
        layouts: by operand name.
    """
    a, b = layouts.get("self"), layouts.get("mat2")
    if not op.startswith(("aten::_scaled_mm.", "aten::_scaled_mm_v2.")) or a is None or b is None:
        return layouts
    k_a, k_b = a.shape[-1], b.shape[-2]
    if isinstance(k_a, int) == isinstance(k_b, int):
        return layouts
    name, open_, number = ("mat2", k_b, k_a) if isinstance(k_a, int) else ("self", k_a, k_b)
    return {**layouts, name: _settled(layouts[name], open_, int(number))}


def _settled(layout: Layout, symbolic: IntLike, number: int) -> Layout:
    def known_values(values: tuple[IntLike, ...]) -> tuple[IntLike, ...]:
        return tuple(substituted(value, symbolic, number) for value in values)

    offset = substituted(layout.byte_offset, symbolic, number)
    return replace(
        layout, shape=known_values(layout.shape), strides=known_values(layout.strides),
        byte_offset=offset,
    )


def _scaled(side: str, *recipes: str) -> When:
    """CUDA, and operand ``side`` scaled by one of ``recipes``."""
    words = f"CUDA, {side} scaled {' or '.join(recipes)}"
    return When(
        words, lambda call: call.target.kind == "cuda" and recipe(call, side) in recipes
    )


# -- _scaled_mm and _scaled_mm_v2 ----------------------------------------------------------------


def _contract(op: str, operand: str, rules: tuple[Rule, ...], source: str, when: When) -> Contract:
    matrix = operand in ("self", "mat2")
    return Contract(op, operand, rules, source, when, family=SCALED_MM, dense=matrix)


def _matrices(op: str, meta: str) -> Iterator[Contract]:
    a_order, b_order = RowMajor(size_one_counts=True), ColumnMajor(size_one_counts=True)
    # Pitches of K+4 to K+12 bytes are refused with row-wise scales. With tensor-wise ones cuBLASLt
    # accepts them for some shapes and refuses them for others, so only 16 is safe. Rows that
    # overlap (pitch below K) gave wrong values without an error in one probe; with a pitch of K-16
    # eager mode copies them and is right.
    memory = (AlignedPointer(16), AlignedPitch(16))
    a_rules = (a_order, *memory, Multiple(16, -1))
    b_rules = (b_order, *memory, Multiple(16, -2), Multiple(16, -1))
    yield _contract(op, "self", a_rules, f"{meta}; {H100}", _CUDA)
    yield _contract(op, "mat2", b_rules, f"{meta}; {H100}", _CUDA)
    yield _contract(op, "self", (a_order,), INDUCTOR, _CPU)
    yield _contract(op, "mat2", (b_order,), INDUCTOR, _CPU)


def _bias(op: str) -> Iterator[Contract]:
    # Off by an odd number of elements: an asynchronous "misaligned address" with fast accumulation,
    # a refusal without; off by 4 or 8 bytes: accepted for some shapes only. Strided: wrong values.
    yield _contract(op, "bias", (Dense("row"), AlignedPointer(16)), H100, _CUDA)


def _scales(op: str, meta: str) -> Iterator[Contract]:
    outer_major = {"a": Dense("column"), "b": Dense("row")}
    if op.startswith("aten::_scaled_mm_v2"):
        outer_major["b"] = Dense("column")  # b's scales come as (N, K/128) there
    in_order = Dense("row")
    for side in "ab":
        # One row of 128x128 blocks is read as K/128 scales padded to a multiple of 4: a tighter
        # pitch gives wrong values without an error, a wider one is refused.
        by_recipe = (
            ((TENSOR_WISE, ROW_WISE), (in_order,), H100),
            ((BLOCK_1X128,), (outer_major[side],), f"{meta}; {H100}"),
            ((BLOCK_128X128,), (_k_major(op, side), _PaddedBlocks()), f"{meta}; {H100}"),
            ((MX, NV), (in_order,), meta),
        )
        for recipes, rules, source in by_recipe:
            rules = (*rules, AlignedPointer(16))
            when = _scaled(side, *recipes)
            yield _contract(op, f"scale_{side}", rules, f"{source}; {PR_159957}", when)


def _k_major(op: str, side: str) -> Rule:
    """Rule of a 128x128 scale: the K blocks of one row block follow each other."""
    if op.startswith("aten::_scaled_mm_v2"):
        return ColumnMajor()  # (K blocks, row blocks) on either side
    return RowMajor() if side == "a" else ColumnMajor()


@dataclass(frozen=True)
class _PaddedBlocks(Rule):
    """Scales of 128x128 blocks: a row of K blocks is as long as the next multiple of 4."""

    def check(self, layout: Layout) -> Known:
        inner = 0 if known(layout.strides[0] == 1) else 1
        rows = layout.shape[1 - inner]
        if known(rows == 1):
            return True
        padded = (layout.shape[inner] + 3) // 4 * 4
        return known(layout.strides[1 - inner] == padded)

    def describe(self) -> str:
        return "rows of blocks padded to the next multiple of 4"


# -- grouped and int8 ----------------------------------------------------------------------------


def _grouped(op: str) -> Iterator[Contract]:
    rules = (AlignedPointer(16), AlignedPitch(16))
    source = f"{META_GROUPED}; {H100}"
    yield _contract(op, "self", (RowMajor(), *rules), source, _CUDA)
    yield _contract(op, "mat2", (ColumnMajor(), *rules), source, _CUDA)
    for operand in ("scale_a", "scale_b"):
        yield _contract(op, operand, (UnitStrideLast(), AlignedPointer(4)), source, _CUDA)
    yield _contract(op, "offs", (Dense("row"), AlignedPointer(4)), META_GROUPED, _CUDA)
    yield _contract(op, "bias", (Dense("row"), AlignedPointer(16)), META_GROUPED, _CUDA)


def _int_mm(op: str) -> Iterator[Contract]:
    # Either order is accepted: the cuBLAS preparation transposes or clones by strides alone.
    for operand in ("self", "mat2"):
        rules = (AlignedPointer(4), AlignedPitch(4))
        yield _contract(op, operand, rules, f"{CUBLASLT_INT8}; {H100}", _CUDA)
