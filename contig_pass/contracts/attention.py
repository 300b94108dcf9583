"""Contracts of scaled dot product attention, by backend.

Shapes: query (B, H, L, D), key and value (B, H, S, D), bias or mask broadcastable to (B, H, L, S).
A misaligned pointer or pitch gives, on an H100: an asynchronous ``misaligned address`` from the
flash backend, wrong values without any error from cuDNN, a clear error from the memory-efficient
one. The result takes its strides from the query, so a repairing copy keeps the order of
dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator

from contig_pass.contracts.registry import ATTENTION, Contract, When
from contig_pass.contracts.rules import AlignedPitch, AlignedPointer, UnitStrideLast

H100 = "measured on an H100, torch 2.11.0+cu130"
CPU_FLASH = "measured on a CPU, torch 2.13.0: wrong values without an error otherwise"

_CUDA = When("CUDA", lambda call: call.target.kind == "cuda")
_ANYWHERE = When("always", lambda call: True)

_GPU_OPS = {
    "aten::_scaled_dot_product_flash_attention.default": None,
    "aten::_scaled_dot_product_cudnn_attention.default": "attn_bias",
    "aten::_scaled_dot_product_efficient_attention.default": "attn_bias",
    "aten::_scaled_dot_product_fused_attention_overrideable.default": "attn_bias",
}


def contracts() -> Iterator[Contract]:
    """Every built-in contract of this family."""
    gpu_rules = (UnitStrideLast(), AlignedPointer(16), AlignedPitch(16))
    for op, bias in _GPU_OPS.items():
        for operand in ("query", "key", "value", *([bias] if bias else [])):
            yield Contract(op, operand, gpu_rules, H100, _CUDA, ATTENTION, keep_order=True)
    # The CPU kernel steps through q, k and v by unit stride; it takes a mask of any strides.
    for operand in ("query", "key", "value"):
        yield Contract(
            "aten::_scaled_dot_product_flash_attention_for_cpu.default",
            operand, (UnitStrideLast(),), CPU_FLASH, _ANYWHERE, ATTENTION, keep_order=True,
        )
