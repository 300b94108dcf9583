"""Calls of the user's program that copy, or look as if they did, as Dynamo traced them.

``.contiguous()`` returns its argument where that is contiguous, and leaves nothing behind in the
ATen graph. In the graph that Dynamo traced every call still stands, with the fake tensors that went
in and came out: if both share one storage, nothing was copied. The strides that this rests on are
guarded, so the verdict holds for every call that the compiled graph serves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from contig_pass.contracts.target import Target
from contig_pass.inductor.storages import share_memory
from contig_pass.inductor.traced import innermost_call, traced_calls, traced_value
from contig_pass.layout import Layout
from contig_pass.report.copies import COMPILED_AWAY, NO_OP, Copy, make_copy

#: Calls that copy and change no value.
_COPYING = ("contiguous", "clone")
#: Calls that copy without a change of value where dtype and device stay, if asked to.
_CONVERTING = ("to", "type", "float", "double", "half", "bfloat16", "cpu", "cuda", "type_as")


def copying_call(target: Any) -> str | None:
    """The name of a call that copies, or looks as if it did; ``None``: it is no such call."""
    name = target if isinstance(target, str) else getattr(target, "__name__", None)
    if name not in (*_COPYING, *_CONVERTING):
        return None
    ours = isinstance(target, str) or target in (torch.clone, getattr(torch.Tensor, name, None))
    return name if ours else None


@dataclass(frozen=True, eq=False)
class CopyCall:
    """One such call.

    Attributes:
        node: in the graph that Dynamo traced.
        name: by which nodes of the ATen graph refer to it.
        call: what is called.
        before, after: what went in, and what came out.
        copied: memory of its own came out.
    """

    node: fx.Node
    name: str
    call: str
    before: Layout
    after: Layout
    copied: bool


def copy_calls(module: fx.GraphModule) -> list[CopyCall]:
    """The calls in a graph that Dynamo traced, and in the graphs that it calls, in order.

    Conversions count where they copied with dtype and device as they were: ``x.to(dtype)`` of an
    ``x`` that has that dtype is the way to say "if need be".
    """
    found = []
    for node in traced_calls(module):
        call = copying_call(node.target)
        source = traced_value(node.args[0]) if call is not None and node.args else None
        made = traced_value(node)
        if source is None or made is None or not _strided(source, made):
            continue
        copied = not share_memory(source, made)
        same = source.dtype == made.dtype and source.device == made.device
        if call in _CONVERTING and not (copied and same):
            continue
        named = innermost_call(node)
        name = named[0] if named else node.name
        found.append(CopyCall(node, name, call, _layout(source), _layout(made), copied))
    return found


def no_op(call: CopyCall, target: Target | None) -> Copy:
    """The row of a call that returned its argument."""
    proof = (
        f"{call.call}() returned its argument, which lies in that order already: no copy was "
        "made, and none is in the graph"
    )
    return _row(call, NO_OP, proof, target)


def compiled_away(call: CopyCall, target: Target | None) -> Copy:
    """The row of a call that copies in eager mode, and of which the compiler left nothing."""
    proof = (
        "copied in eager mode; the compiler itself took it out: the compiled graph holds no copy "
        "for this call"
    )
    return _row(call, COMPILED_AWAY, proof, target)


def _row(call: CopyCall, verdict: str, proof: str, target: Target | None) -> Copy:
    return make_copy(
        call.node, verdict, proof, call=call.call, name=call.name, before=call.before,
        after=call.after, target=target,
    )


def _strided(*tensors: torch.Tensor) -> bool:
    return all(tensor.layout is torch.strided for tensor in tensors)


def _layout(value: torch.Tensor) -> Layout:
    # Where an input's storage starts is not known here.
    itemsize = value.dtype.itemsize
    offset = value.storage_offset() * itemsize
    return Layout(
        tuple(value.shape), tuple(value.stride()), offset, itemsize, value.dtype, value.device
    )
