"""Layout checks of torch's own that would refuse a program before the pass can repair it.

On a GPU, tracing ``_scaled_mm`` checks order, pitch and strides and raises before any backend is
called; attention asks its backends whether they take the operands' strides. While contig_safe
traces, the first judge sizes, dtypes and scales on tensors of the layout that a repair will give,
and the second gets copies that stay in the graph, where the pass takes each over as a repair or
removes it. Errors that no layout cures are raised as they are.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from contig_pass.contracts.rules import KEEP, ROW, dim_order, order_name
from contig_pass.inductor import hooks
from contig_pass.inductor.ops import contiguous_op
from contig_pass.inductor.tracing import in_contig_safe
from contig_pass.layout import FRESH_ALIGNMENT, Layout, known

_installing = threading.Lock()
_state = threading.local()


@functools.cache
def _wrap_all() -> None:
    from torch import _meta_registrations

    if hooks.CURRENT_TRACE.find() is None:
        return
    _relax_attention()
    if hooks.FAKE_CACHE.find() is None:
        return  # other backends would be served what only contig_safe may see
    _keep_out_of_the_fake_cache()
    checks = {
        hooks.SCALED_CHECK: _scaled_variants,
        hooks.SCALED_CHECK_V2: _scaled_variants,
        hooks.GROUPED_CHECK: _grouped_variants,
    }
    for hook, variants in checks.items():
        original = hook.find()
        if original is not None:
            setattr(_meta_registrations, hook.name, _relaxed(original, variants))


def install() -> None:
    """Relax the checks for contig_safe's traces, once a process."""
    with _installing:
        _wrap_all()


# -- scaled products -----------------------------------------------------------------------------


def _relaxed(original: Callable[..., Any], variants: Callable[[dict], Iterator[dict]]) -> Any:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def check(*args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except (RuntimeError, ValueError):
            if not in_contig_safe():
                raise
            given = dict(signature.bind(*args, **kwargs).arguments)
            for variant in variants(given):
                try:
                    result = original(**variant)
                except (RuntimeError, ValueError):
                    continue
                _state.relaxed = True
                return result
            raise

    return check


def _scaled_variants(given: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """``given`` with both matrices in ideal layout and the scales in each possible one."""
    matrices = {"self": _row_major(given["self"]), "mat2": _column_major(given["mat2"])}
    for scale_a, scale_b in itertools.product(
        _scale_forms(given["scale_a"]), _scale_forms(given["scale_b"])
    ):
        yield given | matrices | {"scale_a": scale_a, "scale_b": scale_b}


def _grouped_variants(given: dict[str, Any]) -> Iterator[dict[str, Any]]:
    scale_a, scale_b = given.get("scale_a"), given.get("scale_b")
    if scale_a is None or scale_b is None:
        return  # the 16-bit product has no contract, so nothing would repair it
    yield given | {
        "mat_a": _row_major(given["mat_a"]),
        "mat_b": _column_major(given["mat_b"]),
        "scale_a": _row_major(scale_a),
        "scale_b": _row_major(scale_b),
    }


def _row_major(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.new_empty(tensor.shape)


def _column_major(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dim() < 2:
        return _row_major(tensor)
    return tensor.new_empty(tensor.transpose(-1, -2).shape).transpose(-1, -2)


def _scale_forms(scale: Any) -> Iterator[Any]:
    """A scale, or a list of scales, as it is, in row order and in column order."""
    yield scale
    for form in (_row_major, _column_major):
        yield [form(s) for s in scale] if isinstance(scale, (list, tuple)) else form(scale)


def _keep_out_of_the_fake_cache() -> None:
    """A result that only contig_safe may see must not be served to another backend's trace."""
    from torch._subclasses import fake_tensor

    original = fake_tensor.FakeTensorMode._validate_cache_key

    @functools.wraps(original)
    def validate(self: Any, func: Any, args: Any, kwargs: Any) -> None:
        # Called after the op was computed, before its result is stored.
        if getattr(_state, "relaxed", False):
            _state.relaxed = False
            raise fake_tensor._BypassDispatchCache("layout checks relaxed by contig_pass")
        original(self, func, args, kwargs)

    fake_tensor.FakeTensorMode._validate_cache_key = validate


# -- attention -----------------------------------------------------------------------------------


def _relax_attention() -> None:
    """Copies of operands without a unit-stride last dimension, before a backend is chosen.

    A Python kernel of the op, which the dispatcher consults only while a compiler traces.
    """
    op = torch.ops.aten.scaled_dot_product_attention.default
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    if composite in op.py_kernels:
        return

    @op.py_impl(composite)
    def attention(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        if in_contig_safe():
            query, key, value = map(with_unit_stride, (query, key, value))
        return op._op_dk(composite, query, key, value, *args, **kwargs)


def _unit(tensor: torch.Tensor) -> bool:
    """Whether the last dimension has unit stride, or may have."""
    return known(tensor.stride(-1) == 1) is not False or known(tensor.shape[-1] <= 1) is True


def with_unit_stride(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor``, or a copy of it, with a last dimension of unit stride; it stays in the graph."""
    if tensor.dim() == 0 or _unit(tensor):
        return tensor
    layout = Layout(
        tuple(tensor.shape), tuple(tensor.stride()), 0, FRESH_ALIGNMENT, tensor.dtype, tensor.device
    )
    kept = dim_order(KEEP, layout)
    return contiguous_op()(tensor, order_name(kept) if kept[-1] == layout.ndim - 1 else ROW)
