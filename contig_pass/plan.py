"""Decide which copies to make and at what price. Edits nothing.

Safety and profit are apart: :func:`_remedy` says what a copy can do for a use, the policy says
whether it is made, and the price is reported either way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import fx

from contig_pass.analysis import Analysis, Use
from contig_pass.contracts.rules import AlignedPointer, Rule
from contig_pass.cost import bandwidth_of
from contig_pass.errors import LayoutViolation
from contig_pass.facts import COMPUTED, OPAQUE
from contig_pass.layout import Layout
from contig_pass.memory import can_redirect
from contig_pass.provenance import origin_of
from contig_pass.remedy import Remedy, lossy_remedy, remedy_of

DENSE = "dense"
CONTRACT = "contract"
AUDIT = "audit"
STRICT = "strict"
POLICIES = (DENSE, CONTRACT, AUDIT, STRICT)


@dataclass(eq=False)
class Fix:
    """One relayout, shared by every use that wants the same thing.

    Attributes:
        source: the node whose value is copied.
        order: name of the copy's order (``"row"``, ``"column"``, or dimensions outermost first).
        after: layout of the copy.
        uses: the uses that read the copy.
        nbytes: bytes read plus bytes written for the copy's sake; ``None`` if symbolic.
        microseconds: modelled time for them; ``None`` if symbolic.
        fused: the copy is computed by its producer's kernel, so nothing is read again.
        write_back: the op writes to the copy, and what it wrote is put back where it belongs.
    """

    source: fx.Node
    order: str
    after: Layout
    uses: list[Use] = field(default_factory=list)
    nbytes: int | None = None
    microseconds: float | None = None
    fused: bool = False
    write_back: bool = False


@dataclass(frozen=True, eq=False)
class Check:
    """Uses of memory that an opaque op allocated: its address is looked at when the graph runs.

    Attributes:
        source: the node whose value is looked at.
        alignment: bytes that its address must be a multiple of; if it is not, it is copied.
        uses: the uses that read it.
    """

    source: fx.Node
    alignment: int
    uses: tuple[Use, ...]


@dataclass(frozen=True, eq=False)
class Pin:
    """Uses of ``source`` that are right already, if the compiler keeps to this layout.

    Attributes:
        source: the node whose value is held.
        alignment: bytes that its address must be a multiple of.
        uses: the uses that read it.
    """

    source: fx.Node
    alignment: int
    uses: tuple[Use, ...]


@dataclass(frozen=True, eq=False)
class Skip:
    """A violation, or a suspicious use, that is left alone, with the reason."""

    use: Use
    reason: str


@dataclass(frozen=True)
class Plan:
    """What to do to a graph: relayouts, pins, checks, and what is left alone and why."""

    policy: str
    fixes: tuple[Fix, ...]
    pins: tuple[Pin, ...]
    checks: tuple[Check, ...]
    skips: tuple[Skip, ...]


def make_plan(analysis: Analysis, policy: str, *, pinning: bool = True) -> Plan:
    """Plan for ``analysis`` under ``policy``; with ``pinning``, hold what is right already.

    Raises:
        LayoutViolation: policy ``strict``, and a use can be neither proved legal nor repaired.
    """
    fixes: dict[tuple[fx.Node, str, Use | int], Fix] = {}
    skips: list[Skip] = []
    held: list[Use] = []
    opaque: dict[tuple[fx.Node, int], list[Use]] = {}
    for use in analysis.uses:
        if use.clean:
            held.append(use)
            skips.extend(_suspicious(use))
            continue
        if policy == AUDIT:
            skips.append(Skip(use, "policy audit: nothing is changed"))
            continue
        if _only_address_open(use):
            opaque.setdefault((use.operand.node, analysis.writes.get(use.node, 0)), []).append(use)
            continue
        remedy = _remedy(use)
        if remedy.obstacle is not None:
            if policy == STRICT:
                raise LayoutViolation(_strict_message(use, remedy.obstacle))
            skips.append(Skip(use, remedy.obstacle))
        if not remedy.helps:
            held.append(use)
            continue
        fix = Fix(use.operand.node, remedy.order, remedy.after, write_back=use.mutated)
        # What an op writes to is nobody else's copy, nor is what was copied before a write.
        alone = use if use.mutated else analysis.writes.get(use.node, 0)
        key = (use.operand.node, remedy.order, alone)
        fixes.setdefault(key, fix).uses.append(use)
    for fix in fixes.values():
        _price(fix)
    pins = tuple(_pins(held)) if pinning and policy != AUDIT else ()
    checks = tuple(
        Check(source, max(_alignment(use.rules) for use in uses), tuple(uses))
        for (source, _), uses in opaque.items()
    )
    return Plan(policy, tuple(fixes.values()), pins, checks, tuple(skips))


# -- safety --------------------------------------------------------------------------------------


def _only_address_open(use: Use) -> bool:
    """Whether all that is open is where an opaque op's memory starts."""
    open_ = all(isinstance(rule, AlignedPointer) for rule in use.unknown)
    return use.fact.kind == OPAQUE and not use.broken and not use.mutated and open_


def _remedy(use: Use) -> Remedy:
    layout, contract = use.fact.layout, use.contract
    if use.mutated and not can_redirect(use.node, use.operand):
        reason = "the op writes to this operand, and a copy would lose what it writes"
        return lossy_remedy(layout, contract, use.rules, reason)
    return remedy_of(layout, contract, use.rules, (*use.broken, *use.unknown))


def _strict_message(use: Use, obstacle: str) -> str:
    origin = origin_of(use.node)
    rules = "; ".join(rule.describe() for rule in (*use.broken, *use.unknown))
    return (
        f"{use.contract.op} operand {use.operand.name} at {origin.line}: {rules}; it is "
        f"{use.fact.layout.describe()}, and {obstacle}"
    )


# -- what is clean -------------------------------------------------------------------------------


def _pins(held: list[Use]) -> Iterator[Pin]:
    """Pins for the uses whose layout is to stay and that the compiler could still change."""
    by_source: dict[fx.Node, list[Use]] = {}
    for use in held:
        if not use.fact.binding and not use.mutated and use.fact.layout.is_empty() is not True:
            by_source.setdefault(use.operand.node, []).append(use)
    for source, uses in by_source.items():
        alignment = max(_alignment(use.rules) for use in uses)
        yield Pin(source, alignment, tuple(uses))


def _alignment(rules: tuple[Rule, ...]) -> int:
    return max((rule.nbytes for rule in rules if isinstance(rule, AlignedPointer)), default=1)


def _suspicious(use: Use) -> Iterator[Skip]:
    """A matrix of a quantised product that is legal without being dense."""
    if use.contract.dense and use.fact.layout.dense() is False:
        yield Skip(use, "strided, and accepted by the kernel as it is: no copy needed")


# -- price ---------------------------------------------------------------------------------------


def _price(fix: Fix) -> None:
    fix.fused = _fuses(fix)
    nbytes = fix.after.nbytes
    if not isinstance(nbytes, int):
        return
    if fix.fused:
        # The producer writes the copy instead of, or beside, what it wrote before.
        others = any(user not in {use.node for use in fix.uses} for user in fix.source.users)
        fix.nbytes = nbytes if others else 0
    else:
        fix.nbytes = 2 * nbytes
    if fix.write_back:
        fix.nbytes += 2 * nbytes
    target = fix.uses[0].target
    fix.microseconds = bandwidth_of(target).microseconds(fix.nbytes)


def _fuses(fix: Fix) -> bool:
    """Whether the value is computed elementwise, so that its kernel can write the copy."""
    fact = fix.uses[0].fact
    return fact.kind == COMPUTED and _is_elementwise(fact.root)


def _is_elementwise(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return torch.Tag.pointwise in target.tags or target in _ELEMENTWISE


_ELEMENTWISE = frozenset(
    {
        torch.ops.prims.convert_element_type.default,
        torch.ops.aten._to_copy.default,
        torch.ops.aten.clone.default,
        torch.ops.aten.copy.default,
    }
)
