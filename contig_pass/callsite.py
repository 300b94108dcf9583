"""Reading and replacing the tensor operands of one FX node.

A *call site* is a node that calls an op, directly or behind ``auto_functionalized``, which
torch.compile puts around a custom op that mutates an argument. Everything that depends on how a
node stores its operands is here; the rest of the package speaks of operands by name.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
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
    """

    argument: str
    index: int | None
    node: fx.Node
    value: torch.Tensor

    @property
    def name(self) -> str:
        """``bias``, ``scale_a[0]``, ..."""
        return self.argument if self.index is None else f"{self.argument}[{self.index}]"


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
    names = _argument_names(op)
    if is_functionalized(node):
        return {name: value for name, value in node.kwargs.items() if name in names}
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


@functools.cache
def _argument_names(op: torch._ops.OpOverload) -> tuple[str, ...]:
    return tuple(argument.name for argument in op._schema.arguments)


def operands(node: fx.Node, op: torch._ops.OpOverload) -> Iterator[Operand]:
    """Tensor operands given at ``node``, each tensor of a list by itself."""
    for name, value in arguments(node, op).items():
        if isinstance(value, fx.Node):
            yield from _operand(name, None, value)
        elif isinstance(value, (list, tuple)):
            for index, item in enumerate(value):
                if isinstance(item, fx.Node):
                    yield from _operand(name, index, item)
    if node.target is auto_functionalized_v2:
        yield from _written_operands(node, op)


def _operand(argument: str, index: int | None, node: fx.Node) -> Iterator[Operand]:
    # A copy that is there already is judged by what it copies: the plan decides anew.
    if node.target is contiguous_op():
        node = node.args[0]  # type: ignore[assignment]
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        yield Operand(argument, index, node, value)


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
                yield Operand(name, position, owner, info.regenerate_view(bases))


@functools.cache
def mutated_arguments(op: torch._ops.OpOverload) -> frozenset[str]:
    """Names of the arguments that ``op`` writes to, by its schema."""
    return frozenset(
        argument.name
        for argument in op._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def replace_operand(
    node: fx.Node, op: torch._ops.OpOverload, operand: Operand, new: fx.Node
) -> fx.Node:
    """Let ``node`` read ``new`` where it read ``operand``; returns what it read before.

    No other user of ``operand`` is touched.

    ``meta["eager_input_vals"]`` is rewritten as well: Inductor restores the strides it holds, so
    a fix that left it as it was would be undone.
    """
    position = None if is_functionalized(node) else _argument_names(op).index(operand.argument)
    given = arguments(node, op)[operand.argument]
    earlier = given if operand.index is None else given[operand.index]
    node.args, node.kwargs = _with_operand(
        node.args, node.kwargs, position, operand, new
    )
    eager = node.meta.get("eager_input_vals")
    if eager is not None:
        node.meta["eager_input_vals"] = _with_operand(
            *eager, position, operand, new.meta["val"]
        )
    return earlier


def _with_operand(
    args: tuple, kwargs: dict, position: int | None, operand: Operand, value: Any
) -> tuple[tuple, dict]:
    """``args`` and ``kwargs`` with ``value`` at ``operand``, wherever the two store it."""
    if position is not None and position < len(args):
        new = _in_list(args[position], operand.index, value)
        return (*args[:position], new, *args[position + 1 :]), dict(kwargs)
    if operand.argument not in kwargs:
        return args, dict(kwargs)
    return args, {
        **kwargs,
        operand.argument: _in_list(kwargs[operand.argument], operand.index, value),
    }


def _in_list(held: Any, index: int | None, value: Any) -> Any:
    if index is None:
        return value
    return type(held)((*held[:index], value, *held[index + 1 :]))


def view_base(node: fx.Node) -> fx.Node | None:
    """The node whose memory ``node`` is a view of, one step up; ``None`` if it has its own."""
    if node.op != "call_function":
        return None
    if node.target is operator.getitem:
        producer = node.args[0]
        return view_base(producer) if isinstance(producer, fx.Node) else None
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    position = _viewed_argument(node.target)
    if position is None or position >= len(node.args):
        return None
    base = node.args[position]
    return base if isinstance(base, fx.Node) else None


@functools.cache
def _viewed_argument(op: torch._ops.OpOverload) -> int | None:
    """Position of the argument that the result of ``op`` is a view of."""
    if op is torch.ops.aten._unsafe_view.default:
        return 0  # declared as functional, lowered as a view
    returned = {
        name
        for ret in op._schema.returns
        if ret.alias_info is not None and not ret.alias_info.is_write
        for name in ret.alias_info.before_set
    }
    for position, argument in enumerate(op._schema.arguments):
        info = argument.alias_info
        if info is not None and not info.is_write and returned & set(info.before_set):
            return position
    return None
