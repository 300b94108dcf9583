"""The compile in progress: which graph inputs are realigned at run time.

Every input that a contract can reach is looked at when the graph runs, and copied if it does not
start on 16 bytes, so that the pass may take each of them as aligned. (Inductor does as much for
some inputs; it leaves out what it saw misaligned in the first call, parameters, and everything on
a CPU.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from contig_pass.callsite import subgraph_call
from contig_pass.inputs import reached_inputs
from contig_pass.provenance import parameter_name


@dataclass(frozen=True)
class Inputs:
    """What is known of a graph's placeholders, by name.

    Attributes:
        aligned: those that start on 16 bytes whenever the graph runs.
        parameters: parameters and buffers, and their names in the user's model.
        called: the graph is a subgraph of the one that is being compiled.
    """

    aligned: frozenset[str] = frozenset()
    parameters: Mapping[str, str] = field(default_factory=dict)
    called: bool = False


@dataclass(frozen=True)
class Scope:
    """One compile of one graph.

    Attributes:
        inputs: of the graph and of the subgraphs that it calls, by module.
        positions: of the graph's inputs that are realigned at run time.
    """

    inputs: Mapping[fx.GraphModule, Inputs]
    positions: frozenset[int]

    @classmethod
    def of(cls, module: fx.GraphModule, parameters: Mapping[str, str]) -> Scope:
        """The scope for ``module``: every tensor input that a contract can reach is realigned,
        and every operand of a subgraph that one inside can reach."""
        aligned = _reached(module)
        inputs = {module: Inputs(aligned, parameters)}
        inputs |= {inner: Inputs(_reached(inner), called=True) for inner in _called_graphs(module)}
        placeholders = (n for n in module.graph.nodes if n.op == "placeholder")
        positions = frozenset(i for i, node in enumerate(placeholders) if node.name in aligned)
        return cls(inputs, positions)


def _reached(module: fx.GraphModule) -> frozenset[str]:
    return frozenset(node.name for node in reached_inputs(module.graph))


def _called_graphs(module: fx.GraphModule) -> Iterator[fx.GraphModule]:
    for node in module.graph.nodes:
        call = subgraph_call(node)
        for inner in call.graphs if call is not None else ():
            yield inner
            yield from _called_graphs(inner)


_CURRENT: ContextVar[Scope | None] = ContextVar("contig_pass_scope", default=None)


def in_progress() -> bool:
    """Whether a graph is being compiled by contig_safe."""
    return _CURRENT.get() is not None


def inputs_of(graph: fx.Graph) -> Inputs:
    """What the compile in progress knows of the placeholders of ``graph``."""
    scope = _CURRENT.get()
    if scope is None:
        return Inputs()
    # What is called in ways that leave its inputs open, such as a loop's body, is not listed.
    return scope.inputs.get(graph.owning_module, Inputs(called=bool(scope.inputs)))


def positions() -> frozenset[int]:
    """Positions of the inputs that the compile in progress realigns at run time."""
    scope = _CURRENT.get()
    return frozenset() if scope is None else scope.positions


def parameter_names(module: fx.GraphModule) -> tuple[str, ...]:
    """Names in the user's model of the inputs of a graph that Dynamo traced, in their order."""
    return tuple(map(parameter_name, _sources(module)))


def parameter_positions(module: fx.GraphModule) -> tuple[int, ...]:
    """Positions of the inputs of a graph that Dynamo traced that are parameters or buffers.

    By where Dynamo found them: a copy of the graph has lost what AOTAutograd goes by.
    """
    return tuple(
        position
        for position, source in enumerate(_sources(module))
        if "._parameters[" in source or "._buffers[" in source
    )


def _sources(module: fx.GraphModule) -> Iterator[str]:
    for node in module.graph.nodes:
        if node.op == "placeholder":
            name = getattr(getattr(node.meta.get("grapharg"), "source", None), "name", "")
            yield name() if callable(name) else name


@contextlib.contextmanager
def compiling(
    module: fx.GraphModule, names: Sequence[str] = (), kwargs: Mapping[str, Any] | None = None
) -> Iterator[Scope]:
    """Inside the block, inputs of ``module`` that contracts reach are checked at run time.

    Args:
        module: what Inductor is to compile.
        names: of the inputs of the graph that Dynamo traced.
        kwargs: what ``compile_fx_inner`` is called with.
    """
    scope = Scope.of(module, _parameters(module, names, kwargs or {}))
    token = _CURRENT.set(scope)
    try:
        yield scope
    finally:
        _CURRENT.reset(token)


@contextlib.contextmanager
def repairing() -> Iterator[None]:
    """Inside the block graphs are compiled whose inputs nobody realigns."""
    token = _CURRENT.set(Scope({}, frozenset()))
    try:
        yield
    finally:
        _CURRENT.reset(token)


def _parameters(
    module: fx.GraphModule, names: Sequence[str], kwargs: Mapping[str, Any]
) -> dict[str, str]:
    if kwargs.get("is_backward"):
        return {}  # what is static there is what the forward graph saved
    placeholders = [node.name for node in module.graph.nodes if node.op == "placeholder"]
    given = names if len(names) == len(placeholders) else ("?",) * len(placeholders)
    static = [i for i in kwargs.get("static_input_idxs") or () if i < len(placeholders)]
    return {placeholders[i]: given[i] or "?" for i in static}
