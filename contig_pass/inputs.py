"""Graph inputs that a contract can reach, and how a misaligned one is realigned at run time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from typing import Any

import torch
from torch import fx

from contig_pass.callsite import (
    Operand,
    called_op,
    is_triton_kernel,
    operands,
    subgraph_call,
    triton_operands,
)
from contig_pass.contracts.registry import REGISTRY
from contig_pass.inductor.addresses import all_aligned
from contig_pass.inductor.ops import copy_with_strides
from contig_pass.layout import INPUT_ALIGNMENT
from contig_pass.memory import offset_source, view_base

#: Ops that may turn out to be no copy at all once Inductor has simplified the graph.
_PERHAPS_NO_COPY = frozenset(
    {
        torch.ops.aten.clone.default,
        torch.ops.aten._to_copy.default,
        torch.ops.prims.convert_element_type.default,
    }
)


def reached_inputs(graph: fx.Graph) -> list[fx.Node]:
    """Placeholders whose memory a bound operand can be, in order of the inputs."""
    reached: set[fx.Node] = set()
    for node in graph.nodes:
        for operand in _bound_operands(node):
            root: fx.Node | None = operand.node
            while root is not None and root.op != "placeholder":
                root = _one_step_up(root)
            if root is not None:
                reached.add(root)
    return [node for node in graph.nodes if node.op == "placeholder" and node in reached]


def written_inputs(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Placeholders that the graph writes to, each with the ``copy_`` that does."""
    return {
        node.args[0]: node
        for node in graph.nodes
        if node.target is torch.ops.aten.copy_.default and node.args[0].op == "placeholder"
    }


def _one_step_up(node: fx.Node) -> fx.Node | None:
    if node.target in _PERHAPS_NO_COPY:
        return node.args[0]  # type: ignore[return-value]
    return view_base(node) or offset_source(node)


def reaching_operands(node: fx.Node) -> Iterator[Operand]:
    """Operands of a subgraph call whose memory a bound operand inside can be."""
    call = subgraph_call(node)
    if call is None:
        return
    inside = set()
    for module in call.graphs:
        placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
        inside.update(placeholders.index(n) for n in reached_inputs(module.graph))
    yield from (operand for position, operand in call.operands if position in inside)


def _bound_operands(node: fx.Node) -> Iterator[Operand]:
    if node.op != "call_function":
        return
    op = called_op(node)
    if op is not None:
        if REGISTRY.knows(op):
            yield from operands(node, op)
    elif is_triton_kernel(node):
        yield from triton_operands(node)
    else:
        yield from reaching_operands(node)


def realigning(
    graph: Callable[[list[Any]], Any],
    positions: Sequence[int],
    written: Set[int] = frozenset(),
    kept: Set[int] = frozenset(),
) -> Callable[[list[Any]], Any]:
    """``graph`` with inputs that start on 16 bytes, whatever it is called with.

    An input that does not is copied with its strides, gaps included, so that views of it keep
    their offsets. What the graph writes to a copy goes back to the input, and an output that is a
    view of a copy becomes the same view of the input.

    Args:
        graph: takes a list of inputs, and may empty it.
        positions: of the inputs to look at: tensors.
        written: positions of inputs that the graph writes to.
        kept: positions whose copy stays at one address from call to call.
    """
    buffers: dict[int, torch.Tensor] = {}
    data_ptr = torch.Tensor.data_ptr
    quick = all_aligned(positions)

    def run(inputs: list[Any]) -> Any:
        if quick is not None and quick(inputs):
            return graph(inputs)
        bad = [i for i in positions if data_ptr(inputs[i]) % INPUT_ALIGNMENT]
        if not bad:
            return graph(inputs)
        pairs = {}
        for i in bad:
            original = inputs[i]
            if i in kept and i not in written:
                inputs[i] = buffers[i] = _into(buffers.get(i), original)
            else:
                inputs[i] = copy_with_strides(original)
            pairs[i] = (original, inputs[i])
        outputs = graph(inputs)
        for i in written & pairs.keys():
            _copy_back(*pairs[i])
        return _rebased(outputs, pairs.values())

    return run


def _into(buffer: torch.Tensor | None, original: torch.Tensor) -> torch.Tensor:
    if buffer is None or _form(buffer) != _form(original):
        return copy_with_strides(original)
    _flat(buffer).copy_(_flat(original))
    return buffer


def _form(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """All the memory that ``tensor`` spans, gaps included."""
    extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return torch.as_strided(tensor, (extent if tensor.numel() else 0,), (1,))


def _copy_back(original: torch.Tensor, copy: torch.Tensor) -> None:
    # Element by element: what lies in the gaps may be another input, and written to as well.
    with torch.no_grad():
        original.copy_(copy)


def _byte_offset(tensor: torch.Tensor) -> int:
    return tensor.storage_offset() * tensor.itemsize


def _rebased(outputs: Any, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Any:
    """``outputs`` with every view of a copy turned into the same view of the original."""
    by_storage = {copy.untyped_storage().data_ptr(): pair for pair in pairs for copy in pair[1:]}

    def rebase(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.numel() == 0:
            return value
        pair = by_storage.get(value.untyped_storage().data_ptr())
        if pair is None:
            return value
        original, copy = pair
        offset = _byte_offset(value) - _byte_offset(copy) + _byte_offset(original)
        return value.new_empty(0).set_(
            original.untyped_storage(), offset // value.itemsize, value.shape, value.stride()
        )

    return type(outputs)(rebase(value) for value in outputs)
