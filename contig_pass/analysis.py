"""Compare contract and fact for every use in a graph. Edits nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from contig_pass.callsite import (
    Operand,
    arguments,
    called_op,
    is_triton_kernel,
    mutated_arguments,
    mutates_in_place,
    operands,
    results,
    triton_operands,
    writes_directly,
)
from contig_pass.contracts.calls import SUBGRAPH, SUBGRAPH_RESULT, TRITON_KERNEL
from contig_pass.contracts.judging import judge
from contig_pass.contracts.registry import REGISTRY, Call, Contract, Registry, op_name
from contig_pass.contracts.rules import Dense, Rule
from contig_pass.contracts.scaled_mm import with_common_k
from contig_pass.contracts.target import Target, target_of
from contig_pass.facts import Fact, fact_of
from contig_pass.inputs import reaching_operands


@dataclass(frozen=True, eq=False)
class Use:
    """One (node, operand) pair that a contract binds.

    Attributes:
        node: the consumer.
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
    """Every use of a graph that a contract binds, in graph order.

    Attributes:
        uses: the uses.
        nodes: how many nodes the graph has.
        writes: how many nodes that write to memory come before a node; absent if none does. A copy
            serves no use that a write lies before, and not before another.
    """

    uses: tuple[Use, ...]
    nodes: int
    writes: Mapping[fx.Node, int] = field(default_factory=dict)

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
    only: Set[str] | None = None,
    called: bool = False,
) -> Analysis:
    """Find every bound use of ``graph`` and judge it.

    Args:
        graph: an ATen graph whose nodes carry fake tensors in ``meta["val"]``.
        aligned_inputs: names of the placeholders that are realigned at run time.
        density: judge density too where a contract says that policy ``dense`` asks for it.
        target: the device whose demands count; ``None``: each call's own device.
        registry: the contracts.
        only: judge uses of the memory of these placeholders only; ``None``: all.
        called: the graph is a subgraph that another one calls.
    """
    uses: list[Use] = []
    writes: dict[fx.Node, int] = {}
    written = 0
    for node in graph.nodes:
        if written:
            writes[node] = written
        written += writes_directly(node) or mutates_in_place(node)
        if called and node.op == "output":
            found = results(node)
            uses.extend(_judge_call(node, found, SUBGRAPH_RESULT, aligned_inputs, target))
        if node.op != "call_function":
            continue
        op = called_op(node)
        if op is not None:
            if registry.knows(op):
                uses.extend(_judge_op(node, op, aligned_inputs, density, target, registry))
        elif is_triton_kernel(node):
            found, mutates = triton_operands(node), mutates_in_place(node)
            uses.extend(_judge_call(node, found, TRITON_KERNEL, aligned_inputs, target, mutates))
        else:
            found = reaching_operands(node)
            uses.extend(_judge_call(node, found, SUBGRAPH, aligned_inputs, target))
    if only is not None:
        uses = [use for use in uses if use.fact.root.name in only]
    return Analysis(tuple(uses), len(graph.nodes), writes)


def _judge_op(
    node: fx.Node,
    op: torch._ops.OpOverload,
    aligned_inputs: Set[str],
    density: bool,
    target: Target | None,
    registry: Registry,
) -> Iterator[Use]:
    found = {operand.name: operand for operand in operands(node, op)}
    if not found:
        return
    facts = {name: fact_of(operand, aligned_inputs) for name, operand in found.items()}
    layouts = with_common_k(op_name(op), {name: fact.layout for name, fact in facts.items()})
    facts = {name: replace(fact, layout=layouts[name]) for name, fact in facts.items()}
    device = next(iter(facts.values())).layout.device
    call = Call(
        op,
        layouts,
        arguments(node, op),
        target or target_of(device),
    )
    mutated = mutated_arguments(op)
    for name, contract in registry.for_call(call).items():
        rules = contract.rules
        if density and contract.dense and not any(isinstance(r, Dense) for r in rules):
            rules = (*rules, Dense())
        writes = found[name].argument in mutated
        yield _use(node, found[name], contract, facts[name], rules, writes, call.target)


def _judge_call(
    node: fx.Node,
    found: Iterable[Operand],
    contract: Contract,
    aligned_inputs: Set[str],
    target: Target | None,
    mutates: bool = False,
) -> Iterator[Use]:
    """Uses by a call that is no op: one contract binds every operand of it."""
    for operand in found:
        fact = fact_of(operand, aligned_inputs)
        judge = target or target_of(fact.layout.device)
        yield _use(node, operand, contract, fact, contract.rules, mutates, judge)


def _use(
    node: fx.Node,
    operand: Operand,
    contract: Contract,
    fact: Fact,
    rules: tuple[Rule, ...],
    mutated: bool,
    target: Target,
) -> Use:
    broken, unknown = judge(rules, fact.layout)
    return Use(
        node=node,
        operand=operand,
        contract=contract,
        fact=fact,
        rules=rules,
        broken=broken,
        unknown=unknown,
        mutated=mutated,
        target=target,
    )
