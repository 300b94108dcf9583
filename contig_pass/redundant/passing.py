"""The finder in the pass: judge the copies of a graph, and take out those that are asked for."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

from torch import fx

from contig_pass.analysis import Use
from contig_pass.contracts.target import Target
from contig_pass.redundant.remove import remove_copy
from contig_pass.redundant.trial import Bench
from contig_pass.redundant.verdicts import copies_in, judged_rows, removed_row, try_copies
from contig_pass.report.copies import Copy


@dataclass(frozen=True)
class Finder:
    """What to look by.

    Attributes:
        aligned_inputs: names of the placeholders that are realigned at run time.
        target: the device that copies are priced by; ``None``: each tensor's own.
    """

    aligned_inputs: Set[str]
    target: Target | None

    def remove(self, graph: fx.Graph) -> list[Copy]:
        """Take every copy without effect out of ``graph``, one after the other; their rows.

        Each is proved on the graph that the ones before have left.
        """
        rows: list[Copy] = []
        copies = copies_in(graph)
        # It stays good: what is taken out moves no node, and takes no part in any write.
        bench = Bench.of(graph, self.aligned_inputs) if copies else None
        while bench is not None and copies:
            left = []
            for found in try_copies(copies, bench):
                if found.without_effect:
                    rows.append(removed_row(found, bench, self.target))
                    remove_copy(graph, found.trial)
                else:
                    left.append(found.trial.copy)
            if len(left) == len(copies):
                break
            copies = left  # what kept one of them may be gone
        return rows

    def judge(self, graph: fx.Graph, uses: Sequence[Use]) -> list[Copy]:
        """The rows of the copies in ``graph``; ``uses`` are all that a contract binds in it."""
        copies = copies_in(graph)
        if not copies:
            return []
        bench = Bench.of(graph, self.aligned_inputs)
        return judged_rows(try_copies(copies, bench), uses, bench, self.target)
