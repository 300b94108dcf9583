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
BACKWARD = "the forward kernel's demand, which the same vectorised loads of the backward make"
CPU_FLASH = "measured on a CPU, torch 2.13.0: wrong values without an error otherwise"

_CUDA = When("CUDA", lambda call: call.target.kind == "cuda")

_TENSORS = ("query", "key", "value")
_GPU_OPS = {
    "flash_attention": _TENSORS,
    "cudnn_attention": (*_TENSORS, "attn_bias"),
    "efficient_attention": (*_TENSORS, "attn_bias"),
    "fused_attention_overrideable": (*_TENSORS, "attn_bias"),
    "flash_attention_backward": ("grad_out", *_TENSORS, "out"),
    "cudnn_attention_backward": ("grad_out", *_TENSORS, "out", "attn_bias"),
    "efficient_attention_backward": ("grad_out_", *_TENSORS, "out", "attn_bias"),
    "fused_attention_overrideable_backward": ("grad_out", *_TENSORS, "out", "attn_bias"),
}


def contracts() -> Iterator[Contract]:
    """Every built-in contract of this family."""
    # A bias that is off by 4 or 8 bytes passes some cuDNN shapes; only 16 is safe for all.
    rules = (UnitStrideLast(), AlignedPointer(16), AlignedPitch(16))
    for name, operands in _GPU_OPS.items():
        op = f"aten::_scaled_dot_product_{name}.default"
        source = BACKWARD if name.endswith("backward") else H100
        for operand in operands:
            yield Contract(op, operand, rules, source, _CUDA, ATTENTION, keep_order=True)
    # Before decomposition the op stands for whichever backend it will choose.
    for operand in _TENSORS:
        op = "aten::scaled_dot_product_attention.default"
        yield Contract(op, operand, rules, H100, _CUDA, ATTENTION, keep_order=True)
    # The CPU kernel steps through q, k and v by unit stride; it takes a mask of any strides.
    for operand in _TENSORS:
        yield Contract(
            "aten::_scaled_dot_product_flash_attention_for_cpu.default",
            operand, (UnitStrideLast(),), CPU_FLASH, family=ATTENTION, keep_order=True,
        )
