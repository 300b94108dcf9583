"""Compile a graph with Inductor and the layout pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from contig_pass.inductor import lowerings, scaled_mm
from contig_pass.inductor.freezing import FOLDING_HOOK, FoldingPass
from contig_pass.inductor.graph_pass import HOOK, LayoutPass
from contig_pass.inductor.replay import Delivery, delivering
from contig_pass.inductor.scope import compiling, parameter_names
from contig_pass.inductor.tracing import backend_call
from contig_pass.options import Options
from contig_pass.report.model import Report


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

    lowerings.install()
    scaled_mm.install()
    delivery = Delivery(deliver)
    patches = pass_patches(options, delivery)
    names = parameter_names(module)

    def inner_compile(graph: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
        # A backward graph is compiled when it is first needed, long after the backend's call.
        with backend_call(), delivering(delivery), compiling(graph, names, kwargs):
            return compile_fx_inner(graph, inputs, **kwargs)

    with delivering(delivery):
        return compile_fx(
            module, example_inputs, inner_compile=inner_compile, config_patches=patches
        )


def pass_patches(options: Options, delivery: Delivery) -> dict[str, Any]:
    """Inductor options that put the layout pass where it belongs, beside the user's own."""
    from torch._inductor import config

    patches = dict(options.inductor)
    user_pass = patches.pop(HOOK, getattr(config, HOOK))
    patches[HOOK] = LayoutPass(options, delivery, user_pass)
    if patches.get("freezing", config.freezing):
        user_pass = patches.pop(FOLDING_HOOK, getattr(config, FOLDING_HOOK))
        patches[FOLDING_HOOK] = FoldingPass(options, delivery.add_folded, user_pass)
    return patches
