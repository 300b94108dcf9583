"""Compile a graph with Inductor and the layout pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from contig_pass.inductor import lowerings, scaled_mm
from contig_pass.inductor.graph_pass import HOOK, LayoutPass
from contig_pass.inductor.scope import compiling
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
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    lowerings.install()
    scaled_mm.install()
    patches = dict(options.inductor)
    user_pass = patches.pop(HOOK, getattr(config, HOOK))
    patches[HOOK] = LayoutPass(options, deliver, user_pass)

    def inner_compile(graph: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
        with compiling(graph):
            return compile_fx_inner(graph, inputs, **kwargs)

    return compile_fx(module, example_inputs, inner_compile=inner_compile, config_patches=patches)
