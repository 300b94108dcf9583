"""The reference: a program run eagerly with every kernel operand replaced by a dense aligned copy.

The copies are made with plain torch ops, apart from contig_pass, so that a value that both agree
on was computed from the right elements.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_ROW, _COLUMN, _KEEP = "row", "column", "keep"
_PRODUCTS = ("_scaled_mm", "_scaled_mm_v2", "_scaled_grouped_mm", "_int_mm", "matmul")
_ONE_MATRIX = ("rows", "late", "scaled", "linear", "fill", "total", "shifted", "shifted_parts")
_OTHERS = (*_ONE_MATRIX, "accumulate", "flash", "cudnn", "efficient")


class DenseOperands(TorchDispatchMode):
    """Every kernel of the catalogue receives dense, fresh, aligned copies of its operands."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        attention = name.startswith("_scaled_dot_product_") and "math" not in name
        if name not in _PRODUCTS + _OTHERS and not attention:
            return func(*args, **kwargs)
        schema = func._schema.arguments
        given = dict(zip((a.name for a in schema), args, strict=False)) | kwargs
        written = {}
        for argument in schema:
            if argument.name not in given:
                continue
            value, alias = given[argument.name], argument.alias_info
            is_written = alias is not None and alias.is_write
            if is_written and argument.kwarg_only:
                continue  # out= of an aten op, which is returned; its kernels take any
            given[argument.name] = _copied(value, name, argument.name)
            if is_written:
                written[argument.name] = value
        result = func(**given)
        for operand, value in written.items():
            value.copy_(given[operand])
        return result


class DenseAttention(TorchFunctionMode):
    """Attention receives dense copies before a backend is chosen: the choice, which comes before
    dispatch, refuses some strides."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            args = tuple(_copied(value, "_scaled_dot_product_", "query") for value in args)
        return func(*args, **(kwargs or {}))


def _copied(value: Any, op: str, operand: str) -> Any:
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], torch.Tensor):
        return [_copied(item, op, operand) for item in value]
    if not isinstance(value, torch.Tensor):
        return value
    order = _order(value, op, operand)
    if order == _COLUMN:
        turned = value.transpose(-1, -2)
        return torch.empty(turned.shape, dtype=value.dtype, device=value.device).copy_(
            turned
        ).transpose(-1, -2)
    if order == _ROW:
        return torch.empty(value.shape, dtype=value.dtype, device=value.device).copy_(value)
    return torch.empty_like(value).copy_(value)


def _order(value: torch.Tensor, op: str, operand: str) -> str:
    if op in _PRODUCTS and operand in ("self", "a"):
        return _ROW
    if op in _PRODUCTS and operand in ("mat2", "b"):
        return _COLUMN
    if operand == "scale_a" and value.dim() == 2 and value.shape[1] > 1:
        return _COLUMN  # 1x128 blocks: outer dimension major
    return _ROW if op in _ONE_MATRIX else _KEEP
