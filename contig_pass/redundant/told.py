"""The copying calls of the user's program, told with the report of the graph that they are in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import fx

from contig_pass.contracts.target import Target
from contig_pass.inductor.traced import calls_subgraphs
from contig_pass.redundant.calls import CopyCall, compiled_away, copy_calls, no_op
from contig_pass.report.copies import Copy
from contig_pass.report.model import Report

Deliver = Callable[[Report], None]


def with_calls(module: fx.GraphModule, deliver: Deliver, target: Target | None) -> Deliver:
    """``deliver``, whose first report also tells what became of each copying call in ``module``.

    The calls are those of this process's own trace: a report out of a compile cache has its copies
    from the compile that put it there, and the calls that left nothing behind from here.

    Args:
        module: the graph that Dynamo traced, before any pass.
        deliver: receives the reports.
        target: the device that copies are priced by; ``None``: each tensor's own.
    """
    calls = copy_calls(module)
    if not calls:
        return deliver
    several = calls_subgraphs(module)
    waiting = [calls]

    def told(report: Report) -> None:
        if waiting:
            rows = _joined(waiting.pop(), report, several, target)
            report = replace(report, copies=tuple(rows))
        deliver(report)

    return told


def _joined(
    calls: Sequence[CopyCall], report: Report, several: bool, target: Target | None
) -> list[Copy]:
    """Rows of ``calls`` in their order, then those of copies that no such call made."""
    standing: dict[str, list[Copy]] = {}
    for row in report.copies:
        standing.setdefault(row.node, []).append(row)
    # Which report a call's copy would be in is not known of several, nor by which name of an
    # earlier compile.
    certain = not several and not report.cached
    rows: list[Copy] = []
    for call in calls:
        if not call.copied:
            rows.append(no_op(call, target))
        elif call.name in standing:
            rows += standing.pop(call.name)
        elif certain:
            rows.append(compiled_away(call, target))
    return [*rows, *(row for left in standing.values() for row in left)]
