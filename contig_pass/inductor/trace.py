"""Bring a Dynamo graph to where the layout pass sees it, and plan; compile nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch import fx

from contig_pass.inductor.graph_pass import HOOK, LayoutPass
from contig_pass.inductor.scope import compiling, parameter_names, parameter_positions
from contig_pass.options import Options
from contig_pass.report.model import Report


def plan_graphs(
    module: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    deliver: Callable[[Report], None],
) -> None:
    """Hand ``deliver`` the report of each graph that Inductor would compile for ``module``.

    ``module`` is left as it was. A backward graph is not reached: it is traced when it is needed.
    """
    from torch._inductor import config
    from torch._inductor.compile_fx import _recursive_post_grad_passes, compile_fx

    names, positions = parameter_names(module), parameter_positions(module)

    def inner_compile(graph: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
        del inputs
        with compiling(graph, names, {**kwargs, "static_input_idxs": positions}):
            _recursive_post_grad_passes(graph, is_inference=kwargs.get("is_inference", False))
        return make_boxed_func(_never_run)

    patches = {HOOK: LayoutPass(options, deliver, getattr(config, HOOK))}
    fresh = copy.deepcopy(module)
    with config.patch(force_disable_caches=True), torch._functorch.config.patch(
        enable_autograd_cache=False
    ):
        compile_fx(fresh, example_inputs, inner_compile=inner_compile, config_patches=patches)


def _never_run(*args: Any) -> Any:
    raise AssertionError("a graph that was only planned must not be run")
