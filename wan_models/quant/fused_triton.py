"""Triton kernels that make an 8-bit activation where the 16-bit one would have been written.

A program takes a few rows one after the other, each held in registers: a row is read once and
written once, whatever the reductions need, and the next one is loaded meanwhile. What all rows of a
sample share (modulation, scales of columns) is read once a program: read for every row it would be
four times the row itself, out of the L2 cache. Arithmetic is fp32 throughout; what the unfused
formulas round to 16 bits in between is not rounded here, but for the residual stream, which is
stored. Rows are found by strides; Triton compiles a kernel of its own for a last dimension that is
unit-stride, which alone is read by vectors. Needs Triton and a GPU of capability 8.9 or later, or
Triton's interpreter.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl

from wan_models.quant.recipes import E4M3

_MAX: tl.constexpr = tl.constexpr(448.0)
#: As in wan_models.quant.rows.above_zero.
_TINY: tl.constexpr = tl.constexpr(1e-30)
#: -2 * sqrt(2 / pi) * log2(e): of GELU's tanh, written as a power of 2.
_GELU: tl.constexpr = tl.constexpr(-2.302208198144325)
_CUBIC: tl.constexpr = tl.constexpr(0.044715)


@triton.jit
def _store_quantised(y, values, scales, row, width, columns, live, there):
    """A row in e4m3 by its largest absolute value. The cast saturates and keeps NaN."""
    amax = tl.maximum(tl.max(tl.abs(y), 0), _TINY)
    quantised = (y * (_MAX / amax)).to(tl.float8e4nv)
    tl.store(values + row * width + columns, quantised, mask=live)
    tl.store(scales + row, amax / _MAX, mask=there)


@triton.jit
def _gelu(y):
    """y * (1 + tanh(sqrt(2 / pi) * (y + 0.044715 y^3))) / 2, as y * sigmoid: one power of 2."""
    return y / (1.0 + tl.exp2((y + y * y * y * _CUBIC) * _GELU))


@triton.jit
def _vector(start, columns, inside):
    """A row of scales, shifts or weights in fp32."""
    return tl.load(start + columns, mask=inside, other=0.0).to(tl.float32)


# A row of the norms is two parts, the first a power of 2: 5,120 numbers as one tile of 8,192 would
# take 1.6 times the registers, and 0.57 ms where the two take 0.40 (32,760 rows, H100).


@triton.jit
def both(start, low, high, inside, there):
    """The two parts of a row in fp32."""
    first = tl.load(start + low, mask=there, other=0.0).to(tl.float32)
    return first, tl.load(start + high, mask=inside & there, other=0.0).to(tl.float32)


@triton.jit
def _normed(a, b, width, inside, eps):
    """(v - mean) / sqrt(variance + eps) of a row."""
    mean = (tl.sum(a, 0) + tl.sum(b, 0)) / width
    a, b = a - mean, tl.where(inside, b - mean, 0.0)
    factor = tl.rsqrt((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / width + eps)
    return a * factor, b * factor


@triton.jit
def _store_both(a, b, values, scales, row, width, low, high, inside, there):
    """:func:`_store_quantised` of the two parts of a row."""
    amax = tl.maximum(tl.max(tl.abs(a), 0), tl.max(tl.abs(b), 0))
    amax = tl.maximum(amax, _TINY)
    start = values + row * width
    tl.store(start + low, (a * (_MAX / amax)).to(tl.float8e4nv), mask=there)
    tl.store(start + high, (b * (_MAX / amax)).to(tl.float8e4nv), mask=inside & there)
    tl.store(scales + row, amax / _MAX, mask=there)


@triton.jit
def quantise(x, values, scales, tokens, width, x_b, x_t, x_c, ROWS: tl.constexpr,
             STAGES: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of x in e4m3."""
    batch, first = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64) * ROWS
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    for i in tl.range(0, ROWS, num_stages=STAGES):
        token = first + i
        there = token < tokens
        live = inside & there
        y = tl.load(x + batch * x_b + token * x_t + columns * x_c, mask=live, other=0.0)
        row = batch * tokens + token
        _store_quantised(y.to(tl.float32), values, scales, row, width, columns, live, there)


@triton.jit
def norm_quantise(
    x, weight, bias, shift, scale, values, scales, tokens, width,
    x_b, x_t, x_c, sh_b, sh_t, sc_b, sc_t, eps,
    AFFINE: tl.constexpr, MODULATED: tl.constexpr, PER_TOKEN: tl.constexpr,
    ROWS: tl.constexpr, STAGES: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
):
    """Layer norm, modulation and quantisation of rows."""
    batch, first = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64) * ROWS
    low, high = tl.arange(0, LOW), LOW + tl.arange(0, HIGH)
    inside = high < width
    if AFFINE:
        grown_a, grown_b = both(weight, low, high, inside, True)
        moved_a, moved_b = both(bias, low, high, inside, True)
    if MODULATED and not PER_TOKEN:
        up_a, up_b = both(scale + batch * sc_b, low, high, inside, True)
        down_a, down_b = both(shift + batch * sh_b, low, high, inside, True)
    for i in tl.range(0, ROWS, num_stages=STAGES):
        token = first + i
        there = token < tokens
        start = x + batch * x_b + token * x_t
        a, b = both(start, low * x_c, high * x_c, inside, there)
        a, b = _normed(a, b, width, inside, eps)
        if AFFINE:
            a, b = a * grown_a + moved_a, b * grown_b + moved_b
        if MODULATED:
            if PER_TOKEN:
                start = scale + batch * sc_b + token * sc_t
                up_a, up_b = both(start, low, high, inside, there)
                start = shift + batch * sh_b + token * sh_t
                down_a, down_b = both(start, low, high, inside, there)
            a, b = a * (1.0 + up_a) + down_a, b * (1.0 + up_b) + down_b
        row = batch * tokens + token
        _store_both(a, b, values, scales, row, width, low, high, inside, there)


@triton.jit
def add_norm_quantise(
    x, branch, gate, weight, bias, shift, scale, total, values, scales, tokens, width,
    x_b, x_t, x_c, b_b, b_t, b_c, g_b, g_t, sh_b, sh_t, sc_b, sc_t, eps,
    GATED: tl.constexpr, AFFINE: tl.constexpr, MODULATED: tl.constexpr, PER_TOKEN: tl.constexpr,
    ROWS: tl.constexpr, STAGES: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
):
    """x + gate * branch, stored; its layer norm, modulated, in e4m3."""
    batch, first = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64) * ROWS
    low, high = tl.arange(0, LOW), LOW + tl.arange(0, HIGH)
    inside = high < width
    if AFFINE:
        grown_a, grown_b = both(weight, low, high, inside, True)
        moved_a, moved_b = both(bias, low, high, inside, True)
    if GATED and not PER_TOKEN:
        gate_a, gate_b = both(gate + batch * g_b, low, high, inside, True)
    if MODULATED and not PER_TOKEN:
        up_a, up_b = both(scale + batch * sc_b, low, high, inside, True)
        down_a, down_b = both(shift + batch * sh_b, low, high, inside, True)
    for i in tl.range(0, ROWS, num_stages=STAGES):
        token = first + i
        there = token < tokens
        start = x + batch * x_b + token * x_t
        a, b = both(start, low * x_c, high * x_c, inside, there)
        start = branch + batch * b_b + token * b_t
        more_a, more_b = both(start, low * b_c, high * b_c, inside, there)
        if GATED:
            if PER_TOKEN:
                start = gate + batch * g_b + token * g_t
                gate_a, gate_b = both(start, low, high, inside, there)
            more_a, more_b = more_a * gate_a, more_b * gate_b
        # The norm is of what is stored.
        stored_a = (a + more_a).to(total.dtype.element_ty)
        stored_b = (b + more_b).to(total.dtype.element_ty)
        row = batch * tokens + token
        tl.store(total + row * width + low, stored_a, mask=there)
        tl.store(total + row * width + high, stored_b, mask=inside & there)
        a, b = _normed(stored_a.to(tl.float32), stored_b.to(tl.float32), width, inside, eps)
        if AFFINE:
            a, b = a * grown_a + moved_a, b * grown_b + moved_b
        if MODULATED:
            if PER_TOKEN:
                start = scale + batch * sc_b + token * sc_t
                up_a, up_b = both(start, low, high, inside, there)
                start = shift + batch * sh_b + token * sh_t
                down_a, down_b = both(start, low, high, inside, there)
            a, b = a * (1.0 + up_a) + down_a, b * (1.0 + up_b) + down_b
        _store_both(a, b, values, scales, row, width, low, high, inside, there)


@triton.jit
def gelu_quantise(
    x, row_scale, column_scale, bias, values, scales, tokens, width, x_t, x_c, c_s,
    DEFERRED: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, STAGES: tl.constexpr, BLOCK: tl.constexpr,
):
    """GELU of rows, which may be a bare product, in e4m3."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    if DEFERRED:
        grown = _vector(column_scale, columns * c_s, inside)
    if BIAS:
        moved = _vector(bias, columns, inside)
    for i in tl.range(0, ROWS, num_stages=STAGES):
        row = first + i
        there = row < tokens
        live = inside & there
        y = tl.load(x + row * x_t + columns * x_c, mask=live, other=0.0).to(tl.float32)
        if DEFERRED:
            y = y * tl.load(row_scale + row, mask=there, other=0.0) * grown
        if BIAS:
            y += moved
        _store_quantised(_gelu(y), values, scales, row, width, columns, live, there)


# -- launches ------------------------------------------------------------------------------------

#: Rows of a program where there are enough of them to keep every multiprocessor busy.
ROWS = 8
#: Rows in registers or on their way there, one of them at hand.
STAGES = 3
#: Least number of rows for which a program takes more than one.
MANY = 4096


def warps(block: int) -> int:
    """Warps for rows of ``block`` numbers: 32 numbers of a row a thread at most."""
    return min(max(block // 1024, 4), 16)


def parts(width: int) -> tuple[int, int]:
    """Sizes of the two parts of a row of at least 2 numbers: both powers of 2."""
    low = triton.next_power_of_2(width) // 2
    return low, triton.next_power_of_2(width - low)


def rows_a_program(rows: int) -> int:
    """One, or :data:`ROWS`: see :data:`MANY`."""
    return ROWS if rows >= MANY else 1


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """Launch on ``device``; the interpreter has none."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def token_strides(x: torch.Tensor | None, tokens: int) -> tuple[int, int]:
    """Strides by which a (B, L, C) or (B or 1, 1, C) tensor is read for a batch and a token."""
    if x is None:
        return 0, 0
    return (
        x.stride(0) if x.shape[0] > 1 else 0,
        x.stride(1) if x.shape[1] == tokens and tokens > 1 else 0,
    )


def column_stride(scale: torch.Tensor | None) -> int:
    """0 for one scale of all columns, 1 for one each."""
    return 0 if scale is None or scale.numel() == 1 else 1


def _made(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.empty(x.shape, dtype=E4M3, device=x.device)
    return values, torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)


def run_quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x: (B, L, C). Returns (B, L, C) e4m3 and (B, L, 1)."""
    batch, tokens, width = x.shape
    values, scales = _made(x)
    block = triton.next_power_of_2(width)
    if batch * tokens:
        with on(x.device):
            # No vector to share: a row a program has the most loads in flight.
            quantise[(tokens, batch)](
                x, values, scales, tokens, width, *x.stride(),
                ROWS=1, STAGES=1, BLOCK=block, num_warps=min(max(block // 2048, 4), 16),
            )
    return values, scales


def run_norm_quantise(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None,
    shift: torch.Tensor | None, scale: torch.Tensor | None, eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments of :func:`wan_models.quant.fused.norm_quantise`."""
    batch, tokens, width = x.shape
    values, scales = _made(x)
    (low, high), rows = parts(width), rows_a_program(batch * tokens)
    moves = *token_strides(shift, tokens), *token_strides(scale, tokens)
    if batch * tokens:
        with on(x.device):
            norm_quantise[(triton.cdiv(tokens, rows), batch)](
                x, weight, bias, shift, scale, values, scales, tokens, width, *x.stride(),
                *moves, eps,
                AFFINE=weight is not None, MODULATED=shift is not None,
                PER_TOKEN=any(moves[1::2]), ROWS=rows, STAGES=STAGES, LOW=low, HIGH=high,
                num_warps=warps(low),
            )
    return values, scales


def run_add_norm_quantise(
    x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor | None,
    weight: torch.Tensor | None, bias: torch.Tensor | None,
    shift: torch.Tensor | None, scale: torch.Tensor | None, eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Arguments of :func:`wan_models.quant.fused.add_norm_quantise`."""
    batch, tokens, width = x.shape
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    values, scales = _made(x)
    (low, high), rows = parts(width), rows_a_program(batch * tokens)
    moves = (
        *token_strides(gate, tokens), *token_strides(shift, tokens), *token_strides(scale, tokens)
    )
    if batch * tokens:
        with on(x.device):
            add_norm_quantise[(triton.cdiv(tokens, rows), batch)](
                x, branch, gate, weight, bias, shift, scale, total, values, scales, tokens, width,
                *x.stride(), *branch.stride(), *moves, eps,
                GATED=gate is not None, AFFINE=weight is not None, MODULATED=shift is not None,
                PER_TOKEN=any(moves[1::2]), ROWS=rows, STAGES=STAGES, LOW=low, HIGH=high,
                num_warps=warps(low),
            )
    return total, values, scales


def run_gelu_quantise(
    x: torch.Tensor, row_scale: torch.Tensor | None, column_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x: (M, N). Returns (M, N) e4m3 and (M, 1), dense."""
    count, width = x.shape
    values, scales = _made(x)
    block, rows = triton.next_power_of_2(width), rows_a_program(count)
    if count:
        with on(x.device):
            gelu_quantise[(triton.cdiv(count, rows),)](
                x, row_scale, column_scale, bias, values, scales, count, width, *x.stride(),
                column_stride(column_scale),
                DEFERRED=row_scale is not None, BIAS=bias is not None,
                ROWS=rows, STAGES=STAGES, BLOCK=block, num_warps=warps(block),
            )
    return values, scales
