"""Whether contig_safe is what traces at this moment.

What is relaxed for contig_safe must hold for nobody else in the process. While Dynamo traces, the
backend that it will call says whose trace it is; after that, AOTAutograd and Inductor run inside
the backend's own call.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

_Backend = TypeVar("_Backend", bound=Callable[..., Any])

_COMPILING: ContextVar[bool] = ContextVar("contig_pass_compiling", default=False)
_MARK = "_contig_pass_repairs_layouts"


def repairs_layouts(backend: _Backend) -> _Backend:
    """Mark ``backend``: graphs traced for it may hold layouts that kernels refuse."""
    setattr(backend, _MARK, True)
    return backend


@contextlib.contextmanager
def backend_call() -> Iterator[None]:
    """Inside the block a contig_safe backend traces, lowers or loads a graph."""
    token = _COMPILING.set(True)
    try:
        yield
    finally:
        _COMPILING.reset(token)


def in_contig_safe() -> bool:
    """Whether what is being traced or compiled in this thread is contig_safe's."""
    return _COMPILING.get() or _is_marked(_dynamo_backend())


def _dynamo_backend() -> Any:
    """The backend of the trace that Dynamo is in; ``None`` outside of one."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        return InstructionTranslator.current_tx().output.compiler_fn
    except AttributeError:
        return None


def _is_marked(backend: Any) -> bool:
    """Whether ``backend``, or what torch has wrapped in it, carries the mark."""
    for _ in range(8):
        if backend is None or getattr(backend, _MARK, False):
            return backend is not None
        if isinstance(backend, functools.partial):
            backend = backend.func
        else:
            wrapped = getattr(backend, "_torchdynamo_orig_backend", None)
            backend = wrapped or getattr(backend, "compiler_fn", None)
    return False
