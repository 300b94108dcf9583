"""What Dynamo knows of the calls in a graph that it traced."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx


def traced_calls(module: fx.GraphModule) -> Iterator[fx.Node]:
    """Every call in the graph that Dynamo traced, and in the graphs that it calls, in order."""
    for graph_module in module.modules():
        if isinstance(graph_module, fx.GraphModule):
            for node in graph_module.graph.nodes:
                if node.op in ("call_function", "call_method"):
                    yield node


def calls_subgraphs(module: fx.GraphModule) -> bool:
    """Whether the graph calls other graphs."""
    return any(
        child is not module and isinstance(child, fx.GraphModule) for child in module.modules()
    )


def traced_value(node: Any) -> torch.Tensor | None:
    """The fake tensor that a node of Dynamo's graph stands for; ``None`` if it is none."""
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def innermost_call(node: fx.Node) -> tuple[str, Any] | None:
    """Name and target of the call of the user's program that ``node`` was traced for.

    The name is the call's in the graph that Dynamo traced, and stays with every node that the call
    is decomposed into. ``None``: nothing recorded it.
    """
    stack = node.meta.get("source_fn_stack")
    return (str(stack[-1][0]), stack[-1][1]) if stack else None
