"""A Triton product of row-wise 8-bit activations and 8-bit weights, for Hopper.

Persistent: every multiprocessor walks over tiles of the result and loads the operands of the next
one while it scales and stores the last. Operands and result go through the tensor memory
accelerator. Scales and bias are applied to the fp32 sums. Sums are made as ``use_fast_accum``
makes them. Needs Triton and a GPU of capability 9.0, or Triton's interpreter.

Measured on an H100 against ``_scaled_mm`` with row-wise scales and fast accumulation, TFLOP/s for
(K, N) = (5120, 5120), (5120, 15360), (5120, 13824) and (13824, 5120): 1496 / 1458, 1380 / 1392,
1328 / 1266 and 1516 / 1310 at 32,760 rows; 1489 / 1325, 1336 / 1172, 1330 / 1202 and 1427 / 1235 at
75,600.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from wan_models.quant.fused_triton import column_stride, on

#: Rows, columns and depth of a tile. The best of six at (5120, 5120).
TILE = 128, 256, 128
#: Tiles of rows that share columns of the weight while these are in the L2 cache.
GROUP = 16
#: (K, N) for which the library's kernel is the faster one below so many rows: 1.175 ms against
#: 1.265 at 32,760 rows, each by itself; in a block at the power limit both take the same time.
LIBRARY, LIBRARY_ROWS = (5120, 5120), 65_536
#: Types of results as Triton names them.
TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def row_scaled_product(
    a, b, c, row_scale, column_scale, bias, m, n, k, c_s,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr, BIAS: tl.constexpr, ROUNDED: tl.constexpr,
):
    """c = row_scale * column_scale * a b^T + bias, by tensor descriptors a, b and c; of the digits
    of ROUNDED."""
    tiles_m, tiles_n, steps = tl.cdiv(m, BM), tl.cdiv(n, BN), tl.cdiv(k, BK)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=True):
        first = tile // (GROUP * tiles_n) * GROUP
        height = min(tiles_m - first, GROUP)
        within = tile % (GROUP * tiles_n)
        at_m, at_n = (first + within % height) * BM, (within // height) * BN
        acc = tl.zeros((BM, BN), tl.float32)
        for i in range(steps):
            acc = tl.dot(a.load([at_m, i * BK]), b.load([at_n, i * BK]).T, acc)
        rows = at_m + tl.arange(0, BM)
        scale = tl.load(row_scale + rows, mask=rows < m, other=0.0)[:, None]
        # Halves of the columns one after the other: four stages and a whole tile do not fit.
        low, high = acc.reshape(BM, 2, BN // 2).permute(0, 2, 1).split()
        columns = at_n + tl.arange(0, BN // 2)
        low = _finished(low * scale, column_scale, bias, columns, n, c_s, BIAS)
        c.store([at_m, at_n], low.to(ROUNDED).to(c.dtype))
        columns += BN // 2
        high = _finished(high * scale, column_scale, bias, columns, n, c_s, BIAS)
        c.store([at_m, at_n + BN // 2], high.to(ROUNDED).to(c.dtype))


@triton.jit
def _finished(acc, column_scale, bias, columns, n, c_s, BIAS: tl.constexpr):
    """Channel scales and bias of some columns."""
    acc *= tl.load(column_scale + columns * c_s, mask=columns < n, other=0.0)[None, :]
    if BIAS:
        acc += tl.load(bias + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
    return acc


def run(
    values: torch.Tensor, row_scale: torch.Tensor, weight: torch.Tensor,
    column_scale: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype,
    out: torch.Tensor | None = None, stored: torch.dtype | None = None,
) -> torch.Tensor:
    """Arguments of :func:`wan_models.quant.rows_linear.fp8_rows_linear`; to ``out`` if given."""
    (rows, depth), columns = values.shape, weight.shape[0]
    if out is None:
        out = torch.empty((rows, columns), dtype=stored or dtype, device=values.device)
    if rows:
        programs = multiprocessors(values.device)
        bm, bn, bk = TILE
        with on(values.device):
            row_scaled_product[(programs,)](
                descriptor(values, bm, bk), descriptor(weight, bn, bk),
                descriptor(out, bm, bn // 2), row_scale, column_scale, bias,
                rows, columns, depth, column_stride(column_scale),
                BM=bm, BN=bn, BK=bk, GROUP=GROUP, PROGRAMS=programs, BIAS=bias is not None,
                ROUNDED=TYPES[dtype], num_warps=8, num_stages=4,
            )
    return out


def descriptor(x: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Tiles of ``x``: unit-stride rows that start on 16 bytes."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns])


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 2 for the interpreter, so that a program takes more than one tile."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Whether ``device`` is an NVIDIA GPU of capability 9.0, for which the tile was measured."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) == (9, 0)


def pays(values: torch.Tensor, weight: torch.Tensor, in_one: bool) -> bool:
    """Whether the kernel is to be taken: on Hopper, with a tile for every multiprocessor.

    With fewer the library's smaller tiles keep more of the GPU busy.

    Args:
        values, weight: (M, K) and (N, K).
        in_one: whether the library has one kernel for all of it, which :data:`LIBRARY` goes by.
    """
    if not is_hopper(values.device):
        return False
    shape = values.shape[1], weight.shape[0]
    if in_one and shape == LIBRARY and values.shape[0] < LIBRARY_ROWS:
        return False
    tiles = triton.cdiv(values.shape[0], TILE[0]) * triton.cdiv(weight.shape[0], TILE[1])
    return tiles >= multiprocessors(values.device)
