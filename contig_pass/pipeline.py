"""Analysis, plan, rewrite and report of one graph, in that order."""

from __future__ import annotations

import time
from collections.abc import Mapping, Set
from types import MappingProxyType

from torch import fx

from contig_pass.analysis import analyse
from contig_pass.options import Options
from contig_pass.plan import AUDIT, DENSE, make_plan
from contig_pass.redundant.passing import Finder
from contig_pass.report.diff import hunks_of, lines_of
from contig_pass.report.listing import list_graph, states_of
from contig_pass.report.model import Report, make_report
from contig_pass.rewrite import apply_plan


def repair(
    graph: fx.Graph,
    options: Options,
    aligned_inputs: Set[str],
    *,
    name: str,
    pinning: bool,
    parameters: Mapping[str, str] = MappingProxyType({}),
    only: Set[str] | None = None,
    called: bool = False,
) -> Report:
    """Make every bound use of ``graph`` legal, in place, and report what was done.

    Args:
        graph: an ATen graph whose nodes carry fake tensors.
        options: policy and target, and whether the user's copies without effect are taken out.
        aligned_inputs: names of the placeholders that are realigned at run time.
        name: the graph's name in the report.
        pinning: hold the compiler to layouts that are right already; pointless where the graph
            is run as it stands.
        parameters: names of the parameters by the names of their placeholders.
        only: repair uses of these placeholders' memory only; ``None``: all.
        called: the graph is a subgraph that another one calls.

    Raises:
        LayoutViolation: policy ``strict``, and a use can be neither proved nor repaired.
    """
    started = time.perf_counter()
    density = options.policy in (DENSE, AUDIT)
    states = states_of(graph) if options.listing else ()
    finder = Finder(aligned_inputs, options.target)
    removed = finder.remove(graph) if options.remove_redundant and only is None else []
    analysis = analyse(
        graph, aligned_inputs=aligned_inputs, density=density, target=options.target, only=only,
        called=called,
    )
    judged = finder.judge(graph, analysis.uses) if only is None else []
    plan = make_plan(analysis, options.policy, pinning=pinning)
    before = lines_of(plan)
    copies = apply_plan(graph, plan)
    hunks = hunks_of(plan, copies, before)
    listings = (list_graph(name, graph, states, aligned_inputs),) if options.listing else ()
    seconds = time.perf_counter() - started
    return make_report(
        name, analysis, plan, copies, hunks, seconds, parameters, listings, [*removed, *judged]
    )
