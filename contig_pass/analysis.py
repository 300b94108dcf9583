"""Compare contract and fact for every use in a graph. Edits nothing."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

import torch
from torch import fx

from contig_pass.callsite import Operand, arguments, called_op, mutated_arguments, operands
from contig_pass.contracts.registry import REGISTRY, Call, Contract, Registry
from contig_pass.contracts.rules import Dense, Rule
from contig_pass.contracts.target import Target, target_of
from contig_pass.facts import Fact, fact_of


@dataclass(frozen=True, eq=False)
class Use:
    """One (node, operand) pair that a contract binds.

    Attributes:
        node: the consumer.
        op: the op it calls.
        operand: which operand.
        contract: what is demanded.
        fact: what is there.
        rules: the contract's rules, and density where the policy asks for it.
        broken: rules that the fact breaks.
        unknown: rules that cannot be decided statically.
        mutated: the op writes to this operand.
        target: the device by whose demands it was judged.
    """

    node: fx.Node
    op: torch._ops.OpOverload
    operand: Operand
    contract: Contract
    fact: Fact
    rules: tuple[Rule, ...]
    broken: tuple[Rule, ...]
    unknown: tuple[Rule, ...]
    mutated: bool
    target: Target

    @property
    def clean(self) -> bool:
        """Every rule is known to hold."""
        return not self.broken and not self.unknown


@dataclass(frozen=True)
class Analysis:
    """Every use of a graph that a contract binds, in graph order."""

    uses: tuple[Use, ...]
    nodes: int

    @property
    def violations(self) -> tuple[Use, ...]:
        """Uses whose fact breaks a rule, or cannot be proved to keep it."""
        return tuple(use for use in self.uses if not use.clean)


def analyse(
    graph: fx.Graph,
    *,
    aligned_inputs: Set[str],
    density: bool,
    target: Target | None = None,
    registry: Registry = REGISTRY,
) -> Analysis:
    """Find every bound use of ``graph`` and judge it.

    Args:
        graph: an ATen graph whose nodes carry fake tensors in ``meta["val"]``.
        aligned_inputs: names of the placeholders that are realigned at run time.
        density: judge density too where a contract says that policy ``dense`` asks for it.
        target: the device whose demands count; ``None``: each call's own device.
        registry: the contracts.
    """
    uses: list[Use] = []
    for node in graph.nodes:
        op = called_op(node)
        if op is not None and registry.knows(op):
            uses.extend(_judge(node, op, aligned_inputs, density, target, registry))
    return Analysis(tuple(uses), len(graph.nodes))


def _judge(
    node: fx.Node,
    op: torch._ops.OpOverload,
    aligned_inputs: Set[str],
    density: bool,
    target: Target | None,
    registry: Registry,
) -> list[Use]:
    found = {operand.name: operand for operand in operands(node, op)}
    if not found:
        return []
    facts = {name: fact_of(operand, aligned_inputs) for name, operand in found.items()}
    device = next(iter(facts.values())).layout.device
    call = Call(
        op,
        {name: fact.layout for name, fact in facts.items()},
        arguments(node, op),
        target or target_of(device),
    )
    mutated = mutated_arguments(op)
    uses = []
    for name, contract in registry.for_call(call).items():
        layout = facts[name].layout
        rules = contract.rules
        if density and contract.dense and not any(isinstance(r, Dense) for r in rules):
            rules = (*rules, Dense())
        # An empty operand is never read, so any layout of it is legal.
        empty = layout.is_empty() is True
        answers = {} if empty else {rule: rule.check(layout) for rule in rules}
        uses.append(
            Use(
                node=node,
                op=op,
                operand=found[name],
                contract=contract,
                fact=facts[name],
                rules=rules,
                broken=tuple(r for r, holds in answers.items() if holds is False),
                unknown=tuple(r for r, holds in answers.items() if holds is None),
                mutated=found[name].argument in mutated,
                target=call.target,
            )
        )
    return uses
