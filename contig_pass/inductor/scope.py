"""The compile in progress: which graph inputs are realigned at run time.

Inductor checks at run time that some inputs start on 16 bytes and copies those that do not,
writing mutations back. It leaves out what it saw misaligned in the first call, parameters, and
everything on a CPU. Within a contig_safe compile the list also holds every input that a contract
can reach, so that the pass may take each of them as aligned. The list is stored in the compiled
artifact and is part of its cache key.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from contig_pass.errors import InductorHookError
from contig_pass.inputs import reached_inputs


@dataclass(frozen=True)
class Scope:
    """One compile of one graph.

    Attributes:
        module: the graph's module; its subgraphs have inputs of their own.
        aligned_inputs: names of its placeholders that are realigned at run time.
        positions: the same, as positions among the placeholders.
    """

    module: fx.GraphModule
    aligned_inputs: frozenset[str]
    positions: frozenset[int]

    @classmethod
    def of(cls, module: fx.GraphModule) -> Scope:
        """The scope for ``module``: every tensor input that a contract can reach."""
        names = frozenset(node.name for node in reached_inputs(module.graph))
        placeholders = (n for n in module.graph.nodes if n.op == "placeholder")
        positions = frozenset(i for i, node in enumerate(placeholders) if node.name in names)
        return cls(module, names, positions)


_CURRENT: ContextVar[Scope | None] = ContextVar("contig_pass_scope", default=None)


def in_progress() -> bool:
    """Whether a graph is being compiled by contig_safe."""
    return _CURRENT.get() is not None


def aligned_inputs(graph: fx.Graph) -> frozenset[str]:
    """Names of the placeholders of ``graph`` that the compile in progress realigns."""
    scope = _CURRENT.get()
    if scope is None or graph.owning_module is not scope.module:
        return frozenset()
    return scope.aligned_inputs


@contextlib.contextmanager
def compiling(module: fx.GraphModule) -> Iterator[Scope]:
    """Inside the block, inputs of ``module`` that contracts reach are checked at run time."""
    _install_check()
    scope = Scope.of(module)
    token = _CURRENT.set(scope)
    try:
        yield scope
    finally:
        _CURRENT.reset(token)


@functools.cache
def _install_check() -> None:
    """Let Inductor's choice of inputs to check ask the scope, once a process."""
    from torch._inductor import compile_fx

    original = getattr(compile_fx, "get_input_idxs_to_check", None)
    if original is None:
        raise InductorHookError(
            f"torch {torch.__version__} has no compile_fx.get_input_idxs_to_check: misaligned "
            "inputs cannot be realigned; use options={'inner': 'aot_eager'} or another torch"
        )
    compile_fx.get_input_idxs_to_check = _with_scope(original)


def _with_scope(original: Callable[..., Sequence[int]]) -> Callable[..., Sequence[int]]:
    @functools.wraps(original)
    def get_input_idxs_to_check(inputs: Sequence[Any], static: Sequence[int]) -> Sequence[int]:
        chosen = original(inputs, static)
        scope = _CURRENT.get()
        if scope is None:
            return chosen
        return sorted({*chosen, *(i for i in scope.positions if i < len(inputs))})

    return get_input_idxs_to_check

