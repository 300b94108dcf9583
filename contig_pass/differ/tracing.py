"""Trace a program with fake tensors, plan its repair, compute nothing."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from contig_pass.contracts.target import Target
from contig_pass.differ.targets import Program, told
from contig_pass.errors import ContigPassError, TargetError
from contig_pass.inductor.faking import NEEDS_VALUES, Faking
from contig_pass.inductor.rehearsal import rehearsing
from contig_pass.inductor.trace import plan_graphs
from contig_pass.inductor.tracing import backend_call, repairs_layouts
from contig_pass.options import parse_options
from contig_pass.redundant.told import with_calls
from contig_pass.report.model import Report, merge


def trace(
    program: Program, target: Target, policy: str, faking: Faking, *, listing: bool = False
) -> Report:
    """What contig_safe would do to ``program`` on ``target``, for inference.

    The passes are those of a real compile, up to where the layout pass stands. Everything that was
    compiled in this process before is forgotten, so that equal programs give equal reports.

    Args:
        program: made of the tensors of ``faking``.
        target: the device whose demands count.
        policy: as in the options of the backend.
        faking: what made the tensors.
        listing: keep the whole graph in the report, for HTML.

    Returns:
        One report; the rows of several graphs follow each other.

    Raises:
        TargetError: it cannot be traced, or runs no tensor operation.
        LayoutViolation: policy ``strict``, and a use can be neither proved legal nor repaired.
    """
    options = parse_options(None, {"policy": policy, "target": target.name})
    options = replace(options, listing=listing)
    reports: list[Report] = []

    @repairs_layouts
    def backend(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        with backend_call():
            deliver = with_calls(module, reports.append, options.target)
            plan_graphs(module, inputs, options, deliver)
        # What follows a graph break goes on with these.
        return lambda *args: faking.outputs_of(module)

    # By names of their own, since module paths in the report begin behind them.
    model, args, kwargs = program.model, program.args, program.kwargs

    # A wrapper of its own keeps this trace out of the model's compiled code.
    def call() -> Any:
        return model(*args, **kwargs)

    torch._dynamo.reset()
    settings = {"automatic_dynamic_shapes": False, "run_gc_after_compile": False}
    try:
        with (
            program.around(), rehearsing(target), faking.on(), torch.no_grad(), _uncollected(),
            torch._dynamo.config.patch(settings),
        ):
            torch.compile(call, backend=backend)()
    except Exception as error:
        raise _known(program.name, error) from error
    if not reports:
        raise TargetError(f"{program.name} runs no tensor operation that torch.compile sees")
    return _named(merge(reports), program.name)


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Inside the block no garbage is looked for: a large graph is many objects and hardly any
    garbage, and to go through them again and again takes a tenth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _known(name: str, error: BaseException) -> ContigPassError:
    """The error of ours inside ``error``, or one that says what ended the trace."""
    # torch wraps what a backend raises, and what an op raises of its operands.
    while isinstance(error, torch._dynamo.exc.TorchDynamoException):
        inner = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__
        if inner is None:
            break
        error = inner
    if isinstance(error, ContigPassError):
        return error
    if isinstance(error, NEEDS_VALUES):
        return TargetError(
            f"{name} cannot be traced: it reads a tensor's values ({told(error)}), and a trace has "
            "none"
        )
    return TargetError(f"{name} cannot be traced: {told(error)}")


def _named(report: Report, name: str) -> Report:
    """``report`` under the program's name: torch numbers graphs by how many it has traced."""
    many = len(report.listings) > 1
    listings = tuple(
        replace(listing, graph=f"{name} #{number}" if many else name)
        for number, listing in enumerate(report.listings)
    )
    return replace(report, graph=name, listings=listings)
