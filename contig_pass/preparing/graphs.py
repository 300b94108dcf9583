"""One graph, and how it reads the tensors that its placeholders stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

import torch
from torch import fx

from contig_pass.analysis import Analysis, Use
from contig_pass.inputs import reached_inputs
from contig_pass.memory import view_base


@dataclass(frozen=True, eq=False)
class Traced:
    """One graph as the layout pass would see it, unchanged.

    Attributes:
        nodes: how many it has.
        uses: bound uses by the node whose memory they read; inputs are taken as a compiled graph
            takes them: realigned.
        tensors: what its placeholders stood for.
        reached: placeholders that are realigned at run time.
        views: by placeholder, the nodes that view its memory, in graph order.
        contiguous: placeholders that the program calls ``contiguous()`` on, in vain as they lie.
        unfollowed: inputs of the traced program that no placeholder stands for.
    """

    nodes: int
    uses: Mapping[fx.Node, Sequence[Use]]
    tensors: Mapping[fx.Node, torch.Tensor]
    reached: frozenset[fx.Node]
    views: Mapping[fx.Node, Sequence[fx.Node]]
    contiguous: frozenset[fx.Node]
    unfollowed: Sequence[torch.Tensor]


def traced_of(
    graph: fx.Graph,
    analysis: Analysis,
    tensors: Mapping[fx.Node, torch.Tensor],
    contiguous: Set[fx.Node] = frozenset(),
    unfollowed: Sequence[torch.Tensor] = (),
) -> Traced:
    """``graph`` with what ``analysis`` found in it; the rest as in :class:`Traced`."""
    uses: dict[fx.Node, list[Use]] = {}
    for use in analysis.uses:
        uses.setdefault(use.fact.root, []).append(use)
    views: dict[fx.Node, list[fx.Node]] = {node: [] for node in tensors}
    roots = {node: node for node in tensors}
    for node in graph.nodes:
        root = roots.get(view_base(node))  # type: ignore[arg-type]
        if root is not None:
            roots[node] = root
            views[root].append(node)
    reached = frozenset(reached_inputs(graph))
    return Traced(
        analysis.nodes, uses, tensors, reached, views, frozenset(contiguous), unfollowed
    )
