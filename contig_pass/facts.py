"""What is known of the memory behind an FX node, before anything is compiled.

Sizes and strides come from the node's fake tensor. The address needs more care: a fake tensor's
storage offset counts from a storage whose own address says nothing. So the chain of views is
followed to its root, and the offset is judged in bytes relative to what that root is known to
start on.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import fx

from contig_pass.callsite import Operand
from contig_pass.layout import ABSOLUTE, FRESH_ALIGNMENT, INPUT_ALIGNMENT, Layout
from contig_pass.memory import is_opaque, offset_source, view_base

#: Kinds of root.
INPUT = "input"
CONSTANT = "constant"
COMPUTED = "computed"
#: Memory that something other than the compiler allocated: a custom op, a subgraph.
OPAQUE = "opaque"


@dataclass(frozen=True)
class Fact:
    """The layout of a node's value and where its memory comes from.

    Attributes:
        layout: sizes, strides, byte offset.
        root: the node that owns the memory.
        kind: ``"input"``, ``"constant"``, ``"computed"`` or ``"opaque"``.
    """

    layout: Layout
    root: fx.Node
    kind: str

    @property
    def binding(self) -> bool:
        """Whether the compiler cannot choose another layout than this.

        It lays computed values out as it likes, unless a node holds it to one.
        """
        return self.kind != COMPUTED


def fact_of(
    operand: Operand,
    aligned_inputs: Set[str],
    facts: Mapping[fx.Node, Fact] = MappingProxyType({}),
) -> Fact:
    """The fact about the value of ``operand``.

    Args:
        operand: which operand of which node.
        aligned_inputs: names of the placeholders that are realigned at run time to
            :data:`~contig_pass.layout.INPUT_ALIGNMENT` bytes; nothing is known of others.
        facts: of nodes before it, so that going through a whole graph takes linear time.
    """
    root, value = operand.node, operand.value
    while (base := view_base(root)) is not None:
        root = base
    offset = value.storage_offset() * value.dtype.itemsize
    base_alignment, kind = FRESH_ALIGNMENT, COMPUTED
    if root.op in ("placeholder", "get_attr"):
        owner = root.meta["val"]
        offset = offset - owner.storage_offset() * owner.dtype.itemsize
    if root.op == "placeholder":
        base_alignment = INPUT_ALIGNMENT if root.name in aligned_inputs else owner.dtype.itemsize
        kind = INPUT
    elif (source := offset_source(root)) is not None:
        inner = facts.get(source) or fact_of(
            Operand("", None, source, source.meta["val"], ()), aligned_inputs
        )
        base_alignment = inner.layout.known_alignment()
        kind = OPAQUE if inner.kind == OPAQUE else COMPUTED
        offset = offset - root.meta["val"].storage_offset() * value.dtype.itemsize
    elif is_opaque(root):
        base_alignment, kind = value.dtype.itemsize, OPAQUE
    elif root.op == "get_attr":
        kind = CONSTANT
        start, base_alignment = _start_of_constant(root)
        offset = offset + start
    layout = Layout(
        tuple(value.shape), tuple(value.stride()), offset, base_alignment, value.dtype, value.device
    )
    return Fact(layout, root, kind)


_PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


def _start_of_constant(node: fx.Node) -> tuple[int, int]:
    """Where a constant's first element lies, in bytes, and what that is counted from."""
    held: object = node.graph.owning_module
    for part in str(node.target).split("."):
        held = getattr(held, part, None)
    if type(held) in _PLAIN_TENSORS and held.device.type != "meta":
        return held.data_ptr(), ABSOLUTE
    value = held if isinstance(held, torch.Tensor) else node.meta["val"]
    return value.storage_offset() * value.dtype.itemsize, FRESH_ALIGNMENT
