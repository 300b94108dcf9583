"""Passes that the user configured for a hook that we take: they run before ours."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch._inductor import custom_graph_pass

#: Told whether the graph is an inference graph, from torch 2.12 on.
InferenceAware = getattr(custom_graph_pass, "CustomInferenceAwareGraphPass", None)


class UserPasses:
    """A pass, several or none, as the configuration entry holds them."""

    def __init__(self, configured: Any) -> None:
        if configured is None:
            self._passes: tuple[Any, ...] = ()
        elif isinstance(configured, (list, tuple)):
            self._passes = tuple(configured)
        else:
            self._passes = (configured,)

    def __call__(self, graph: fx.Graph, is_inference: bool = False) -> None:
        for user_pass in self._passes:
            if InferenceAware is not None and isinstance(user_pass, InferenceAware):
                user_pass(graph, is_inference)
            else:
                user_pass(graph)

    def uuid(self, ours: str) -> Any | None:
        """Cache key of these passes and ours; ``None`` if one of them gives none."""
        ids = [p.uuid() if hasattr(p, "uuid") else None for p in self._passes]
        return None if None in ids else (ours, *ids)
