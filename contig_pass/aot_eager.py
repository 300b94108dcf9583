"""``inner="aot_eager"``: repair the graph and run it as it stands, without Inductor.

For tests and for a look at what the pass does: ``functorch.compile`` traces the program to ATen
ops, the pass repairs the graph, and each op runs eagerly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from functorch.compile import aot_module_simplified
from torch import fx
from torch._functorch.aot_autograd import get_aot_graph_name

from contig_pass.inputs import reached_inputs, realigning, written_inputs
from contig_pass.options import Options
from contig_pass.pipeline import repair
from contig_pass.report.model import Report
from contig_pass.returned import aliases_of_inputs, return_views_of_inputs


def compile_with_aot_eager(
    module: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    deliver: Callable[[Report], None],
) -> Callable[..., Any]:
    """Trace ``module`` to ATen ops, repair the graph, and return it to be run eagerly.

    Inputs that a contract can reach are realigned at run time where they do not start on 16
    bytes.
    """

    def compiler(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        del inputs
        return_views_of_inputs(graph.graph, aliases_of_inputs())
        reached = reached_inputs(graph.graph)
        names = frozenset(node.name for node in reached)
        deliver(
            repair(graph.graph, options, names, name=get_aot_graph_name(), pinning=False)
        )
        graph.recompile()
        placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
        positions = [i for i, node in enumerate(placeholders) if node in reached]
        written = frozenset(placeholders.index(node) for node in written_inputs(graph.graph))

        def run(args: list[Any]) -> Any:
            return graph.forward(*args)

        boxed = realigning(run, positions, written)
        boxed._boxed_call = True  # type: ignore[attr-defined]
        return boxed

    return aot_module_simplified(
        module, example_inputs, fw_compiler=compiler, keep_inference_input_mutations=True
    )
