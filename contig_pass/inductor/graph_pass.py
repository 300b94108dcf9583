"""The custom graph pass: analysis, plan and rewrite at the end of Inductor's post-grad passes.

There the graph is functional, every node has a fake tensor, and nothing that would delete a copy
runs any more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx
from torch._functorch.aot_autograd import get_aot_graph_name
from torch._inductor import custom_graph_pass

from contig_pass.fingerprint import fingerprint
from contig_pass.inductor.scope import inputs_of
from contig_pass.inductor.user_passes import InferenceAware, UserPasses
from contig_pass.options import Options
from contig_pass.pipeline import repair
from contig_pass.report.model import Report

#: The configuration entry of Inductor that the pass is put in.
HOOK = "post_grad_custom_post_pass"


class LayoutPass(InferenceAware or custom_graph_pass.CustomGraphPass):  # type: ignore[misc]
    """Repairs the layouts of every graph that one compile hands to Inductor.

    Args:
        options: policy and target.
        deliver: called with the report of each graph.
        user_pass: a pass, or a list of passes, that the user configured for the same hook; it
            runs first.
        cacheable: whether the compiled graph may go into Inductor's caches.
    """

    def __init__(
        self,
        options: Options,
        deliver: Callable[[Report], None],
        user_pass: Any = None,
        cacheable: bool = True,
    ) -> None:
        self._cacheable = cacheable
        self._options = options
        self._deliver = deliver
        self._user_passes = UserPasses(user_pass)

    def __call__(self, graph: fx.Graph, is_inference: bool = False) -> None:
        self._user_passes(graph, is_inference)
        known = inputs_of(graph)
        self._deliver(
            repair(
                graph, self._options, known.aligned, name=get_aot_graph_name(), pinning=True,
                parameters=known.parameters, called=known.called,
            )
        )

    def uuid(self) -> Any | None:
        """All that the result depends on; ``None``: no caching, as if a user's pass gives none."""
        return self._user_passes.uuid(fingerprint(self._options)) if self._cacheable else None
