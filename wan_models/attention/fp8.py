"""Our own 8-bit attention: mode ``"fp8"``.

What it computes, and how near that is to exact attention, says
:mod:`wan_models.attention.fp8_arithmetic`. On CUDA that is done by Triton kernels
(:mod:`wan_models.attention.fp8_triton`), on the CPU by torch.
"""

from __future__ import annotations

import torch

from contig_pass import AlignedPointer, UnitStrideLast
from wan_models.attention.contracts import bind, check_unit_stride
from wan_models.attention.fp8_arithmetic import reference

MINIMUM_CAPABILITY = (8, 9)


def run(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_lens: torch.Tensor | None
) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v in 8 bits.

    Args:
        q: (B, L, H, D), last dimension unit-stride, D one of
            :data:`wan_models.attention.fp8_arithmetic.HEAD_DIMS`.
        k, v: (B, S, H, D), last dimensions unit-stride.
        k_lens: (B,) valid keys; a sample without any gives zeros.

    Returns:
        (B, L, H, D) dense, in the dtype of q.

    Raises:
        ValueError: a last dimension that is not unit-stride.
    """
    return fp8_attention(q, k, v, None if k_lens is None else k_lens.to(k.device))


def obstacle(sm: tuple[int, int] | None, kind: str, triton: bool) -> str:
    """What rules the mode out on a device, in a few words, or ``""``.

    Args:
        sm: compute capability, ``None`` if it is not known.
        kind: ``"cuda"``, ``"cpu"``, ...
        triton: whether Triton is installed.
    """
    if kind in ("cpu", "meta"):
        return ""
    needed = "{}.{}".format(*MINIMUM_CAPABILITY)
    if kind != "cuda":
        return f"a CPU or a CUDA device of compute capability {needed} or later needed, got {kind}"
    if sm is None:
        return f"compute capability {needed} or later needed, no CUDA device is visible"
    if sm < MINIMUM_CAPABILITY:
        return f"compute capability {needed} or later needed, found {sm[0]}.{sm[1]}"
    return "" if triton else "package triton needed, not installed"


@torch.library.custom_op("wan_models::fp8_attention", mutates_args=())
def fp8_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_lens: torch.Tensor | None
) -> torch.Tensor:
    """The op behind :func:`run`; ``k_lens`` on the device of k."""
    check_unit_stride("fp8", q=q, k=k, v=v)
    if q.device.type == "cuda":
        from wan_models.attention import fp8_triton

        return fp8_triton.forward(q, k, v, k_lens)
    return reference(q, k, v, k_lens)


@fp8_attention.register_fake
def _fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_lens: torch.Tensor | None
) -> torch.Tensor:
    return q.new_empty(q.shape)


bind(
    "wan_models::fp8_attention", ("q", "k", "v"), (UnitStrideLast(), AlignedPointer(16)),
    "wan_models/attention/fp8_quantise.py reads rows of the last dimension by vectors of 16 bytes; "
    "off those, Triton compiles a kernel that reads single elements",
)
