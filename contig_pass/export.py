"""Exported programs: the same repair without Dynamo, and packages of AOTInductor."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from contig_pass.errors import ContigPassError
from contig_pass.inputs import reached_inputs
from contig_pass.layout import INPUT_ALIGNMENT
from contig_pass.options import parse_options
from contig_pass.pipeline import repair
from contig_pass.plan import DENSE
from contig_pass.report.log import deliver_to
from contig_pass.report.write import Sink


def apply(
    exported_program: ExportedProgram,
    *,
    policy: str = DENSE,
    target: str = "auto",
    report: Sink = None,
    aligned_inputs: bool = False,
) -> ExportedProgram:
    """A copy of ``exported_program`` in which every bound use is legal.

    It runs, compiles, saves and loads like any other; who loads it imports contig_pass first, for
    the op that copies. Parameters are shared with the original, not copied.

    Nobody realigns the inputs of an exported program, so an input that a kernel needs on 16 bytes
    is copied on every call, unless the caller promises alignment.

    Args:
        exported_program: from ``torch.export.export``, decomposed or not.
        policy, target, report: as in the options of the backend.
        aligned_inputs: the caller promises that every input starts on 16 bytes.

    Returns:
        A new program; its report is the last of ``contig_pass.last_reports()``.

    Raises:
        ContigPassError: not an exported program.
        OptionError, ReportError, LayoutViolation: as from the backend.
    """
    _check(exported_program, "apply")
    options = parse_options(None, {"policy": policy, "target": target, "report": report})
    deliver = deliver_to(report)
    module = copy.deepcopy(exported_program.graph_module)
    signature = copy.deepcopy(exported_program.graph_signature)
    outputs = _output_names(module.graph)
    aligned = {
        node.name
        for node in reached_inputs(module.graph)
        if _stays_aligned(_held(exported_program, node.name), aligned_inputs)
    }
    deliver(repair(module.graph, options, aligned, name="exported program", pinning=False))
    module.recompile()
    for old, new in zip(outputs, _output_names(module.graph), strict=True):
        if old != new:
            signature.replace_all_uses(old, new)
    repaired = ExportedProgram(
        root=module,
        graph=module.graph,
        graph_signature=signature,
        state_dict=exported_program.state_dict,
        range_constraints=exported_program.range_constraints,
        module_call_graph=exported_program.module_call_graph,
        example_inputs=exported_program.example_inputs,
        constants=exported_program.constants,
        verifiers=exported_program.verifiers,
    )
    repaired.validate()
    return repaired


def aoti_compile_and_package(
    exported_program: ExportedProgram,
    *,
    package_path: Any = None,
    inductor_configs: Mapping[str, Any] | None = None,
    policy: str = DENSE,
    target: str = "auto",
    report: Sink = None,
) -> str:
    """``torch._inductor.aoti_compile_and_package`` with the layout pass.

    The copies are C++ or Triton code of the package like everything else: who loads it needs no
    contig_pass.

    Args:
        exported_program: from ``torch.export.export``; need not have been through :func:`apply`.
        package_path, inductor_configs: as there.
        policy, target, report: as in the options of the backend.

    Returns:
        The path of the package.

    Raises:
        ContigPassError: not an exported program.
        OptionError, ReportError, LayoutViolation: as from the backend.
    """
    import torch._inductor

    from contig_pass.inductor.compiler import packaging

    _check(exported_program, "aoti_compile_and_package")
    given = {"policy": policy, "target": target, "report": report, **(inductor_configs or {})}
    options = parse_options(None, given)
    with packaging(options, deliver_to(report)) as patches:
        return torch._inductor.aoti_compile_and_package(
            exported_program, package_path=package_path, inductor_configs=patches
        )


def _check(program: Any, caller: str) -> None:
    if not isinstance(program, ExportedProgram):
        raise ContigPassError(
            f"{caller} takes an ExportedProgram, the result of torch.export.export(model, args); "
            f"this is a {type(program).__name__}"
        )


def _output_names(graph: fx.Graph) -> list[str]:
    (output,) = (node for node in graph.nodes if node.op == "output")
    return [node.name for node in output.all_input_nodes]


def _held(program: ExportedProgram, placeholder: str) -> torch.Tensor | None:
    """The parameter, buffer or constant behind a placeholder; ``None`` for a user's input."""
    signature = program.graph_signature
    for names in (signature.inputs_to_parameters, signature.inputs_to_buffers):
        if placeholder in names:
            name = names[placeholder]
            return program.state_dict.get(name, program.constants.get(name))
    name = signature.inputs_to_lifted_tensor_constants.get(placeholder)
    return None if name is None else program.constants.get(name)


def _stays_aligned(held: torch.Tensor | None, promised: bool) -> bool:
    """Whether the memory behind a placeholder starts on 16 bytes, after loading it anew too."""
    if held is None:
        return promised
    if held.device.type == "meta" or not isinstance(held, torch.Tensor):
        return False
    offset = held.storage_offset() * held.dtype.itemsize
    return held.data_ptr() % INPUT_ALIGNMENT == 0 and offset % INPUT_ALIGNMENT == 0
