"""Contracts of scaled dot product attention, by backend.

Shapes: query (B, H, L, D), key and value (B, H, S, D), bias or mask broadcastable to (B, H, L, S).
A misaligned pointer or pitch gives, on an H100: an asynchronous ``misaligned address`` from the
flash backend, wrong values without any error from cuDNN, a clear error from the memory-efficient
one. The result takes its strides from the query, so a repairing copy keeps the order of
dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator

from contig_pass.contracts.registry import ATTENTION, Call, Contract, When
from contig_pass.contracts.rules import AlignedPitch, AlignedPointer, Dense, UnitStrideLast

H100 = "measured on an H100, torch 2.11.0+cu130"
BACKWARD = "the forward kernel's demand, which the same vectorised loads of the backward make"
CPU_FLASH = "measured on a CPU, torch 2.13.0: wrong values without an error otherwise"
CUDNN_GRAPH = f"{H100}: cuDNN's graph is kept by q, k and v, whatever the strides of these"
EFFICIENT_OUT = f"{H100}: rows are taken to lie as the forward kernel leaves them"
EFFICIENT_GRAD = f"{H100}: what is not dense as (B, L, H, D) is copied by the op itself"

_CUDA = When("CUDA", lambda call: call.target.kind == "cuda")
#: (B, H, L, D) with the memory of (B, L, H, D), as a projection split into heads has it.
TOKENS_FIRST = "0,2,1,3"

_TENSORS = ("query", "key", "value")
_GPU_OPS = {
    "flash_attention": _TENSORS,
    "cudnn_attention": (*_TENSORS, "attn_bias"),
    "efficient_attention": (*_TENSORS, "attn_bias"),
    "fused_attention_overrideable": (*_TENSORS, "attn_bias"),
    "flash_attention_backward": ("grad_out", *_TENSORS, "out"),
    "cudnn_attention_backward": (*_TENSORS, "attn_bias"),
    "efficient_attention_backward": (*_TENSORS, "attn_bias"),
    "fused_attention_overrideable_backward": ("grad_out", *_TENSORS, "out", "attn_bias"),
}


def contracts() -> Iterator[Contract]:
    """Every built-in contract of this family."""
    # A bias that is off by 4 or 8 bytes, or whose rows are, passes some cuDNN shapes; only 16 is
    # safe for all. The flash backward copies grad_out and out by itself unless they are dense as
    # (B, L, H, D); then it reads them by 16 bytes.
    rules = (UnitStrideLast(), AlignedPointer(16), AlignedPitch(16))
    for name, operands in _GPU_OPS.items():
        op = f"aten::_scaled_dot_product_{name}.default"
        source = BACKWARD if name.endswith("backward") else H100
        for operand in operands:
            yield Contract(op, operand, rules, source, _CUDA, ATTENTION, keep_order=True)
    yield from _as_forward_returns()
    # Before decomposition the op stands for whichever backend it will choose.
    for operand in _TENSORS:
        op = "aten::scaled_dot_product_attention.default"
        yield Contract(op, operand, rules, H100, _CUDA, ATTENTION, keep_order=True)
    # The CPU kernel steps through q, k and v by unit stride; it takes a mask of any strides. That
    # of torch 2.14 takes k and v in any layout and q with an inner stride, but not transposed.
    for operand in _TENSORS:
        yield Contract(
            "aten::_scaled_dot_product_flash_attention_for_cpu.default",
            operand, (UnitStrideLast(),), CPU_FLASH, family=ATTENTION, keep_order=True,
        )


def _as_forward_returns() -> Iterator[Contract]:
    """Backward kernels that take the output, or its gradient, to lie as the forward's result."""
    cudnn = "aten::_scaled_dot_product_cudnn_attention_backward.default"
    efficient = "aten::_scaled_dot_product_efficient_attention_backward.default"
    pointer = AlignedPointer(16)
    for operand in ("grad_out", "out"):
        for order in ("row", TOKENS_FIRST):
            rules = (Dense(order), pointer)
            yield Contract(cudnn, operand, rules, CUDNN_GRAPH, _query_in(order), ATTENTION)
    # The demand is for the order of heads and tokens; a shared batch is read rightly.
    rules = (Dense(TOKENS_FIRST), pointer)
    yield Contract(efficient, "out", rules, EFFICIENT_OUT, _CUDA, ATTENTION)
    yield Contract(
        efficient, "grad_out_", (pointer,), EFFICIENT_GRAD, _CUDA, ATTENTION, keep_order=True
    )


def _query_in(order: str) -> When:
    """On CUDA, and the query's heads and tokens lie in that order: the result's do then too."""

    def holds(call: Call) -> bool:
        dims = call.operands["query"].dim_order() or (0, 1, 2, 3)
        tokens_first = dims.index(2) < dims.index(1)
        return tokens_first == (order == TOKENS_FIRST)

    return _CUDA & When(f"query's dimensions in {order} order", holds)
