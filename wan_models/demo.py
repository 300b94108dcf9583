"""A quantised Wan block with planted layout faults, under plain Inductor and under contig_safe.

Run by ``contig-pass demo``. On the CPU the kernel takes any layout, so a recorder shows what each
operand looked like when the kernel was called: on a Hopper GPU the marked ones fail.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from tabulate import tabulate

import contig_pass
from wan_models.block import WanBlock
from wan_models.config import TINY
from wan_models.inputs import BlockInputs, block_inputs
from wan_models.quant import SlabLinear, quantize_
from wan_models.recorder import Received, digest, recording

RECIPE = "fp8_e4m3fn_scaled_fast"
#: What each planted layer does to its operands.
FAULTS = {
    "self_attn.q": ("bias 2 bytes off in a fused buffer", {"bias_gap": 2}),
    "self_attn.k": ("weight at an odd byte", {"weight_offset": 1}),
    "self_attn.v": ("weight rows padded by 3 bytes", {"row_padding": 3}),
    "self_attn.o": ("weight in a flat buffer, 8 bytes off", {"weight_offset": 8}),
}
RESIDUAL = (
    "residual stream column-major, as patchify's flatten(2).transpose(1, 2) leaves it; no fault\n"
    "    here, since the block's norms write rows before any linear reads them"
)


class Run(NamedTuple):
    """What one way of running the block received and returned."""

    received: list[Received]
    output: torch.Tensor


def faulty_block() -> tuple[WanBlock, BlockInputs]:
    """The tiny block on FP8 linears with :data:`FAULTS` planted, and its bf16 inputs."""
    torch.manual_seed(0)
    block = WanBlock(TINY).bfloat16().eval()
    for name, (_, layout) in FAULTS.items():
        parent, _, leaf = name.rpartition(".")
        slab = SlabLinear.from_linear(block.get_submodule(name), RECIPE, **layout)
        setattr(block.get_submodule(parent), leaf, slab)
    quantize_(block, RECIPE)
    inputs = block_inputs(TINY, (3, 4, 5), dtype=torch.bfloat16, column_major=True)
    return block, inputs


def run(out: Callable[[str], None]) -> int:
    """Run the demonstration; ``out`` takes each piece of text.

    Returns:
        0, or 1 if contig_safe let a bad operand through or changed a value.
    """
    block, inputs = faulty_block()
    out("A Wan block (dim 256, 60 tokens) on FP8 linears, with layout faults planted:")
    for name, (what, _) in FAULTS.items():
        out(f"  {name}: {what}")
    out(f"  input: {RESIDUAL}\n")
    contig_pass.forget_reports()
    settings = {"force_disable_caches": True, "emulate_precision_casts": True}
    with (
        warnings.catch_warnings(),
        torch.no_grad(),
        recording() as received,
        tempfile.TemporaryDirectory() as cache,
        torch._inductor.config.patch(settings),
        torch._inductor.utils.fresh_cache(dir=cache),
    ):
        warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")
        eager = _run(block, inputs, received)
        plain = _run(torch.compile(block, fullgraph=True), inputs, received)
        torch._dynamo.reset()
        safe = _run(
            torch.compile(block, backend=contig_pass.contig_safe, fullgraph=True), inputs, received
        )
    names = {digest(_weight(layer)): name for name, layer in _layers(block)}
    out("What each operand looked like when the kernel was called (! = a Hopper kernel fails):\n")
    out(_operand_table(names, plain.received, safe.received) + "\n")
    for report in contig_pass.last_reports():
        out(str(report))
    bad_before = sum(map(_is_bad, plain.received))
    bad_after = sum(map(_is_bad, safe.received))
    to_plain = _largest_difference(safe.output, plain.output)
    to_eager = _largest_difference(safe.output, eager.output)
    out(f"bad operands at the kernel: {bad_before} under plain Inductor, {bad_after} under "
        "contig_safe")
    out(f"largest difference of the outputs: {to_plain} to plain Inductor, {to_eager} to eager")
    # Inductor itself rounds unlike eager mode in some versions; the layout pass changes nothing.
    return 0 if bad_before > 0 == bad_after and to_plain == 0 else 1


def _run(
    block: Callable[..., torch.Tensor], inputs: BlockInputs, received: list[Received]
) -> Run:
    received.clear()
    output = block(*inputs)
    return Run(list(received), output)


def _largest_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one.float() - other.float()).abs().max().item()


def _layers(block: WanBlock) -> list[tuple[str, torch.nn.Module]]:
    return [(name, layer) for name, layer in block.named_modules() if hasattr(layer, "in_features")]


def _weight(layer: torch.nn.Module) -> torch.Tensor:
    return layer.weight() if isinstance(layer, SlabLinear) else layer.weight


def _is_bad(operand: Received) -> bool:
    """Whether an H100 refuses or misreads the operand: see the contracts' measured sources."""
    if operand.address:
        return True
    if operand.operand == "bias":
        return operand.strides != (1,)
    pitch, unit = operand.strides if operand.operand == "a" else operand.strides[::-1]
    return unit != 1 or pitch * operand.itemsize % 16 != 0


def _operand_table(
    names: dict[str, str], plain: Sequence[Received], safe: Sequence[Received]
) -> str:
    def described(operands: Sequence[Received]) -> dict[tuple[str, str], str]:
        return {
            (names[o.weight], o.operand): f"{o.strides} @{o.address}{' !' if _is_bad(o) else ''}"
            for o in operands
        }

    before, after = described(plain), described(safe)
    shapes = {(names[o.weight], o.operand): o.shape for o in safe}
    rows = [(*key, shapes[key], before[key], after[key]) for key in sorted(after)]
    headers = ("layer", "operand", "shape", "Inductor: strides @mod 16", "contig_safe")
    return tabulate(rows, headers)
