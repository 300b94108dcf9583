"""The whole graph, node by node, before and after the rewrite."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Set
from typing import Any, NamedTuple

import torch
from torch import fx

from contig_pass.callsite import Operand
from contig_pass.facts import Fact, fact_of
from contig_pass.provenance import module_path
from contig_pass.report.diff import line_of
from contig_pass.report.model import Hunk, Listing


class State(NamedTuple):
    """What a node's line is made of, at one time. It holds on to them; it formats nothing."""

    node: fx.Node
    args: Any
    kwargs: Any
    value: Any


def states_of(graph: fx.Graph) -> list[State]:
    """The states of all nodes, in order."""
    return [_state(node) for node in graph.nodes]


def list_graph(
    name: str, graph: fx.Graph, before: Sequence[State], aligned_inputs: Set[str]
) -> Listing:
    """The lines of ``graph`` beside those of the states that it had.

    Args:
        name: the graph's name.
        graph: as it is now. Nodes may have been added, erased and rewired, but not moved.
        before: its states earlier.
        aligned_inputs: names of the placeholders that are realigned at run time.
    """
    alignments = _alignments(graph, aligned_inputs)
    parts: list[tuple[str, list[tuple[str, str]]]] = []
    for node, lines in _changes(graph, before, alignments):
        module = module_path(node)
        if not parts or parts[-1][0] != module:
            parts.append((module, []))
        parts[-1][1].extend(lines)
    return Listing(name, tuple(Hunk(module, tuple(lines)) for module, lines in parts))


def _changes(
    graph: fx.Graph, before: Sequence[State], alignments: dict[fx.Node, int]
) -> Iterator[tuple[fx.Node, list[tuple[str, str]]]]:
    alive = set(graph.nodes)
    earlier = {state.node: index for index, state in enumerate(before)}
    listed = 0
    for node in graph.nodes:
        now = _state(node)
        if node not in earlier:
            yield node, [("+", _line(now, alignments))]
            continue
        yield from _erased(before[listed : earlier[node]], alive, alignments)
        listed = earlier[node] + 1
        was = before[earlier[node]]
        new = _line(now, alignments)
        old = new
        if not _same(was, now):
            old = _line(was, alignments if was.value is now.value else {})
        yield node, [(" ", new)] if old == new else [("-", old), ("+", new)]
    yield from _erased(before[listed:], alive, alignments)


def _erased(
    states: Iterable[State], alive: Set[fx.Node], alignments: dict[fx.Node, int]
) -> Iterator[tuple[fx.Node, list[tuple[str, str]]]]:
    for state in states:
        if state.node not in alive:
            yield state.node, [("-", _line(state, alignments))]


def _state(node: fx.Node) -> State:
    return State(node, node.args, node.kwargs, node.meta.get("val"))


def _same(one: State, other: State) -> bool:
    return one.args is other.args and one.kwargs is other.kwargs and one.value is other.value


def _line(state: State, alignments: dict[fx.Node, int]) -> str:
    node, args, kwargs, value = state
    return line_of(node, args, kwargs, value, alignments.get(node))


def _alignments(graph: fx.Graph, aligned_inputs: Set[str]) -> dict[fx.Node, int]:
    """What the address of each node's value is known to be a multiple of, in bytes."""
    facts: dict[fx.Node, Fact] = {}
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.layout is torch.strided:
            operand = Operand("", None, node, value, ())
            facts[node] = fact_of(operand, aligned_inputs, facts)
    return {node: fact.layout.known_alignment() for node, fact in facts.items()}
