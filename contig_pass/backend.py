"""``torch.compile(model, backend="contig_safe")``: options in, Inductor out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from contig_pass.inductor import capture, relaxed
from contig_pass.inductor.tracing import backend_call, repairs_layouts
from contig_pass.options import AOT_EAGER, parse_options
from contig_pass.redundant.told import with_calls
from contig_pass.report.log import deliver_to

# Here, because Dynamo traces before it calls the backend.
capture.install()
relaxed.install()


@repairs_layouts
def contig_safe(
    module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile ``module`` with every kernel's layout contract kept.

    Registered under the entry point group ``torch_dynamo_backends``, so no import is needed.

    Args:
        module: the graph that Dynamo captured.
        example_inputs: its inputs.
        mode: any mode of ``torch.compile``.
        options: ``policy``, ``report``, ``inner``, ``target``, ``remove_redundant`` (see
            :class:`contig_pass.options.Options`), and any option of ``torch._inductor.config``.

    Raises:
        OptionError: an unknown option or mode, or a bad value.
        ReportError: the report path cannot be written.
        LayoutViolation: policy ``strict``, and a use can be neither proved legal nor repaired.
    """
    parsed = parse_options(mode, options)
    deliver = with_calls(module, deliver_to(parsed.report), parsed.target)
    with backend_call():
        if parsed.inner == AOT_EAGER:
            from contig_pass.aot_eager import compile_with_aot_eager

            return compile_with_aot_eager(module, example_inputs, parsed, deliver)
        from contig_pass.inductor.compiler import compile_with_inductor

        return compile_with_inductor(module, example_inputs, parsed, deliver)
