"""What a compiled graph carries of us through Inductor's caches.

No pass runs on a graph that comes out of a cache. So the graph itself carries which of its inputs
are to be realigned, and its report: as an attribute that is stored with it, and read whenever the
graph becomes ready to run.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

from contig_pass.errors import ReportError
from contig_pass.inductor import hooks
from contig_pass.inductor.scope import positions
from contig_pass.inputs import realigning
from contig_pass.report.json import from_file, to_file
from contig_pass.report.model import Report, merge

_CARRIED = "_contig_pass"
_logger = logging.getLogger("contig_pass")
_installing = threading.Lock()


@dataclass
class Delivery:
    """Where one backend call's reports go.

    Attributes:
        deliver: receives each report.
        fresh: reports of the graph that is being compiled.
        folded: what was done to its parameters before that, once.
    """

    deliver: Callable[[Report], None]
    fresh: list[Report] = field(default_factory=list)
    folded: list[Report] = field(default_factory=list)

    def __call__(self, report: Report) -> None:
        """Deliver the report of a pass that has run."""
        if self.folded:
            report = merge([*self.folded, report])
            self.folded = []
        self.fresh.append(report)
        self.deliver(report)

    def add_folded(self, report: Report) -> None:
        """What was done to parameters, to be told with the graph's own report."""
        self.folded.append(report)


_CURRENT: ContextVar[Delivery | None] = ContextVar("contig_pass_delivery", default=None)


@contextlib.contextmanager
def delivering(delivery: Delivery) -> Iterator[None]:
    """Inside the block, compiled graphs are given what they carry, and loaded ones use it."""
    token = _CURRENT.set(delivery)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def install() -> None:
    """Take notice of graphs that are compiled and of graphs that become ready, once a process."""
    with _installing:
        _wrap_compiled_graph()


@functools.cache
def _wrap_compiled_graph() -> None:
    from torch._inductor.output_code import CompiledFxGraph

    compiled, ready = hooks.COMPILED_GRAPH.find(), hooks.POST_COMPILE.find()

    @functools.wraps(compiled)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        compiled(self, *args, **kwargs)
        delivery = _CURRENT.get()
        if delivery is not None:
            _load_up(self, delivery)

    @functools.wraps(ready)
    def post_compile(self: Any, *args: Any, **kwargs: Any) -> None:
        ready(self, *args, **kwargs)
        delivery = _CURRENT.get()
        if delivery is not None:
            _make_ready(self, delivery)

    CompiledFxGraph.__init__ = init  # type: ignore[method-assign]
    CompiledFxGraph.post_compile = post_compile  # type: ignore[method-assign]


def _load_up(graph: Any, delivery: Delivery) -> None:
    carried = {"positions": sorted(positions()), "reports": to_file(delivery.fresh)}
    setattr(graph, _CARRIED, carried)


def _make_ready(graph: Any, delivery: Delivery) -> None:
    carried = getattr(graph, _CARRIED, None)
    if carried is None:
        return  # an empty graph: nothing was lowered
    if carried["positions"] and graph.current_callable is not None:
        cudagraphs = bool(graph.fx_kwargs.get("cudagraphs"))
        static = frozenset(graph.fx_kwargs.get("static_input_idxs") or ())
        graph.current_callable = realigning(
            graph.current_callable,
            carried["positions"],
            written=frozenset(graph.mutated_input_idxs),
            # A CUDA graph holds on to the addresses of parameters.
            kept=static if cudagraphs else frozenset(),
        )
    if delivery.fresh:
        delivery.fresh, delivery.folded = [], []
        return
    try:
        reports = from_file(carried["reports"])
    except ReportError as error:
        _logger.warning("the report of a graph from a compile cache cannot be read: %s", error)
        return
    for report in reports:
        delivery.deliver(replace(report, cached=True))
