"""Relayouts of parameters that freezing folds: made once, while compiling.

Freezing turns parameters into constants and computes whatever depends on nothing else, before the
passes at whose end the layout pass runs. So the copies of parameters are inserted one step
earlier, and folded with the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch._functorch.aot_autograd import get_aot_graph_name
from torch._inductor import custom_graph_pass

from contig_pass.fingerprint import fingerprint
from contig_pass.inductor.user_passes import UserPasses
from contig_pass.layout import INPUT_ALIGNMENT
from contig_pass.options import Options
from contig_pass.pipeline import repair
from contig_pass.report.model import Report

#: The configuration entry of Inductor that the pass is put in.
FOLDING_HOOK = "joint_custom_post_pass"


class FoldingPass(custom_graph_pass.CustomGraphPass):
    """Repairs the uses of parameters in a graph that is about to be frozen.

    Args:
        options: policy and target.
        folded: called with the report, whose rows are marked as made once.
        user_pass: a pass, or a list of passes, configured for the same hook; it runs first.
    """

    def __init__(
        self, options: Options, folded: Callable[[Report], None], user_pass: Any = None
    ) -> None:
        self._options = options
        self._folded = folded
        self._user_passes = UserPasses(user_pass)

    def __call__(self, graph: fx.Graph) -> None:
        self._user_passes(graph)
        parameters = _parameters(graph)
        if not parameters:
            return
        aligned = {
            name for name, value in parameters.items() if value.data_ptr() % INPUT_ALIGNMENT == 0
        }
        report = repair(
            graph, replace(self._options, listing=False), aligned, name=get_aot_graph_name(),
            pinning=False, only=frozenset(parameters),
        )
        rows = tuple(replace(row, once=True) for row in report.fixes)
        if rows:
            self._folded(replace(report, rows=rows))

    def uuid(self) -> Any | None:
        """All that the result depends on; ``None`` (no caching) if a user's pass gives none."""
        return self._user_passes.uuid(fingerprint(self._options))


def _parameters(graph: fx.Graph) -> dict[str, torch.Tensor]:
    """The parameters that are to be frozen, by the names of their placeholders."""
    context = torch._guards.TracingContext.try_get()
    flat = context.params_flat_unwrap_subclasses if context is not None else None
    placeholders = [node.name for node in graph.nodes if node.op == "placeholder"]
    return {
        name: value
        for name, value in zip(placeholders, flat or (), strict=False)
        if type(value) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
        and value.device.type != "meta"
    }
