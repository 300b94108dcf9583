"""Reading and replacing the tensor operands of one FX node.

A *call site* is a node that calls an op, directly or behind ``auto_functionalized``, which
torch.compile puts around a custom op that mutates an argument; a node that calls a user's Triton
kernel; or one that calls a subgraph. Everything that depends on how a node stores its operands is
here; the rest of the package speaks of operands by name.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._higher_order_ops.auto_functionalize import (
    auto_functionalized,
    auto_functionalized_v2,
    get_mutable_args,
    read_view_information_from_args,
)
from torch._higher_order_ops.triton_kernel_wrap import (
    triton_kernel_wrapper_functional,
    triton_kernel_wrapper_mutation,
)

from contig_pass.inductor.ops import contiguous_op


@dataclass(frozen=True)
class Operand:
    """One tensor argument at one node.

    Attributes:
        argument: name in the op's schema.
        index: position in a list argument, else ``None``.
        node: the FX node that produces the tensor; for an argument that the op writes to behind
            ``auto_functionalized_v2``, the node that owns its memory.
        value: the operand's fake tensor.
        path: where the node stores it: ``("args", 0)``, ``("kwargs", "scales", 1)``, ...;
            empty for an argument that the op writes to behind ``auto_functionalized_v2``.
    """

    argument: str
    index: int | None
    node: fx.Node
    value: torch.Tensor
    path: tuple[int | str, ...]

    @property
    def name(self) -> str:
        """``bias``, ``scale_a[0]``, ..."""
        return operand_name(self.argument, self.index)


def operand_name(argument: str, index: int | None) -> str:
    """``bias``, or of a tensor in a list ``scale_a[0]``."""
    return argument if index is None else f"{argument}[{index}]"


def called_op(node: fx.Node) -> torch._ops.OpOverload | None:
    """The op that ``node`` calls, looking through ``auto_functionalized``; ``None`` if none."""
    if node.op != "call_function":
        return None
    if node.target in (auto_functionalized, auto_functionalized_v2):
        wrapped = node.args[0]
        return wrapped if isinstance(wrapped, torch._ops.OpOverload) else None
    return node.target if isinstance(node.target, torch._ops.OpOverload) else None


def is_functionalized(node: fx.Node) -> bool:
    """Whether ``node`` calls its op behind ``auto_functionalized``."""
    return node.target in (auto_functionalized, auto_functionalized_v2)


def arguments(node: fx.Node, op: torch._ops.OpOverload) -> dict[str, Any]:
    """Arguments given at ``node`` by schema name; what the node leaves to defaults is absent."""
    names = argument_names(op)
    if is_functionalized(node):
        return {name: value for name, value in node.kwargs.items() if name in names}
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


@functools.cache
def argument_names(op: torch._ops.OpOverload) -> tuple[str, ...]:
    """Names of the arguments of ``op``, in the schema's order."""
    return tuple(argument.name for argument in op._schema.arguments)


def operands(node: fx.Node, op: torch._ops.OpOverload) -> Iterator[Operand]:
    """Tensor operands given at ``node``, each tensor of a list by itself."""
    names = argument_names(op)
    if is_functionalized(node):
        given = {name: ("kwargs", name) for name in node.kwargs if name in names}
    else:
        given = {name: ("args", i) for i, name in enumerate(names[: len(node.args)])}
        given |= {name: ("kwargs", name) for name in node.kwargs}
    for name, path in given.items():
        yield from _stored(node, name, path)
    if node.target is auto_functionalized_v2:
        yield from _written_operands(node, op)


def triton_operands(node: fx.Node) -> Iterator[Operand]:
    """Tensor arguments of a user's Triton kernel, by the kernel's names for them."""
    for name in node.kwargs["kwargs"]:  # type: ignore[union-attr]
        yield from _stored(node, name, ("kwargs", "kwargs", name))


def is_triton_kernel(node: fx.Node) -> bool:
    """Whether ``node`` calls a user's Triton kernel, in functional or in mutating form."""
    return node.target in (triton_kernel_wrapper_functional, triton_kernel_wrapper_mutation)


def mutates_in_place(node: fx.Node) -> bool:
    """Whether ``node`` is the form of a Triton call that writes to its operands themselves."""
    return node.target is triton_kernel_wrapper_mutation


@dataclass(frozen=True)
class SubgraphCall:
    """A node that calls graphs once, with operands that are their placeholders one by one.

    Attributes:
        graphs: the graphs that it may call.
        operands: (position among the placeholders, operand) of each tensor.
    """

    graphs: tuple[fx.GraphModule, ...]
    operands: tuple[tuple[int, Operand], ...]


def subgraph_call(node: fx.Node) -> SubgraphCall | None:
    """How ``node`` calls subgraphs: ``invoke_subgraph`` or ``cond``; ``None`` for all others.

    Loops are left out: what they pass on comes from their own bodies from the second round on.
    """
    if node.target is torch.ops.higher_order.invoke_subgraph:
        names, paths = node.args[:1], [("args", i) for i in range(2, len(node.args))]
    elif node.target is torch.ops.higher_order.cond:
        names, paths = node.args[1:3], [("args", 3, i) for i in range(len(node.args[3]))]
    else:
        return None
    graphs = tuple(getattr(node.graph.owning_module, name.target) for name in names)
    found = [
        (position, operand)
        for position, path in enumerate(paths)
        for operand in _stored(node, f"operand {position}", path)
    ]
    return SubgraphCall(graphs, tuple(found))


def results(output: fx.Node) -> Iterator[Operand]:
    """What a graph returns, tensor by tensor."""
    if isinstance(output.args[0], fx.Node):  # the condition of a loop
        yield from _stored(output, "result", ("args", 0))
        return
    for position in range(len(output.args[0])):  # type: ignore[arg-type]
        yield from _stored(output, f"result {position}", ("args", 0, position))


def _stored(node: fx.Node, name: str, path: tuple[int | str, ...]) -> Iterator[Operand]:
    value = _at((node.args, node.kwargs), path)
    if isinstance(value, fx.Node):
        yield from _operand(name, None, value, path)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            if isinstance(item, fx.Node):
                yield from _operand(name, index, item, (*path, index))


def _operand(
    argument: str, index: int | None, node: fx.Node, path: tuple[int | str, ...]
) -> Iterator[Operand]:
    # A copy that is there already is judged by what it copies: the plan decides anew.
    if node.target is contiguous_op():
        node = node.args[0]  # type: ignore[assignment]
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        yield Operand(argument, index, node, value, path)


def _written_operands(node: fx.Node, op: torch._ops.OpOverload) -> Iterator[Operand]:
    """Arguments that the op writes to: each is a view, spelt out in the node's other keywords, of
    a base among ``_all_bases``."""
    names, types = get_mutable_args(op)
    kwargs = dict(fx.node.map_arg(node.kwargs, lambda arg: arg.meta["val"]))
    bases = kwargs["_all_bases"]
    views = read_view_information_from_args(names, types, kwargs, bases)
    for name, view in views.items():
        listed = view if isinstance(view, list) else [view]
        for index, info in enumerate(listed):
            if info is not None:
                owner = node.kwargs["_all_bases"][info.base_index]
                position = index if isinstance(view, list) else None
                yield Operand(name, position, owner, info.regenerate_view(bases), ())


@functools.cache
def mutated_arguments(op: torch._ops.OpOverload) -> frozenset[str]:
    """Names of the arguments that ``op`` writes to, by its schema."""
    return frozenset(
        argument.name
        for argument in op._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def replace_operand(node: fx.Node, operand: Operand, new: fx.Node) -> fx.Node:
    """Let ``node`` read ``new`` where it read ``operand``; returns what it read before.

    No other user of ``operand`` is touched. ``meta["eager_input_vals"]`` is rewritten as well:
    Inductor restores the strides it holds, so a fix that left it as it was would be undone.
    """
    earlier = _at((node.args, node.kwargs), operand.path)
    node.args, node.kwargs = _replaced((node.args, node.kwargs), operand.path, new)
    eager = node.meta.get("eager_input_vals")
    if eager is not None:
        value = new.meta["val"]
        node.meta["eager_input_vals"] = _replaced(eager, operand.path, value)
    return earlier


def writes_directly(node: fx.Node) -> bool:
    """Whether ``node`` calls an op that writes to the operands given, as in a graph that is not
    functional."""
    return isinstance(node.target, torch._ops.OpOverload) and bool(mutated_arguments(node.target))


def written_base(node: fx.Node, operand: Operand) -> fx.Node:
    """The node that owns the memory which ``node`` writes ``operand`` to."""
    return node.kwargs["_all_bases"][base_index(node, operand)]  # type: ignore[index, return-value]


def written_view(node: fx.Node, operand: Operand) -> tuple[str, tuple[Any, ...]]:
    """How ``operand`` is taken from its base: ``("alias", ())``, ``("slice", (dim, start, end))``
    or ``("as_strided", (size, stride, storage_offset))``."""
    given = node.kwargs
    prefix = f"_{operand.argument}_"
    if given.get(f"{prefix}alias"):
        return "alias", ()
    for kind, keys in _VIEWS.items():
        if f"{prefix}{keys[0]}" in given:
            return kind, tuple(given[prefix + key] for key in keys)
    return "alias", ()


_VIEWS = {
    "slice": ("slice_dim", "slice_start", "slice_end"),
    "as_strided": ("size", "stride", "storage_offset"),
}


def redirect(node: fx.Node, operand: Operand, copy: fx.Node) -> fx.Node:
    """Let the op at ``node`` write to ``copy`` instead of ``operand``.

    Returns the node that holds what it has written there: the new value of the copy.
    """
    base = base_index(node, operand)
    described = f"_{operand.argument}_"

    def redirected(kwargs: Mapping[str, Any], to: Any) -> dict[str, Any]:
        kept = {
            key: held
            for key, held in kwargs.items()
            if not (key.startswith(described) and key.removeprefix(described) in _VIEW_KEYS)
        }
        whole = type(kwargs)({**kept, f"{described}alias": True})  # type: ignore[call-arg]
        return _nested(whole, ("_all_bases", base), to)

    value = copy.meta["val"]
    node.kwargs = redirected(node.kwargs, copy)
    eager = node.meta.get("eager_input_vals")
    if eager is not None:
        node.meta["eager_input_vals"] = (eager[0], redirected(eager[1], value))
    op = called_op(node)
    position = max(len(op._schema.returns), 1) + base
    values = list(node.meta["val"])
    values[position] = value
    node.meta["val"] = tuple(values)
    for user in node.users:
        if user.target is operator.getitem and user.args[1] == position:
            user.meta["val"] = value
            return user
    with node.graph.inserting_after(node):
        written = node.graph.call_function(operator.getitem, (node, position))
    written.meta["val"] = value
    return written


#: How ``auto_functionalized_v2`` spells out which view of its base an argument is.
_VIEW_KEYS = frozenset({"alias", *(key for keys in _VIEWS.values() for key in keys)})


def base_index(node: fx.Node, operand: Operand) -> int:
    """Position among ``_all_bases`` of the base that ``node`` writes ``operand`` to."""
    return node.kwargs[f"_{operand.argument}_base_index"]  # type: ignore[return-value]


def _at(stored: tuple[Any, Any], path: tuple[int | str, ...]) -> Any:
    held = stored[_SIDES.index(path[0])]
    for key in path[1:]:
        held = held[key]
    return held


_SIDES = ("args", "kwargs")


def _replaced(
    stored: tuple[Any, Any], path: tuple[int | str, ...], value: Any
) -> tuple[Any, Any]:
    """``stored`` (args, kwargs) with ``value`` at ``path``; as it is where the path leads out."""
    side = _SIDES.index(path[0])
    parts = list(stored)
    # Not every version keeps the nested values of a call.
    with contextlib.suppress(KeyError, IndexError, TypeError):
        parts[side] = _nested(parts[side], path[1:], value)
    return parts[0], parts[1]


def _nested(held: Any, path: tuple[int | str, ...], value: Any) -> Any:
    if not path:
        return value
    key, rest = path[0], path[1:]
    new = _nested(held[key], rest, value)
    # Of the same type: Inductor compares the structures of arguments and recorded arguments.
    if isinstance(key, str):
        return type(held)({**held, key: new})
    return type(held)((*held[:key], new, *held[key + 1 :]))
