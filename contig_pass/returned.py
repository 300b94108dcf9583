"""Returned views of inputs that the program writes to, taken of the inputs themselves.

In a functional graph such an output is a view of the new value, which has memory of its own. torch
turns it into a view of the input by its storage offset where it cannot repeat the views, because
they have symbolic sizes (``gen_alias_from_base``): wrong for an input that does not start its
storage. A view of the written input has the right storage offset whatever the input.
"""

from __future__ import annotations

import operator

from torch import fx
from torch._functorch._aot_autograd.schemas import OutputType
from torch._guards import TracingContext

from contig_pass.inputs import written_inputs
from contig_pass.layout import Layout, known
from contig_pass.memory import view_base


def aliases_of_inputs() -> tuple[int, ...]:
    """Positions of the outputs of the graph under compilation that torch makes views of inputs."""
    context = TracingContext.try_get()
    traced = context.fw_metadata if context is not None else None
    if traced is None:
        return ()
    first = traced.num_mutated_inp_runtime_indices
    return tuple(
        first + position
        for position, output in enumerate(traced.output_info)
        if output.output_type is OutputType.alias_of_input
    )


def return_views_of_inputs(graph: fx.Graph, positions: tuple[int, ...]) -> None:
    """Take the outputs at ``positions`` of the written inputs, where they are views of new values.

    Args:
        graph: functional but for ``copy_`` to placeholders.
        positions: as :func:`aliases_of_inputs` gives them for this graph.
    """
    written = {copy.args[1]: copy for copy in written_inputs(graph).values()}
    if not written or not positions:
        return
    output = graph.output_node()
    values = list(output.args[0])
    for position in positions:
        values[position] = _taken_of_input(values[position], written, output)
    output.args = (type(output.args[0])(values),)
    graph.eliminate_dead_code()


def _taken_of_input(
    value: fx.Node, written: dict[fx.Node, fx.Node], output: fx.Node
) -> fx.Node:
    views = []
    root = value
    while root not in written:
        if view_base(root) is None:
            return value
        views.append(root)
        # One step at a time: a part of a split comes of it by getitem.
        root = root.args[0] if root.target is operator.getitem else view_base(root)
    copied = written[root]
    if not _same_layout(root, copied.args[0]):
        return value  # the views of another layout may be no views
    taken = {root: copied}
    with output.graph.inserting_before(output):
        for view in reversed(views):
            taken[view] = output.graph.node_copy(view, lambda node: taken.get(node, node))
    return taken[value]


def _same_layout(one: fx.Node, other: fx.Node) -> bool:
    first, second = (Layout.of(node.meta["val"]) for node in (one, other))
    pairs = zip(first.shape + first.strides, second.shape + second.strides, strict=True)
    return all(known(a == b) for a, b in pairs)
