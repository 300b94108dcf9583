"""``explain``: what contig_safe would do to a model, without compiling it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from contig_pass.aot_eager import compile_with_aot_eager
from contig_pass.errors import ContigPassError
from contig_pass.options import parse_options
from contig_pass.plan import CONTRACT, DENSE
from contig_pass.redundant.told import with_calls
from contig_pass.report.model import Report, merge


def explain(
    model: Callable[..., Any],
    *args: Any,
    policy: str = DENSE,
    target: str = "auto",
    **kwargs: Any,
) -> Report:
    """Trace ``model(*args, **kwargs)`` and plan its repair; compile nothing, change nothing.

    Each graph goes through the passes that Inductor would run before the layout pass, so the
    report is that of a real compile. The traced graphs are then run eagerly, op by op and with
    every broken rule repaired, so that a model that breaks into several graphs is followed to its
    end whatever kernels it calls.

    Args:
        model: a module or function.
        args, kwargs: what to call it with.
        policy, target: as in the options of the backend.

    Returns:
        One report; the rows of several graphs follow each other.

    Raises:
        OptionError: a bad policy or target.
        LayoutViolation: policy ``strict``, and a use can be neither proved legal nor repaired.
        ContigPassError: nothing was traced, so there is nothing to report on.
    """
    from contig_pass.inductor.trace import plan_graphs
    from contig_pass.inductor.tracing import backend_call, repairs_layouts

    options = replace(parse_options(None, {"policy": policy, "target": target}), listing=True)
    repaired = replace(options, policy=CONTRACT, listing=False)
    reports: list[Report] = []

    @repairs_layouts
    def backend(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        with backend_call():
            deliver = with_calls(module, reports.append, options.target)
            plan_graphs(module, inputs, options, deliver)
            return compile_with_aot_eager(module, inputs, repaired, lambda report: None)

    # A wrapper of its own keeps this trace out of the model's compiled code.
    def call() -> Any:
        return model(*args, **kwargs)

    with torch._dynamo.utils.preserve_rng_state():
        torch.compile(call, backend=backend)()
    if not reports:
        name = getattr(model, "__qualname__", type(model).__name__)
        raise ContigPassError(
            f"nothing of {name} was traced: it runs no tensor operation that torch.compile sees"
        )
    return merge(reports)
