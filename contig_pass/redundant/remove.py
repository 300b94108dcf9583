"""Take copies out of a graph that are proved to be without effect. It decides nothing."""

from __future__ import annotations

from torch import fx

from contig_pass.redundant.trial import Trial


def remove_copy(graph: fx.Graph, trial: Trial) -> None:
    """Take the copy of ``trial``, which found no obstacle, out of ``graph``.

    Its readers read what it copied, and what follows is noted to lie as the trial found.
    """
    for one in trial.changed.values():
        one.node.meta["val"] = one.value
        one.node.meta.pop("tensor_meta", None)
        for user in one.node.users:
            # The layouts that the op got in eager mode: with them Inductor would copy again.
            user.meta.pop("eager_input_vals", None)
    trial.copy.replace_all_uses_with(trial.source)
    graph.erase_node(trial.copy)
