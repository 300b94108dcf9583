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
from contig_pass.inductor.scope import aligned_inputs
from contig_pass.options import Options
from contig_pass.pipeline import repair
from contig_pass.report.model import Report

#: Told whether the graph is an inference graph, from torch 2.12 on.
_InferenceAware = getattr(custom_graph_pass, "CustomInferenceAwareGraphPass", None)


#: The configuration entry of Inductor that the pass is put in.
HOOK = "post_grad_custom_post_pass"


class LayoutPass(_InferenceAware or custom_graph_pass.CustomGraphPass):  # type: ignore[misc]
    """Repairs the layouts of every graph that one compile hands to Inductor.

    Args:
        options: policy and target.
        deliver: called with the report of each graph.
        user_pass: a pass, or a list of passes, that the user configured for the same hook; it
            runs first.
    """

    def __init__(
        self, options: Options, deliver: Callable[[Report], None], user_pass: Any = None
    ) -> None:
        self._options = options
        self._deliver = deliver
        if user_pass is None:
            self._user_passes: tuple[Any, ...] = ()
        elif isinstance(user_pass, (list, tuple)):
            self._user_passes = tuple(user_pass)
        else:
            self._user_passes = (user_pass,)

    def __call__(self, graph: fx.Graph, is_inference: bool = False) -> None:
        for user_pass in self._user_passes:
            if _InferenceAware is not None and isinstance(user_pass, _InferenceAware):
                user_pass(graph, is_inference)
            else:
                user_pass(graph)
        name = get_aot_graph_name()
        self._deliver(
            repair(graph, self._options, aligned_inputs(graph), name=name, pinning=True)
        )

    def uuid(self) -> Any | None:
        """All that the result depends on; ``None`` (no caching) if a user's pass gives none."""
        user_ids = []
        for user_pass in self._user_passes:
            user_id = user_pass.uuid() if hasattr(user_pass, "uuid") else None
            if user_id is None:
                return None
            user_ids.append(user_id)
        return (fingerprint(self._options), *user_ids)
