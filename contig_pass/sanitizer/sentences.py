"""What is wrong, who made it so and what would be right, in words."""

from __future__ import annotations

import torch

from contig_pass.contracts.judging import judge, objections
from contig_pass.contracts.rules import COLUMN, ROW, AlignedPointer, UnitStrideLast
from contig_pass.layout import Layout
from contig_pass.sanitizer.calls import EagerCall
from contig_pass.sanitizer.findings import FAKE, LAYOUT, SLOW, WRITE, Finding
from contig_pass.sanitizer.lines import NOWHERE, Caller, Line, line_at
from contig_pass.sanitizer.operands import Offence
from contig_pass.sanitizer.views import View, Views


def offence_found(call: EagerCall, offence: Offence, views: Views, by: Caller) -> Finding:
    """An operand breaks its contract."""
    tensor, layout, remedy = offence.tensor.value, offence.layout, offence.remedy
    makers = (
        views.culprit(tensor, lambda seen, rule=rule: judge((rule,), seen) != ((), ()))
        for rule in offence.broken
    )
    told = remedy.obstacle
    if told is None:
        told = _copy(offence.tensor.name, remedy.order, layout.ndim)
        pointer = any(isinstance(rule, AlignedPointer) for rule in offence.broken)
        if pointer and layout.contiguous():
            told += ", since .contiguous() does not copy a dense view"
    maker, made = _who(next(filter(None, makers), None))
    return Finding(
        kind=LAYOUT,
        op=call.op._schema.name,
        operand=offence.tensor.name,
        line=by.line,
        module=by.module,
        what=", ".join(objections(offence.broken)),
        memory=_memory(tensor),
        remedy=told,
        maker=maker,
        made=made,
        rules=tuple(rule.describe() for rule in offence.broken),
    )


def slow_attention(
    call: EagerCall, name: str, backend: int | None, views: Views, by: Caller
) -> Finding:
    """An operand's layout keeps attention from every fused kernel.

    Args:
        call: of scaled dot product attention.
        name: the operand.
        backend: what it gets instead; ``None``: an error.
        views: the view ops seen.
        by: who calls it.
    """
    tensor = call.tensors[name].value
    unit = UnitStrideLast()
    view = views.culprit(tensor, lambda layout: unit.check(layout) is False)
    maker, made = _who(view or next(views.chain(tensor), None))
    slow = "so attention runs on the slow math path"
    return Finding(
        kind=SLOW,
        op=call.op._schema.name,
        operand=name,
        line=by.line,
        module=by.module,
        what=f"no fused kernel takes this layout, {slow if backend is not None else 'nor another'}",
        memory=_memory(tensor),
        remedy=_copy(name, ROW, tensor.ndim),
        maker=maker,
        made=made,
    )


def write(call: EagerCall, name: str, by: Caller) -> Finding:
    """A kernel wrote to an operand that its schema does not declare."""
    return Finding(
        kind=WRITE,
        op=call.op._schema.name,
        operand=name,
        line=by.line,
        module=by.module,
        what="the kernel wrote to this operand, and the op's schema does not say so",
        memory=_memory(call.tensors[name].value),
        remedy=f"declare it, mutates_args={{{call.tensors[name].argument!r}}}",
    )


def dishonest_fake(call: EagerCall, tensor: torch.Tensor, promise: str, by: Caller) -> Finding:
    """A kernel returned another layout than its fake implementation says."""
    return Finding(
        kind=FAKE,
        op=call.op._schema.name,
        operand="result",
        line=by.line,
        module=by.module,
        what=f"the op's fake implementation says {promise}",
        memory=_memory(tensor),
        remedy="correct the fake, or make the kernel return what it says",
    )


def _who(view: View | None) -> tuple[str, Line]:
    return ("", NOWHERE) if view is None else (view.op._schema.name, line_at(view.spot))


def _copy(name: str, order: str, ndim: int) -> str:
    """The expression for a fresh, aligned, dense copy of ``name`` in a named order."""
    fresh = "clone(memory_format=torch.contiguous_format)"
    expression = f'torch.ops.contig_pass.contiguous({name}, "{order}")'
    if order == ROW or (order == COLUMN and ndim < 2):
        expression = f"{name}.{fresh}"
    elif order == COLUMN:
        expression = f"{name}.mT.{fresh}.mT"
    return f"pass a fresh copy: {expression}"


def _memory(tensor: torch.Tensor) -> str:
    """Dtype, sizes, strides, address, and where in its storage it starts."""
    layout = Layout.of(tensor)
    name = str(layout.dtype).removeprefix("torch.")
    sizes = ", ".join(map(str, layout.shape))
    strides = ", ".join(map(str, layout.strides))
    address, offset = layout.byte_offset, tensor.storage_offset() * layout.itemsize
    return (
        f"{name}[{sizes}] strides ({strides}) at address {address:#x} ({address % 16} mod 16), "
        f"byte {offset} of its storage"
    )
