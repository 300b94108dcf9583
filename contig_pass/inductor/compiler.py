"""Compile a graph with Inductor and the layout pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import fx

from contig_pass.inductor import artifact, hooks, lowerings, scaled_mm
from contig_pass.inductor.aliased import compile_for_placement
from contig_pass.inductor.artifact import Delivery, delivering
from contig_pass.inductor.freezing import FOLDING_HOOK, FoldingPass
from contig_pass.inductor.graph_pass import HOOK, LayoutPass
from contig_pass.inductor.honesty import SIZE_ASSERTS, told_plainly
from contig_pass.inductor.offsets import count_from_inputs
from contig_pass.inductor.scope import compiling, parameter_names, repairing
from contig_pass.inductor.tracing import backend_call
from contig_pass.options import Options
from contig_pass.plan import STRICT
from contig_pass.report.model import Report
from contig_pass.returned import aliases_of_inputs, return_views_of_inputs


def compile_with_inductor(
    module: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    deliver: Callable[[Report], None],
) -> Callable[..., Any]:
    """Inductor's ``compile_fx`` with the layout pass at the end of its graph passes.

    Forward and backward graphs both pass through. A pass that the user configured for the same
    hook, in ``options`` or in ``torch._inductor.config``, runs before ours.
    """
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    _install()
    delivery = Delivery(deliver)
    patches = pass_patches(options, delivery)
    names = parameter_names(module)

    def inner_compile(graph: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
        if not kwargs.get("is_backward"):
            return_views_of_inputs(graph.graph, aliases_of_inputs())
        inputs = count_from_inputs(graph.graph, inputs)
        # A backward graph is compiled when it is first needed, long after the backend's call.
        with backend_call(), delivering(delivery), compiling(graph, names, kwargs):
            return compile_fx_inner(graph, inputs, **kwargs)

    def compile_(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        with delivering(delivery):
            return compile_fx(
                module, inputs, inner_compile=inner_compile, config_patches=patches
            )

    compiled = compile_for_placement(compile_, module, example_inputs)
    return told_plainly(compiled) if options.policy == STRICT else compiled


def _install() -> None:
    hooks.self_test()
    artifact.install()
    lowerings.install()
    scaled_mm.install()


@contextlib.contextmanager
def packaging(
    options: Options, deliver: Callable[[Report], None]
) -> Iterator[dict[str, Any]]:
    """Inside the block, AOTInductor may be called with the options that it yields."""
    _install()
    with backend_call(), repairing():
        yield pass_patches(options, Delivery(deliver))


def pass_patches(options: Options, delivery: Delivery) -> dict[str, Any]:
    """Inductor options that put the layout pass where it belongs, beside the user's own."""
    from torch._inductor import config

    patches = dict(options.inductor)
    if options.policy == STRICT:
        patches.setdefault(SIZE_ASSERTS, True)
    user_pass = patches.pop(HOOK, getattr(config, HOOK))
    freezing = patches.get("freezing", config.freezing)
    # Inductor's cache keys a frozen graph by the shapes of its constants, and has been seen (torch
    # 2.13) to serve one with the values of another process.
    patches[HOOK] = LayoutPass(options, delivery, user_pass, cacheable=not freezing)
    if freezing and hooks.FOLDING_PASS.exists():
        user_pass = patches.pop(FOLDING_HOOK, getattr(config, FOLDING_HOOK))
        patches[FOLDING_HOOK] = FoldingPass(options, delivery.add_folded, user_pass)
    return patches
