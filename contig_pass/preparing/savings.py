"""What ``prepare`` would save of the copies that a compiled graph makes at each call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx

from contig_pass.analysis import Analysis
from contig_pass.layout import Layout
from contig_pass.plan import Fix, Plan
from contig_pass.preparing.cases import Case, Site, is_copied
from contig_pass.preparing.graphs import traced_of
from contig_pass.preparing.memory import Group
from contig_pass.preparing.verdict import choose


def preparable_bytes(analysis: Analysis, plan: Plan, parameters: Mapping[str, str]) -> int:
    """Bytes a call of the copies in ``plan`` that another layout of a parameter would spare.

    Judged as ``prepare`` judges, by this graph alone: what else shares a parameter's memory or
    reads it is not known here. Nor are addresses: a graph may be cached, and run with others.

    Args:
        analysis: of a graph, whose views of parameters are as they were when it was made.
        plan: for that graph.
        parameters: names of the parameters by the names of their placeholders.
    """
    copies: dict[fx.Node, list[Fix]] = {}
    for fix in plan.fixes:
        root = fix.uses[0].fact.root
        if root.op == "placeholder" and root.name in parameters:
            copies.setdefault(root, []).append(fix)
    if not copies:
        return 0
    tensors = {root: root.meta["val"] for root in copies}
    traced = traced_of(next(iter(copies)).graph, analysis, tensors)
    return sum(
        fix.nbytes or 0
        for root, fixes in copies.items()
        for fix in _spared(fixes, Case(Group({root.name: tensors[root]}), (Site(traced, root),)))
    )


def _spared(fixes: Sequence[Fix], case: Case) -> list[Fix]:
    layout = Layout.of(case.group.tensor)
    if not all(isinstance(number, int) for number in (*layout.shape, *layout.strides)):
        return []  # prepare goes by what a parameter's sizes really are
    order, verdict, _ = choose(case, layout)
    if order is None:
        return []
    copied = {(use.node, use.operand) for use in verdict.left if is_copied(use)}
    return [fix for fix in fixes if copied.isdisjoint((u.node, u.operand) for u in fix.uses)]
