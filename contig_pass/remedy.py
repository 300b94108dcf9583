"""What a copy can do for an operand that breaks its rules, whoever makes the copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from contig_pass.contracts.registry import Contract
from contig_pass.contracts.rules import KEEP, ROW, STRIDES, Rule, dim_order, order_name
from contig_pass.layout import FRESH_ALIGNMENT, IntLike, Layout, dense_strides


@dataclass(frozen=True, eq=False)
class Remedy:
    """What a copy can do for a use.

    Attributes:
        order: name of the copy's order.
        after: layout of the copy.
        helps: some rule that is broken, or cannot be proved, holds for the copy.
        obstacle: what no copy can repair, in words; ``None``: nothing.
    """

    order: str
    after: Layout
    helps: bool
    obstacle: str | None


def remedy_of(
    layout: Layout, contract: Contract, rules: Sequence[Rule], open_rules: Sequence[Rule]
) -> Remedy:
    """What a copy does for an operand of ``layout``.

    Args:
        layout: as the operand is.
        contract: what binds it.
        rules: all rules to keep: the contract's, and those that a policy adds.
        open_rules: those of them that are broken or cannot be proved.
    """
    name, after = _copy_for(layout, contract, rules)
    repaired = [r for r in open_rules if r.by_copy and r.check(after) is not False]
    spoiled = [r for r in rules if r not in open_rules and r.check(after) is False]
    if spoiled:
        # Rows that lie far enough apart as they are may be too short to lie end to end.
        kept = _copy_layout(layout, layout.strides)
        if all(rule.check(kept) for rule in rules):
            return Remedy(STRIDES, kept, True, None)
        return Remedy(name, after, False, _beyond_copies(spoiled, after, "would break"))
    hopeless = [r for r in open_rules if r not in repaired]
    obstacle = _beyond_copies(hopeless, after, "would still break") if hopeless else None
    return Remedy(name, after, bool(repaired), obstacle)


def lossy_remedy(
    layout: Layout, contract: Contract, rules: Sequence[Rule], reason: str
) -> Remedy:
    """The copy that :func:`remedy_of` would make, which must not be made for ``reason``."""
    name, after = _copy_for(layout, contract, rules)
    return Remedy(name, after, False, reason)


def _copy_for(
    layout: Layout, contract: Contract, rules: Sequence[Rule]
) -> tuple[str, Layout]:
    """Name of the copy's order, and its layout."""
    if contract.keep_strides:
        return STRIDES, _copy_layout(layout, layout.strides)
    order = _order_of(layout, contract, rules)
    return order_name(order), _copy_layout(layout, dense_strides(layout.shape, order))


def _order_of(layout: Layout, contract: Contract, rules: Sequence[Rule]) -> tuple[int, ...]:
    """Order of dimensions that the repairing copy gets."""
    orders = [rule.order for rule in rules if rule.order is not None]
    kept = dim_order(KEEP, layout)
    if contract.keep_order or not orders:
        after = _copy_layout(layout, dense_strides(layout.shape, kept))
        if all(rule.check(after) is not False for rule in rules if rule.by_copy):
            return kept
    return dim_order(orders[0] if orders else ROW, layout)


def _copy_layout(before: Layout, strides: tuple[IntLike, ...]) -> Layout:
    return Layout(before.shape, strides, 0, FRESH_ALIGNMENT, before.dtype, before.device)


def _beyond_copies(rules: Sequence[Rule], after: Layout, verb: str) -> str:
    words = "; ".join(rule.describe() for rule in rules)
    return f"a dense copy, {after.describe()}, {verb}: {words}"
