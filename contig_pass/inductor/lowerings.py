"""How Inductor lowers the ops of :mod:`contig_pass.inductor.ops`.

``contiguous`` becomes a pointwise copy into a buffer whose layout is frozen: the scheduler fuses
it with the producer, and neither ``cat`` nor a later layout decision can move it. ``pin`` freezes
the buffer that is there and emits nothing, unless the buffer lies elsewhere than the graph says.
``checked`` becomes a call at run time.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import Any

import sympy
import torch

from contig_pass.contracts.rules import STRIDES, parse_order
from contig_pass.inductor import freeing
from contig_pass.inductor.ops import checked_op, contiguous_op, pin_op
from contig_pass.inductor.scope import inputs_of
from contig_pass.memory import is_opaque, is_transparent, view_base

#: Inductor's C++ backend cannot load or store these; their bytes it can.
_AS_BYTES = tuple(
    getattr(torch, name)
    for name in ("float8_e8m0fnu", "float4_e2m1fn_x2")
    if hasattr(torch, name)
)


_installing = threading.Lock()


def install() -> None:
    """Register the lowerings with Inductor, once a process."""
    with _installing:
        _register()


@functools.cache
def _register() -> None:
    from torch._inductor.lowering import register_lowering

    register_lowering(contiguous_op(), type_promotion_kind=None)(_lower_contiguous)
    register_lowering(pin_op(), type_promotion_kind=None)(_lower_pin)
    register_lowering(checked_op(), type_promotion_kind=None)(_lower_checked)
    freeing.install()


def _lower_contiguous(x: Any, order: str) -> Any:
    if _reads_opaque_memory():
        x.realize()
        _take_for_unaligned(x)
    _keep_opaque_buffers_apart()
    size = x.get_size()
    if order == STRIDES:
        return _fresh(x, _strides_in_graph())
    strides: list[sympy.Expr] = [sympy.S.One] * len(size)
    step: sympy.Expr = sympy.S.One
    for dim in reversed(parse_order(order, len(size))):
        strides[dim] = step
        step = step * size[dim]
    return _fresh(x, strides)


def _lower_pin(x: Any, alignment: int) -> Any:
    from torch._inductor import ir

    _keep_opaque_buffers_apart()
    strides = _strides_in_graph()
    held = ir.ExternKernel.require_exact_strides(x, strides)
    if _starts_aligned(held, alignment):
        return held
    return _fresh(held, strides)


def _lower_checked(x: Any, alignment: int) -> Any:
    from torch._inductor import ir, lowering
    from torch._inductor.virtualized import V

    strides = _strides_in_graph()
    if V.graph.cpp_wrapper:
        return _fresh(x, strides)  # a package has no Python to ask, so it always copies
    held = ir.ExternKernel.require_exact_strides(x, strides)
    _take_for_unaligned(held)
    return lowering.fallback_handler(checked_op(), add_to_fallback_set=False)(held, alignment)


def _buffer_of(x: Any) -> Any:
    """The buffer that holds the memory of realized ``x``."""
    from torch._inductor import ir

    while isinstance(x, (ir.TensorBox, ir.StorageBox, ir.BaseView)):
        x = x.data
    return x


def _keep_opaque_buffers_apart() -> None:
    """Let no buffer that is to start aligned take over memory of an op that may not start so.

    What Inductor takes for aligned among such results it asserts to be.
    """
    from torch._inductor.virtualized import V

    freeing.keep_apart(filter(_is_opaque, V.graph.unaligned_buffers))


def _reads_opaque_memory() -> bool:
    """Whether the node being lowered reads a result of an op that may lie anywhere."""
    from torch._inductor.virtualized import V

    source = V.graph.current_node.args[0]
    while (base := view_base(source)) is not None:
        source = base
    return is_opaque(source)


def _is_opaque(name: str) -> bool:
    from torch._inductor import ir
    from torch._inductor.virtualized import V

    buffer = V.graph.name_to_buffer.get(name)
    # A single result is a part of its op's up to torch 2.13, and the op's own from 2.14 on.
    producer = buffer.inputs[0] if isinstance(buffer, ir.MultiOutput) else buffer
    op = producer.op_overload if isinstance(producer, ir.FallbackKernel) else None
    return isinstance(op, torch._ops.OpOverload) and not is_transparent(op)


def _take_for_unaligned(x: Any) -> None:
    """Let kernels that read realized ``x`` not count on its address."""
    from torch._inductor.virtualized import V

    V.graph.unaligned_buffers.add(_buffer_of(x).get_name())


def _strides_in_graph() -> list[Any]:
    """Strides that the node being lowered has in the graph."""
    from torch._inductor.virtualized import V

    value = V.graph.current_node.meta["val"]
    return [s.node.expr if isinstance(s, torch.SymInt) else s for s in value.stride()]


def _fresh(x: Any, strides: Sequence[sympy.Expr]) -> Any:
    """A copy of ``x`` in a buffer of its own with exactly these strides."""
    from torch._inductor import ir
    from torch._inductor.lowering import lowerings

    dtype = x.get_dtype()
    view_as = lowerings[torch.ops.aten.view.dtype]
    if dtype in _AS_BYTES:
        x = view_as(x, torch.uint8)
    copy = ir.ExternKernel.copy_input(x)
    ir.as_storage_and_layout(copy, freeze=True, want_contiguous=False, exact_strides=strides)
    return view_as(copy, dtype) if dtype in _AS_BYTES else copy


def _starts_aligned(x: Any, alignment: int) -> bool:
    """Whether the first byte of realized ``x`` provably lies on a multiple of ``alignment``."""
    from torch._inductor import ir
    from torch._inductor.virtualized import V

    if isinstance(x, (ir.TensorBox, ir.StorageBox)):
        return _starts_aligned(x.data, alignment)
    if isinstance(x, ir.ReinterpretView):
        return _multiple(x.layout, alignment) and _starts_aligned(x.data, alignment)
    if isinstance(x, ir.BaseView):
        return _starts_aligned(x.unwrap_view(), alignment)
    if not isinstance(x, ir.Buffer):
        return True  # not realized: it will get a buffer of its own
    name = x.get_name()
    if name in V.graph.graph_inputs:
        return _checked_at_run_time(name)
    if isinstance(x.layout, ir.NonOwningLayout):
        return _starts_aligned(x.layout.view, alignment)
    if isinstance(x, ir.InputBuffer):
        return name not in V.graph.unaligned_buffers  # a constant, or a subgraph's input
    return _multiple(x.get_layout(), alignment)


def _multiple(layout: Any, alignment: int) -> bool:
    from torch._inductor.virtualized import V

    offset = sympy.sympify(layout.offset) * layout.dtype.itemsize
    return bool(V.graph.sizevars.statically_known_multiple_of(offset, alignment))


def _checked_at_run_time(name: str) -> bool:
    from torch._inductor.virtualized import V

    # Inputs of a subgraph go by longer names in its lowering than in its graph.
    position = V.graph.graph_input_names.index(name)
    placeholders = [node for node in V.graph.module.graph.nodes if node.op == "placeholder"]
    return placeholders[position].name in inputs_of(V.graph.module.graph).aligned
