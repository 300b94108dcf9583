"""What would come of a graph without one of its copies. Edits nothing.

The copy's readers are given what was copied instead, and everything that depends on them is traced
anew with fake tensors, until each value lies as it did before. What cannot read the other layout,
or could tell the difference, is an obstacle.
"""

from __future__ import annotations

import heapq
import operator
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from contig_pass.callsite import (
    Operand,
    called_op,
    is_functionalized,
    is_triton_kernel,
    mutated_arguments,
    mutates_in_place,
    operands,
    triton_operands,
    writes_directly,
)
from contig_pass.facts import fact_of
from contig_pass.inductor.storages import share_memory
from contig_pass.layout import FRESH_ALIGNMENT, Layout
from contig_pass.memory import is_transparent, memory_of, view_base
from contig_pass.redundant.exact import is_exact

#: Values that may lie otherwise before the trial is given up.
_MOST = 200


@dataclass(frozen=True, eq=False)
class Changed:
    """A value that would lie otherwise, or in other memory.

    Attributes:
        node: whose value.
        value: the fake tensor, or list of them, that it would have.
        owner: the node in whose memory it would lie.
    """

    node: fx.Node
    value: Any
    owner: fx.Node


@dataclass(frozen=True, eq=False)
class Obstacle:
    """Something that could tell the graph with the copy from the graph without it.

    Attributes:
        node: where.
        words: what, as the end of a sentence about the copy.
        read: the values there that would lie otherwise, where that alone is the obstacle: the op
            may be bound by a contract that accepts them.
    """

    node: fx.Node
    words: str
    read: tuple[fx.Node, ...] = ()


@dataclass(frozen=True, eq=False)
class Trial:
    """The outcome for one copy.

    Attributes:
        copy: the copy.
        source: what it copies.
        changed: values that would lie otherwise, in graph order, the copy first.
        obstacles: none: the copy is without effect.
        readers: nodes that would read something else and give the same values in the same layout.
    """

    copy: fx.Node
    source: fx.Node
    changed: Mapping[fx.Node, Changed]
    obstacles: tuple[Obstacle, ...]
    readers: tuple[fx.Node, ...]

    def layout_at(self, node: fx.Node, aligned_inputs: Set[str]) -> Layout:
        """How a changed tensor would lie."""
        return _layout_of(self.changed[node], aligned_inputs)


@dataclass(eq=False)
class Bench:
    """A graph, made ready for trials.

    Attributes:
        positions: of the nodes.
        written: nodes whose memory some node writes to, or may.
        aligned_inputs: names of the placeholders that are realigned at run time.
    """

    positions: dict[fx.Node, int]
    written: frozenset[fx.Node]
    aligned_inputs: Set[str] = field(default_factory=frozenset)

    @classmethod
    def of(cls, graph: fx.Graph, aligned_inputs: Set[str]) -> Bench:
        """The bench for ``graph`` as it is now."""
        positions = {node: index for index, node in enumerate(graph.nodes)}
        written = (memory_of(node) for user in graph.nodes for node in _written_by(user))
        return cls(positions, frozenset(written), aligned_inputs)


def without(copy: fx.Node, bench: Bench) -> Trial:
    """Try the graph without ``copy``, an op that copies its first operand."""
    source: fx.Node = copy.args[0]  # type: ignore[assignment]
    first = _forbidding(copy, source, bench)
    if first is not None:
        return Trial(copy, source, {}, (Obstacle(copy, first),), ())
    changed = {copy: Changed(copy, source.meta["val"], source)}
    obstacles: list[Obstacle] = []
    readers: list[fx.Node] = []
    queue: list[tuple[int, fx.Node]] = []
    queued: set[fx.Node] = set()

    def look_at_users(node: fx.Node) -> None:
        for user in node.users:
            if user not in queued:
                queued.add(user)
                heapq.heappush(queue, (bench.positions[user], user))

    look_at_users(copy)
    while queue:
        _, node = heapq.heappop(queue)
        outcome = _at(node, changed, bench)
        if isinstance(outcome, Obstacle):
            obstacles.append(outcome)
        elif outcome is None:
            readers.append(node)
        else:
            changed[node] = outcome
            look_at_users(node)
        if len(changed) > _MOST:
            obstacles.append(Obstacle(node, "too many values follow from it to look at them all"))
            break
    return Trial(copy, source, changed, tuple(obstacles), tuple(readers))


def _forbidding(copy: fx.Node, source: fx.Node, bench: Bench) -> str | None:
    """Why the copy stays whoever reads it; ``None``: it depends on its readers."""
    before, after = source.meta.get("val"), copy.meta.get("val")
    if not isinstance(before, FakeTensor) or not isinstance(after, FakeTensor):
        return "its memory is not that of a plain tensor"
    if before.dtype.is_complex or before.is_neg():
        return "complex values and their views are not looked into"
    if _is_symbolic(before) or _is_symbolic(after):
        return "sizes, strides or offset are symbolic, so that nothing is proved for every call"
    if memory_of(source) in bench.written:
        return "what it copies is written to, and the copy keeps the values"
    if memory_of(copy) in bench.written:
        return "it is written to, and what it copies keeps its values"
    return None


def _at(
    node: fx.Node, changed: Mapping[fx.Node, Changed], bench: Bench
) -> Changed | Obstacle | None:
    """What becomes of ``node``; ``None``: it gives what it gave before."""
    read = tuple(arg for arg in node.all_input_nodes if arg in changed)
    if node.op == "output":
        one = changed[read[0]]
        words = "it is returned, and its memory and strides are promised"
        if one.owner is not one.node:
            words = f"it is returned, and would be a view of {one.owner.name}"
        return Obstacle(node, words)
    if any(memory_of(arg) in {memory_of(one) for one in read} for arg in _written_by(node)):
        return Obstacle(node, f"{_name(node)} writes to it")
    base = _viewed(node, changed)
    if base is not None:
        return _view(node, base, changed)
    if is_exact(node):
        value = _traced_anew(node, changed)
        if isinstance(value, Obstacle):
            return value
        return None if _same_strides(value, node.meta["val"]) else Changed(node, value, node)
    return _reading(node, read, changed, bench)


def _viewed(node: fx.Node, changed: Mapping[fx.Node, Changed]) -> fx.Node | None:
    """The changed node that ``node`` is a view of, or one of the views of."""
    if node.target is operator.getitem:
        return node.args[0] if node.args[0] in changed else None  # type: ignore[return-value]
    base = view_base(node)
    return base if base in changed else None


def _view(
    node: fx.Node, base: fx.Node, changed: Mapping[fx.Node, Changed]
) -> Changed | Obstacle:
    value = _traced_anew(node, changed)
    if isinstance(value, Obstacle):
        return value
    owner = changed[base].owner
    before = pytree.tree_leaves(changed[base].value)[0]
    if not all(share_memory(leaf, before) for leaf in pytree.tree_leaves(value)):
        return Obstacle(node, f"{_name(node)} would have to copy in its place")
    return Changed(node, value, owner)


def _reading(
    node: fx.Node, read: tuple[fx.Node, ...], changed: Mapping[fx.Node, Changed], bench: Bench
) -> Obstacle | None:
    """``None`` if an op that may look at strides and addresses finds the same ones."""
    op = called_op(node)
    otherwise = [arg for arg in read if not _same_strides(changed[arg].value, arg.meta["val"])]
    if otherwise:
        arg = otherwise[0]
        words = (
            f"{_name(node)} reads strides {_strides(arg.meta['val'])}, and would find "
            f"{_strides(changed[arg].value)}"
        )
        return Obstacle(node, words, tuple(otherwise))
    for arg in read:
        before = fact_of(_whole(arg), bench.aligned_inputs).layout.known_alignment()
        after = _layout_of(changed[arg], bench.aligned_inputs).known_alignment()
        if after < before:
            words = (
                f"{_name(node)} may go by the address, a multiple of {before} bytes, and what is "
                f"copied is only known to lie on {after}"
            )
            return Obstacle(node, words, (arg,))
    if op is None or is_functionalized(node) or not is_transparent(op):
        return Obstacle(node, f"nothing says what {_name(node)} looks at in its operands", read)
    return None


def _traced_anew(node: fx.Node, changed: Mapping[fx.Node, Changed]) -> Any:
    """The fake value of ``node`` with what it would read; an obstacle where it cannot be had."""
    def value_of(arg: fx.Node) -> Any:
        return changed[arg].value if arg in changed else arg.meta.get("val")

    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value_of)
    leaves = pytree.tree_leaves((args, kwargs))
    if any(_is_symbolic(leaf) for leaf in leaves):
        return Obstacle(node, f"{_name(node)} reads symbolic sizes: not proved for every call")
    mode = next(leaf.fake_mode for leaf in leaves if isinstance(leaf, FakeTensor))
    target: Callable[..., Any] = node.target  # type: ignore[assignment]
    try:
        with mode:
            return target(*args, **kwargs)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        return Obstacle(node, f"{_name(node)} cannot do without it ({reason})")


def _layout_of(changed: Changed, aligned_inputs: Set[str]) -> Layout:
    value, owner = changed.value, changed.owner
    if isinstance(value, (list, tuple)):
        raise TypeError(f"{changed.node.name} is several tensors")
    offset, base = value.storage_offset() * value.dtype.itemsize, FRESH_ALIGNMENT
    held = owner.meta["val"]
    if share_memory(held, value):  # else the owner's own new memory
        known = fact_of(_whole(owner), aligned_inputs).layout
        offset = known.byte_offset + offset - held.storage_offset() * held.dtype.itemsize
        base = known.base_alignment
    return Layout(
        tuple(value.shape), tuple(value.stride()), offset, base, value.dtype, value.device
    )


def _whole(node: fx.Node) -> Operand:
    return Operand("", None, node, node.meta["val"], ())


def _written_by(node: fx.Node) -> Iterator[fx.Node]:
    """Nodes whose memory ``node`` writes to, or may."""
    if node.op != "call_function":
        return
    if is_functionalized(node):
        # The compiler may let the op write to the base itself.
        yield from (arg for arg in node.kwargs.get("_all_bases", ()) if isinstance(arg, fx.Node))
        names = mutated_arguments(called_op(node))
        yield from (node.kwargs[n] for n in names if isinstance(node.kwargs.get(n), fx.Node))
    elif writes_directly(node):
        names = mutated_arguments(node.target)  # type: ignore[arg-type]
        yield from (o.node for o in operands(node, node.target) if o.argument in names)  # type: ignore[arg-type]
    elif is_triton_kernel(node):
        named = node.kwargs.get("tensors_to_clone", ())
        yield from (
            operand.node
            for operand in triton_operands(node)
            if mutates_in_place(node) or operand.argument in named
        )


def _is_symbolic(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        numbers = (*value.shape, *value.stride(), value.storage_offset())
        return not all(isinstance(number, int) for number in numbers)
    return isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))


def _same_strides(one: Any, other: Any) -> bool:
    leaves, others = pytree.tree_leaves(one), pytree.tree_leaves(other)
    return len(leaves) == len(others) and all(
        a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
        for a, b in zip(leaves, others, strict=True)
    )


def _strides(value: Any) -> str:
    leaves = pytree.tree_leaves(value)
    return ", ".join(f"({', '.join(map(str, leaf.stride()))})" for leaf in leaves)


def _name(node: fx.Node) -> str:
    op = called_op(node)
    return str(op or node.target).removesuffix(".default")
