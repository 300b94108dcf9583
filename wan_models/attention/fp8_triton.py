"""8-bit attention on a GPU: quantise, then the kernel that this GPU takes.

On Hopper that is :mod:`wan_models.attention.fp8_hopper`; on every other GPU from compute capability
8.9, and under Triton's interpreter, the plain Triton kernel of this file, which does the same
arithmetic. Neither masks anything: padded keys are zeros, whose weights are taken out of the sum at
the end (:mod:`wan_models.attention.fp8_arithmetic`).
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from wan_models.attention.fp8_arithmetic import KEY_BLOCK, TOP_CODE
from wan_models.attention.fp8_operands import (
    BLOCK_M,
    Operands,
    Producer,
    on,
    quantise,
    quantise_values,
)

WARPS = 8
_TOP: tl.constexpr = tl.constexpr(TOP_CODE)


@triton.jit
def _weights(products, slope, start):
    """e4m3 weights whose codes are round(126 * clamp(products * slope + start, 0, 1))."""
    share = tl.minimum(tl.maximum(products * slope + start, 0.0), 1.0)
    # Adding 2^23 rounds to a whole number and leaves it in the low bits.
    codes = (share * _TOP + 8388608.0).to(tl.int32, bitcast=True).to(tl.int8)
    return codes.to(tl.float8e4nv, bitcast=True)


@triton.jit(do_not_specialize=["queries", "heads"])
def attention(
    q, k, v, q_scales, k_scales, v_scales, lengths, out, out_b, out_t, out_h,
    heads, queries, q_padded, k_padded,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr,
):
    """One block of queries of one head against all its keys."""
    block, plane = tl.program_id(0), tl.program_id(1)
    batch, head, wide = plane // heads, plane % heads, plane.to(tl.int64)
    count = tl.load(lengths + batch)
    tokens, channels = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, D)
    steps = tl.arange(0, BLOCK_N)
    rows = wide * q_padded + tokens
    x = tl.load(q + rows[:, None] * D + channels[None, :])
    row_scales = tl.load(q_scales + rows)
    k_scales += wide * (k_padded // BLOCK_N)
    k_pointers = k + wide * k_padded * D + steps[None, :] * D + channels[:, None]
    v_pointers = v + wide * D * k_padded + channels[None, :] * k_padded + steps[:, None]
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    start = tl.full((BLOCK_M,), 1.0, tl.float32)
    blocks = tl.maximum(tl.cdiv(count, BLOCK_N), 1)
    for i in range(0, blocks):
        products = tl.dot(x, tl.load(k_pointers + i * (BLOCK_N * D)))
        slope = row_scales * tl.load(k_scales + i)
        # A scale of NaN, of an operand that is not finite, stays in ``start`` and all that follows.
        share = tl.max(products, 1) * slope
        new = tl.minimum(start, 1.0 - share, propagate_nan=tl.PropagateNan.ALL)
        weights = _weights(products, slope[:, None], new[:, None])
        fade = tl.exp2((new - start) * (_TOP / 8))
        total = total * fade + tl.sum(weights.to(tl.float32), 1)
        # Added in fp32 here and not by the tensor cores, whose 8-bit products on Hopper keep fewer
        # bits of a running sum.
        acc = acc * fade[:, None] + tl.dot(weights, tl.load(v_pointers + i * BLOCK_N))
        start = new
    # A padded key had score 0.
    total -= _weights(0.0, start, start).to(tl.float32) * (blocks * BLOCK_N - count)
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    acc *= tl.load(v_scales + wide * D + channels)[None, :]
    base = out + batch.to(tl.int64) * out_b + head * out_h
    pointers = base + tokens.to(tl.int64)[:, None] * out_t + channels[None, :]
    tl.store(pointers, acc.to(out.dtype.element_ty), mask=(tokens < queries)[:, None])


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_lens: torch.Tensor | None
) -> torch.Tensor:
    """Attention in 8 bits; arguments and result as of :func:`wan_models.attention.fp8.run`.

    Runs on the CUDA device of q, or on CPU tensors under ``TRITON_INTERPRET=1``.
    """
    return forward_narrow(q, k, quantise_values(v, k_lens), k_lens)


def forward_narrow(
    q: torch.Tensor, k: torch.Tensor, values: tuple[torch.Tensor, torch.Tensor],
    k_lens: torch.Tensor | None, producer: Producer | None = None,
) -> torch.Tensor:
    """:func:`forward` with v in 8 bits already.

    Args:
        values: of :func:`wan_models.attention.fp8_operands.quantise_values`.
        producer: q and k are projections, to be normed and turned first.
    """
    hopper = is_hopper(q.device)
    block = KEY_BLOCK
    if hopper:
        from wan_models.attention.fp8_hopper import BLOCK_N as block
    operands = quantise(q, k, values, k_lens, reorder=hopper, key_block=block, producer=producer)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    (attend_hopper if hopper else attend)(operands, out)
    return out


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Whether ``device`` is a GPU of compute capability 9.0, and this Triton has Gluon for it."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    try:
        from wan_models.attention import fp8_hopper  # noqa: F401
    except ImportError:  # Gluon's modules for Hopper are as old as Triton 3.5
        return False
    return True


def attend(operands: Operands, out: torch.Tensor, **options: int) -> None:
    """Write (B, L, H, D) ``out`` by the plain kernel; ``options`` are of the launch."""
    planes, q_padded, size = operands.q.shape
    k_padded, heads = operands.k.shape[1], out.shape[2]
    options = {"num_warps": WARPS, "num_stages": _stages(out.device)} | options
    with on(out.device):
        attention[(q_padded // BLOCK_M, planes)](
            *operands, out, *out.stride()[:3], heads, out.shape[1], q_padded, k_padded,
            BLOCK_M=BLOCK_M, BLOCK_N=k_padded // operands.k_scales.shape[1], D=size, **options,
        )


def attend_hopper(operands: Operands, out: torch.Tensor) -> None:
    """Write (B, L, H, D) ``out`` by the Hopper kernel, from operands in its order."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from wan_models.attention import fp8_hopper

    planes, q_padded, size = operands.q.shape
    k_padded, block = operands.k.shape[1], fp8_hopper.BLOCK_N

    def tiles(x: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
        layout = NVMMASharedLayout(min(columns, 128), 8, 2)
        return TensorDescriptor.from_tensor(x.flatten(0, 1), [rows, columns], layout)

    with on(out.device):
        fp8_hopper.attention[(q_padded // BLOCK_M, planes)](
            tiles(operands.q, fp8_hopper.ROWS, size), tiles(operands.k, block, size),
            tiles(operands.v, size, block), *operands[3:], out, *out.stride()[:3],
            out.shape[2], out.shape[1], q_padded, k_padded,
            D=size, N=block, STAGES=fp8_hopper.STAGES, REGISTERS=fp8_hopper.REGISTERS,
            num_warps=4,
        )


def _stages(device: torch.device) -> int:
    """Depth of the pipeline over the keys: what the shared memory of the GPU holds."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10):
        return 3  # 16 KB of q and 32 KB a stage of 227 KB
    return 2  # of 99 KB
