"""Run a model once and keep its forward graphs as the layout pass would see them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from contig_pass.analysis import analyse
from contig_pass.aot_eager import compile_with_aot_eager
from contig_pass.errors import ContigPassError
from contig_pass.inputs import reached_inputs, written_inputs
from contig_pass.layout import known
from contig_pass.options import Options
from contig_pass.plan import AUDIT, CONTRACT, DENSE
from contig_pass.preparing.graphs import Traced, traced_of
from contig_pass.preparing.memory import PLAIN_TENSORS, Group


def trace_model(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    options: Options,
    groups: Sequence[Group],
) -> list[Traced]:
    from torch._inductor import config

    from contig_pass.inductor.graph_pass import HOOK
    from contig_pass.inductor.trace import plan_graphs
    from contig_pass.inductor.tracing import backend_call, repairs_layouts
    from contig_pass.inductor.user_passes import UserPasses

    density = options.policy in (DENSE, AUDIT)
    held = {id(tensor): tensor for group in groups for tensor in group.members.values()}
    given = torch.utils._pytree.tree_leaves((args, kwargs))
    restorable = held | {id(leaf): leaf for leaf in given if isinstance(leaf, torch.Tensor)}
    saved: dict[int, torch.Tensor] = {}
    found: list[Traced] = []

    @repairs_layouts
    def backend(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs: list[Traced] = []
        written: list[torch.Tensor] = []
        fixed = _made_contiguous(module, inputs)

        def collect(graph: fx.Graph) -> None:
            if _is_backward(graph):
                return  # compiled at once where it needs symbolic sizes
            standing = _inputs_of(graph, inputs)
            tensors = {node: tensor for node, tensor in standing.items() if id(tensor) in held}
            followed = {id(tensor) for tensor in tensors.values()}
            analysis = analyse(
                graph,
                aligned_inputs={node.name for node in reached_inputs(graph)},
                density=density,
                target=options.target,
            )
            contiguous = {node for node, tensor in tensors.items() if id(tensor) in fixed}
            unfollowed = [t for t in inputs if id(t) in held and id(t) not in followed]
            graphs.append(traced_of(graph, analysis, tensors, contiguous, unfollowed))
            written.extend(standing[node] for node in written_inputs(graph) if node in standing)

        # As a pass of the user's it sees the graph first, and under audit nobody edits it then.
        configured = UserPasses(getattr(config, HOOK))
        with backend_call(), config.patch({HOOK: [configured, collect]}):
            plan_graphs(module, inputs, replace(options, policy=AUDIT), lambda report: None)
            # Subgraphs come before the graph that calls them, and are judged by that call.
            found.extend(graphs[-1:])
            for tensor in written:
                if id(tensor) in restorable and id(tensor) not in saved:
                    saved[id(tensor)] = tensor.detach().clone()
            repairing = replace(options, policy=CONTRACT)
            return compile_with_aot_eager(module, inputs, repairing, lambda report: None)

    def call() -> Any:
        return model(*args, **kwargs)

    # A code object of its own: what Dynamo keeps of this trace goes with it.
    call.__code__ = call.__code__.replace()
    # Nor do the shapes of an earlier example make these symbolic.
    static = torch._dynamo.config.patch(automatic_dynamic_shapes=False)
    try:
        with torch._dynamo.utils.preserve_rng_state(), static:
            torch.compile(call, backend=backend)()
    finally:
        with torch.no_grad():
            for key, value in saved.items():
                restorable[key].copy_(value)
    if not found:
        raise ContigPassError(
            f"nothing of {type(model).__name__} was traced: it runs no tensor operation that "
            "torch.compile sees"
        )
    return found


def _inputs_of(graph: fx.Graph, inputs: Sequence[Any]) -> dict[fx.Node, torch.Tensor]:
    """The tensor that each placeholder stands for, where that is certain.

    By the position that torch notes at the placeholder; in older versions by its own position,
    if none was dropped or added.
    """
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    noted = [_noted_position(node) for node in placeholders]
    if all(position is None for position in noted) and len(placeholders) == len(inputs):
        noted = list(range(len(inputs)))
    return {
        node: inputs[position]
        for node, position in zip(placeholders, noted, strict=True)
        if position is not None and position < len(inputs) and _agree(node, inputs[position])
    }


def _is_backward(graph: fx.Graph) -> bool:
    return any(n.op == "placeholder" and n.name.startswith("tangents_") for n in graph.nodes)


def _made_contiguous(module: fx.GraphModule, inputs: Sequence[Any]) -> frozenset[int]:
    """Inputs, by id, that the program makes contiguous, which costs nothing as they lie.

    The ATen graph shows nothing of such a call; in another order of dimensions it would copy.
    """
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    owners = {}
    for node, tensor in zip(placeholders, inputs, strict=False):
        memory = _storage(node.meta.get("example_value"))
        if memory is not None and isinstance(tensor, torch.Tensor):
            owners[memory] = id(tensor)
    asked = (
        _storage(node.meta.get("example_value"))
        for node in module.graph.nodes
        if node.target == "contiguous"
    )
    return frozenset(owners[memory] for memory in asked if memory in owners)


def _storage(value: Any) -> int | None:
    try:
        return value.untyped_storage()._cdata
    except (AttributeError, RuntimeError):
        return None  # no tensor, or one without a storage


def _noted_position(node: fx.Node) -> int | None:
    described = node.meta.get("desc")
    while (base := getattr(described, "base", None)) is not None:
        described = base  # part of a tensor subclass
    position = getattr(described, "idx", None)
    return position if isinstance(position, int) else None


def _agree(node: fx.Node, tensor: Any) -> bool:
    value = node.meta.get("val")
    if not isinstance(tensor, torch.Tensor) or not isinstance(value, torch.Tensor):
        return False
    if type(tensor) not in PLAIN_TENSORS:
        return True  # the placeholder is a part of it
    numbers = zip((*value.shape, *value.stride()), (*tensor.shape, *tensor.stride()), strict=False)
    same = value.dim() == tensor.dim() and value.dtype == tensor.dtype
    return same and all(known(a == b) is not False for a, b in numbers)
