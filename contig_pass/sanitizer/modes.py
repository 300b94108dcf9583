"""What stands between the user's program and torch: every op and every attention call passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from contig_pass.inductor.dispatch import call_watched
from contig_pass.sanitizer.checker import COMPOSITE, FOREIGN, PLAIN, VIEW, Checker
from contig_pass.sanitizer.lines import spot

#: Operators that call functions of the user's, whose ops are to be seen as well.
_CALLERS = frozenset({"cond", "while_loop", "invoke_subgraph"})
#: Tensors without memory of their own, which a mode further down takes.
_TRACED = (FakeTensor, FunctionalTensor)


class Ops(TorchDispatchMode):
    """Sees every op below autograd, with real tensors, before its kernel runs."""

    supports_higher_order_operators = True

    def __init__(self, checker: Checker) -> None:
        super().__init__()
        self._checker = checker

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self._checker.active:
            return func(*args, **kwargs)
        if types and not all(map(_is_plain, types)):
            if any(issubclass(kind, _TRACED) for kind in types):
                return func(*args, **kwargs)  # the turn of the mode that traces
            return NotImplemented  # the subclass's turn; this mode sees what it makes of the op
        if not isinstance(func, torch._ops.OpOverload):
            return self._higher_order(func, args, kwargs)
        kind = self._checker.kind(func)
        if kind == PLAIN:
            return func(*args, **kwargs)
        if kind == VIEW:
            made = func(*args, **kwargs)
            if args:
                self._checker.views.remember(func, args[0], made, spot())
            return made
        if kind in (FOREIGN, COMPOSITE) and torch.is_inference_mode_enabled():
            # Elsewhere autograd has taken a composite op apart by now.
            with type(self)(self._checker):
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        if kind == COMPOSITE:
            return func(*args, **kwargs)
        return self._checker.call(func, args, kwargs, self._launch if kind == FOREIGN else _call)

    def _launch(self, op: Any, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        return call_watched(op, args, kwargs, type(self)(self._checker))

    def _higher_order(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if func.name() in _CALLERS:
            args = tuple(self._seen(arg) if callable(arg) else arg for arg in args)
        return func(*args, **kwargs)

    def _seen(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with type(self)(self._checker):
                return function(*args)

        return run


class Attention(TorchFunctionMode):
    """Sees scaled dot product attention before it has chosen a kernel."""

    def __init__(self, checker: Checker) -> None:
        super().__init__()
        self._checker = checker

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention and self._checker.active:
            return self._checker.attend(func, args, kwargs or {})
        return func(*args, **kwargs) if kwargs else func(*args)


def _call(op: Any, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    return op(*args, **kwargs)


def _is_plain(kind: type) -> bool:
    return kind.__torch_dispatch__ is torch.Tensor.__torch_dispatch__
