"""Views of inputs that an op writes to, counted from where the input starts.

``auto_functionalized_v2`` spells such a view out by its storage offset as traced, which counts from
the start of the storage; Inductor then counts it from the start of the input. For an input that
does not start its storage, a layer of a cache say, the op so writes to the wrong place.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.proxy import GraphAppendingTracer
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from contig_pass.memory import offset_source

_BASE, _OFFSET, _DIM = "_base_index", "_storage_offset", "_slice_dim"
_START, _END = "_slice_start", "_slice_end"


def count_from_inputs(graph: fx.Graph, inputs: Sequence[Any]) -> list[Any]:
    """Let written views count from their inputs, in place; returns the inputs to compile with.

    Args:
        graph: as AOTAutograd hands it over.
        inputs: fake tensors, as many as placeholders. Those that such views count from are
            replaced by ones that start their storage, and the fake tensors in the graph, computed
            anew from them by Inductor, agree with the views.
    """
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    counted = set()
    for node in graph.find_nodes(op="call_function", target=auto_functionalized_v2):
        roots = [_root(base) for base in node.kwargs["_all_bases"]]
        offsets = [_offset(root) for root in roots]
        counted.update(root for root, offset in zip(roots, offsets, strict=True) if offset)
        bases = node.kwargs["_all_bases"]
        if (eager := node.meta.get("eager_input_vals")) is not None:
            kwargs = _counted(eager[1], bases, offsets, operator.sub)
            node.meta["eager_input_vals"] = (eager[0], kwargs)
        with graph.inserting_before(node):
            node.kwargs = _counted(node.kwargs, bases, offsets, functools.partial(_less, graph))
    return [
        _from_start(value) if node in counted else value
        for node, value in zip(placeholders, inputs, strict=True)
    ]


def _root(base: Any) -> fx.Node:
    while (source := offset_source(base)) is not None:
        base = source
    return base


def _offset(root: fx.Node) -> Any:
    """Elements before the first one of an input, in its storage; 0 for all else."""
    if root.op != "placeholder":
        return 0
    offset = root.meta["val"].storage_offset()
    return 0 if statically_known_true(offset == 0) else offset


def _counted(
    kwargs: dict[str, Any],
    bases: Sequence[fx.Node],
    offsets: Sequence[Any],
    less: Callable[[Any, Any], Any],
) -> dict[str, Any]:
    """``kwargs`` with offsets that ``less`` has taken the bases' offsets from."""
    changed = dict(kwargs)
    for key, position in kwargs.items():
        if not key.endswith(_BASE) or position is None:
            continue
        view, offset = key.removesuffix(_BASE), offsets[position]
        if view + _OFFSET in kwargs:
            changed[view + _OFFSET] = less(kwargs[view + _OFFSET], offset)
        elif view + _DIM in kwargs:
            base = bases[position].meta["val"]
            skipped = offset // base.stride(kwargs[view + _DIM])
            changed[view + _START] = less(kwargs[view + _START], skipped)
            changed[view + _END] = less(kwargs[view + _END], skipped)
    return type(kwargs)(changed)


def _less(graph: fx.Graph, value: Any, skipped: Any) -> Any:
    """``value - skipped`` as an argument of a node.

    What is symbolic is computed from sizes: Inductor takes the storage offset of a slice, which
    is how torch has traced such a value, to be 0.
    """
    known = value.meta["val"] if isinstance(value, fx.Node) else value
    difference = known - skipped
    if not isinstance(difference, torch.SymInt):
        return difference
    tracer = GraphAppendingTracer(graph)
    symbols = {
        held.node.expr: fx.Proxy(node, tracer)
        for node in graph.nodes
        if node.op == "placeholder" and isinstance(held := node.meta.get("val"), torch.SymInt)
    }
    if not difference.node.expr.free_symbols <= symbols.keys():
        return value  # counts on a size that is only known when the graph runs
    computed = sympy_interp(PythonReferenceAnalysis, symbols, difference.node.expr)
    if not isinstance(computed, fx.Proxy):
        return int(computed)
    computed.node.meta["val"] = difference
    return computed.node


def _from_start(value: torch.Tensor) -> torch.Tensor:
    """A fake tensor like ``value`` that starts a storage as large."""
    elements = value.untyped_storage().nbytes() // value.itemsize
    with value.fake_mode:  # type: ignore[attr-defined]
        flat = torch.empty(elements, dtype=value.dtype, device=value.device)
        return torch.as_strided(flat, value.shape, value.stride(), 0)
