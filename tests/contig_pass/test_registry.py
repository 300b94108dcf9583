"""Rules and the contract registry: what is refused, and in which words."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from contig_pass import (
    AlignedPitch,
    AlignedPointer,
    ColumnMajor,
    ContigPassError,
    Dense,
    Multiple,
    NoOverlap,
    RowMajor,
    Rule,
    UnitStrideLast,
    register_contract,
    unregister_contract,
)
from contig_pass.contracts import REGISTRY
from contig_pass.contracts.rules import order_name, parse_order
from contig_pass.errors import ContractError
from contig_pass.layout import Layout
from tests import kernels

ROWS = "layout_tests::rows"


def _layout(strides: tuple[int, int], offset: int = 0, shape: tuple[int, int] = (8, 16)) -> Layout:
    return Layout.of(torch.empty(600, device="meta").as_strided(shape, strides, offset))


@pytest.mark.parametrize(
    ("rule", "good", "bad"),
    [
        (RowMajor(), _layout((20, 1)), _layout((1, 8))),
        (ColumnMajor(), _layout((1, 8)), _layout((16, 1))),
        (Dense(), _layout((1, 8)), _layout((20, 1))),
        (Dense("row"), _layout((16, 1)), _layout((1, 8))),
        (Dense("column"), _layout((1, 8)), _layout((16, 1))),
        (UnitStrideLast(), _layout((5, 1)), _layout((32, 2))),
        (AlignedPointer(16), _layout((16, 1), 4), _layout((16, 1), 3)),
        (AlignedPitch(16), _layout((20, 1)), _layout((17, 1))),
        (Multiple(16), _layout((16, 1)), _layout((16, 1), 0, (8, 15))),
        (Multiple(4, dim=0), _layout((16, 1)), _layout((16, 1), 0, (7, 16))),
        (NoOverlap(), _layout((16, 1)), _layout((0, 1))),
    ],
)
def test_rules(rule: Rule, good: Layout, bad: Layout) -> None:
    assert rule.check(good) is True
    assert rule.check(bad) is False
    assert rule.describe()
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.nbytes = 3  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: AlignedPointer(12), "power of two from 1 to 64"),
        (lambda: AlignedPitch(128), "power of two from 1 to 64"),
        (lambda: Multiple(0), "int n >= 1"),
        (lambda: Dense("diagonal"), "None, 'row', 'column', or the dimensions"),
            (lambda: Dense("0,2"), "from outermost to innermost"),
        (lambda: parse_order("0,0", 2), "outermost to innermost"),
        (lambda: Rule().check(_layout((16, 1))), "does not define check"),
    ],
)
def test_bad_rules_say_what_would_be_right(make: object, words: str) -> None:
    with pytest.raises(ContractError, match=words):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("dims", [(0, 1), (1, 0), (0, 2, 1), (2, 0, 1)])
def test_order_names_are_read_back(dims: tuple[int, ...]) -> None:
    assert parse_order(order_name(dims), len(dims)) == dims


@pytest.mark.parametrize(
    ("op", "operand", "rules", "words"),
    [
        ("layout_tests::row", "x", [RowMajor()], "did you mean layout_tests::rows"),
        ("nowhere::op", "x", [RowMajor()], "import the package that registers ops in namespace"),
        ("rows", "x", [RowMajor()], "name it as 'namespace::name'"),
        (ROWS + ".out", "x", [RowMajor()], "no overload 'out'; it has default"),
        (ROWS, "y", [RowMajor()], "does not exist; its tensor operands are x"),
        ("aten::_scaled_mm", "out_dtype", [RowMajor()], "is not a tensor"),
        (ROWS, "x", [], "no rules given"),
        (ROWS, "x", [RowMajor], "is not a rule"),
        (ROWS, "x", [RowMajor(), ColumnMajor()], "no layout can be column and row-major at once"),
        (ROWS, "x", [Dense("column"), RowMajor()], "at once"),
        ("aten::_scaled_mm", "self", [RowMajor()], None),
    ],
)
def test_bad_contracts_fail_at_registration(
    op: str, operand: str, rules: list, words: str | None
) -> None:
    before = REGISTRY.digest()
    if words is None:  # another condition than the built-in ones: joins them
        register_contract(op, operand, rules)
        return
    with pytest.raises(ContractError, match=words) as caught:
        register_contract(op, operand, rules)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ContigPassError)
    assert REGISTRY.digest() == before


def test_a_second_contract_is_refused_until_the_first_is_removed() -> None:
    register_contract(ROWS, "x", [RowMajor()])
    with pytest.raises(ContractError, match="has a contract already"):
        register_contract(torch.ops.layout_tests.rows, "x", [AlignedPointer(16)])
    unregister_contract(ROWS, "x")
    register_contract(torch.ops.layout_tests.rows.default, "x", [AlignedPointer(16)])
    assert REGISTRY.knows(kernels.rows.default)
    unregister_contract(ROWS, "x")
    assert not REGISTRY.knows(kernels.rows.default)
    with pytest.raises(ContractError, match="no contract"):
        unregister_contract(ROWS, "x")


def test_the_digest_covers_rules_and_conditions() -> None:
    digests = {REGISTRY.digest()}
    variants: list[dict] = [
        {"rules": [AlignedPointer(16)]},
        {"rules": [AlignedPointer(32)]},
        {"rules": [AlignedPointer(16)], "when": lambda call: True},
        {"rules": [AlignedPointer(16)], "when": lambda call: call.target.kind == "cuda"},
        {"rules": [AlignedPointer(16)], "keep_order": True},
    ]
    for variant in variants:
        with REGISTRY.scope():
            register_contract(ROWS, "x", **variant)
            digests.add(REGISTRY.digest())
    assert len(digests) == len(variants) + 1
