"""The kernels that make e4m3 operands of q, k and v for 8-bit attention, in Triton.

They read the inputs by their strides and write in the attention kernels' own layout, padded to
whole blocks with zeros: q (planes, L', D) and k (planes, S', D), rows together, as the first
product reads them; v (planes, D, S'), tokens together, because the tensor cores take 8-bit operands
only with the summed dimension unit-stride. Planes are B * H heads.

* :func:`sample` looks at some tokens of q and of k; :func:`settle` turns what it saw into the mean
  of k and the balance of the channels of q and k; :func:`quantise_queries` and
  :func:`quantise_keys` then read each once;
* :func:`peaks` looks at all of v, :func:`settle_values` turns what it saw into scales, and
  :func:`quantise_values` reads it once more.

Those of q and k do the RMS norm and the rotary embedding on the way where FUSED: the inputs then
are the projections, ``norms`` holds 1 / rms of their tokens (:func:`norms`), and ``table`` the
cosines and, ``table_half`` further on, the sines of the first ``turned`` tokens. All of it is
fp32, where the steps by themselves round to 16 bits in between. A row of q may be normed after it
is quantised, so its factor goes into its scale (:func:`norm_scales`) and nothing is read twice.

Programs of neighbouring heads run side by side, because their rows are neighbours in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from wan_models.attention import fp8_arithmetic as arithmetic

#: Groups of tokens of one program of :func:`sample`.
GROUPS = 4
#: Tokens of one program of :func:`peaks`, and of one step of it.
SPAN = 1024
STEP = 128
#: Tokens of one program of :func:`norms`, and channels of one step of it.
ROWS = 8
COLUMNS = 1024
_GROUP: tl.constexpr = tl.constexpr(arithmetic.GROUP)
_V_MAX: tl.constexpr = tl.constexpr(arithmetic.E4M3_MAX)
_QK_MAX: tl.constexpr = tl.constexpr(arithmetic.TOP_OPERAND)
_TINY: tl.constexpr = tl.constexpr(arithmetic.TINY)
_SHARE: tl.constexpr = tl.constexpr(arithmetic.SHARE)
_SMALL: tl.constexpr = tl.constexpr(arithmetic.SMALL)
_FAR: tl.constexpr = tl.constexpr(3.4e38)


@triton.jit
def _place(plane, heads):
    """(batch, head) of a plane."""
    return (plane // heads).to(tl.int64), (plane % heads).to(tl.int64)


@triton.jit
def _tile(base, tokens, token_stride, count, D: tl.constexpr):
    """The rows ``tokens`` of D numbers in fp32; rows from ``count`` on are zero."""
    pointers = base + tokens.to(tl.int64)[:, None] * token_stride + tl.arange(0, D)[None, :]
    return tl.load(pointers, mask=(tokens < count)[:, None], other=0.0).to(tl.float32)


@triton.jit
def _turn(x, tokens, weight, table, table_t, table_half, turned, BLOCK: tl.constexpr,
          D: tl.constexpr):
    """Rows times the norm's weights, their pairs of channels turned."""
    x *= tl.load(weight + tl.arange(0, D)).to(tl.float32)[None, :]
    at = tokens[:, None] * table_t + tl.arange(0, D // 2)[None, :]
    known = (tokens < turned)[:, None]
    cos = tl.load(table + at, mask=known, other=1.0).to(tl.float32)
    sin = tl.load(table + table_half + at, mask=known, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(x, (BLOCK, D // 2, 2)))
    x = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    return tl.reshape(x, (BLOCK, D))


@triton.jit
def _bits(x):
    """|x| as integers, which are in the same order, and where NaN is the largest."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _amax(bits):
    """What :func:`_bits` stands for, above zero; NaN where it is not finite."""
    amax = bits.to(tl.float32, bitcast=True)
    return tl.where(amax <= _FAR, tl.maximum(amax, _TINY), float("nan"))


@triton.jit
def _rotate(x, hadamard, D: tl.constexpr):
    channels = tl.arange(0, D)
    turn = tl.load(hadamard + channels[:, None] * D + channels[None, :])
    return tl.dot(x.to(tl.bfloat16).to(turn.dtype), turn)


@triton.jit(do_not_specialize=["tokens"])
def norms(
    x, out, x_b, x_t, tokens, width, eps, PICK: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    """1 / rms of the tokens of x (B, tokens, width) in every PICK-th group, to ``out``."""
    program, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    of_group: tl.constexpr = GROUP // ROWS
    token = program // of_group * (PICK * GROUP) + program % of_group * ROWS + tl.arange(0, ROWS)
    valid, columns = token < tokens, tl.arange(0, COLUMNS)
    pointers = x + batch * x_b + token.to(tl.int64)[:, None] * x_t + columns[None, :]
    squares = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, width, COLUMNS):
        mask = valid[:, None] & (columns < width - start)[None, :]
        part = tl.load(pointers + start, mask=mask, other=0.0).to(tl.float32)
        squares += part * part
    mean = tl.sum(squares, 1) / width
    tl.store(out + batch * tokens + token, 1.0 / tl.sqrt(mean + eps), mask=valid)


@triton.jit(do_not_specialize=["heads", "tokens", "turned"])
def sample(
    x, lengths, found, x_b, x_t, x_h, heads, tokens,
    norms, weight, table, table_b, table_t, table_half, turned,
    PICK: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, FUSED: tl.constexpr,
):
    """Sum, largest and smallest of each channel in GROUPS groups, to ``found`` (planes, programs,
    3, D). ``lengths`` (B,) are the valid tokens."""
    plane, part = tl.program_id(0), tl.program_id(1)
    batch, head = _place(plane, heads)
    count = tl.load(lengths + batch)
    base = x + batch * x_b + head * x_h
    total = tl.zeros((_GROUP, D), tl.float32)
    most, least = tl.full((_GROUP, D), -3e38, tl.float32), tl.full((_GROUP, D), 3e38, tl.float32)
    for group in range(part * GROUPS, part * GROUPS + GROUPS):
        token = group * (PICK * _GROUP) + tl.arange(0, _GROUP)
        valid = (token < count)[:, None]
        rows = _tile(base, token, x_t, count, D)
        if FUSED:
            factor = tl.load(norms + batch * tokens + token, mask=token < count, other=0.0)
            rows = _turn(rows * factor[:, None], token, weight + head * D, table + batch * table_b,
                         table_t, table_half, turned, _GROUP, D)
        total += rows
        most = tl.maximum(most, tl.where(valid, rows, -3e38))
        least = tl.minimum(least, tl.where(valid, rows, 3e38))
    where = (plane.to(tl.int64) * tl.num_programs(1) + part) * (3 * D) + tl.arange(0, D)
    tl.store(found + where, tl.sum(total, 0))
    tl.store(found + where + D, tl.max(most, 0))
    tl.store(found + where + 2 * D, tl.min(least, 0))


@triton.jit(do_not_specialize=["heads"])
def peaks(
    v, lengths, found, v_b, v_t, v_h, heads, SPAN: tl.constexpr, STEP: tl.constexpr,
    D: tl.constexpr,
):
    """The largest |v| of each channel in SPAN tokens, as :func:`_bits`; ``found`` (planes,
    programs, D) int32."""
    plane, part = tl.program_id(0), tl.program_id(1)
    batch, head = _place(plane, heads)
    count = tl.load(lengths + batch)
    base = v + batch * v_b + head * v_h
    peak = tl.zeros((STEP, D), tl.int32)
    for start in range(part * SPAN, tl.minimum(part * SPAN + SPAN, count), STEP):
        peak = tl.maximum(peak, _bits(_tile(base, start + tl.arange(0, STEP), v_t, count, D)))
    where = (plane.to(tl.int64) * tl.num_programs(1) + part) * D + tl.arange(0, D)
    tl.store(found + where, tl.max(peak, 0))


@triton.jit
def _seen(found, plane, parts, D: tl.constexpr, PARTS: tl.constexpr):
    """Sum, largest and smallest of each channel of a plane, of what :func:`sample` found."""
    total = tl.zeros((PARTS, D), tl.float32)
    most, least = tl.full((PARTS, D), -3e38, tl.float32), tl.full((PARTS, D), 3e38, tl.float32)
    for start in range(0, parts, PARTS):
        row = start + tl.arange(0, PARTS)
        valid = (row < parts)[:, None]
        at = (plane.to(tl.int64) * parts + row)[:, None] * (3 * D) + tl.arange(0, D)[None, :]
        at += found
        total += tl.load(at, mask=valid, other=0.0)
        most = tl.maximum(most, tl.load(at + D, mask=valid, other=-3e38))
        least = tl.minimum(least, tl.load(at + 2 * D, mask=valid, other=3e38))
    return tl.sum(total, 0), tl.max(most, 0), tl.min(least, 0)


@triton.jit(do_not_specialize=["heads", "q_parts", "k_parts"])
def settle(
    q_found, k_found, lengths, means, balance, heads, q_parts, k_parts,
    PICK: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr,
):
    """One head's mean of k and balance: what q is multiplied and k divided by."""
    plane = tl.program_id(0)
    count = tl.load(lengths + plane // heads)
    of_turn: tl.constexpr = PICK * _GROUP
    counted = count // of_turn * _GROUP + tl.minimum(count % of_turn, _GROUP)
    total, most, least = _seen(k_found, plane, k_parts, D, PARTS)
    mean = total / tl.maximum(counted, 1).to(tl.float32)
    k_peak = tl.maximum(most - mean, mean - least)
    total, most, least = _seen(q_found, plane, q_parts, D, PARTS)
    q_peak = tl.maximum(most, -least)
    k_top, q_top = tl.max(k_peak, 0), tl.max(q_peak, 0)
    usable = (k_top > _SMALL) & (q_top > _SMALL) & (k_top < 1 / _SMALL) & (q_top < 1 / _SMALL)
    k_peak, q_peak = tl.maximum(k_peak, k_top * _SHARE), tl.maximum(q_peak, q_top * _SHARE)
    ratio = tl.where(usable, k_peak, 1.0) / tl.where(usable, q_peak, 1.0)
    where = plane.to(tl.int64) * D + tl.arange(0, D)
    tl.store(means + where, mean)
    tl.store(balance + where, tl.exp2(tl.floor(0.5 * tl.log2(ratio) + 0.5)))


@triton.jit(do_not_specialize=["parts"])
def settle_values(found, scales, parts, D: tl.constexpr, PARTS: tl.constexpr):
    """One head's scales of v, of what :func:`peaks` found."""
    plane = tl.program_id(0)
    peak = tl.zeros((PARTS, D), tl.int32)
    for start in range(0, parts, PARTS):
        row = start + tl.arange(0, PARTS)
        at = (plane.to(tl.int64) * parts + row)[:, None] * D + tl.arange(0, D)[None, :]
        peak = tl.maximum(peak, tl.load(found + at, mask=(row < parts)[:, None], other=0))
    where = plane.to(tl.int64) * D + tl.arange(0, D)
    tl.store(scales + where, _amax(tl.max(peak, 0)) / _V_MAX)


@triton.jit(do_not_specialize=["heads", "count", "turned"])
def quantise_queries(
    q, balance, hadamard, out, scales, q_b, q_t, q_h, heads, count, padded, factor,
    squares, weight, table, table_b, table_t, table_half, turned,
    BLOCK: tl.constexpr, D: tl.constexpr, FUSED: tl.constexpr,
):
    """q in e4m3 by row. ``scales`` (planes, padded) turn products of k's scale into weights' codes
    over 126. Where FUSED, the rows' sums of squares go to ``squares``, of that shape too."""
    plane, block = tl.program_id(0), tl.program_id(1)
    batch, head = _place(plane, heads)
    wide, tokens = plane.to(tl.int64), block * BLOCK + tl.arange(0, BLOCK)
    rows = wide * padded + tokens
    x = _tile(q + batch * q_b + head * q_h, tokens, q_t, count, D)
    if FUSED:
        tl.store(squares + rows, tl.sum(x * x, 1))
        x = _turn(x, tokens, weight + head * D, table + batch * table_b, table_t, table_half,
                  turned, BLOCK, D)
    channels = tl.arange(0, D)
    x = _rotate(x * tl.load(balance + wide * D + channels)[None, :], hadamard, D)
    amax = _amax(tl.max(_bits(x), 1))
    values = (x * (_QK_MAX / amax[:, None])).to(tl.float8e4nv)
    tl.store(out + rows[:, None] * D + channels[None, :], values)
    tl.store(scales + rows, amax * (factor / _QK_MAX))


@triton.jit(do_not_specialize=["heads"])
def norm_scales(squares, scales, heads, padded, width, eps, BLOCK: tl.constexpr):
    """Multiply the scales of q (B, H, padded) by 1 / rms of their tokens over all heads."""
    token, batch = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64)
    at = batch * heads * padded + token
    total = tl.zeros((BLOCK,), tl.float32)
    for head in range(heads):
        total += tl.load(squares + at + head * padded, mask=token < padded, other=0.0)
    factor = 1.0 / tl.sqrt(total / width + eps)
    for head in range(heads):
        where = scales + at + head * padded
        value = tl.load(where, mask=token < padded, other=0.0) * factor
        tl.store(where, value, mask=token < padded)


@triton.jit(do_not_specialize=["heads", "tokens", "turned"])
def quantise_keys(
    k, lengths, means, balance, hadamard, out, scales, k_b, k_t, k_h, heads, tokens, padded,
    norms, weight, table, table_b, table_t, table_half, turned,
    BLOCK: tl.constexpr, D: tl.constexpr, REORDER: tl.constexpr, FUSED: tl.constexpr,
):
    """k less its mean in e4m3 by block of BLOCK tokens, rows in the order of the kernel."""
    plane, block = tl.program_id(0), tl.program_id(1)
    batch, head = _place(plane, heads)
    count = tl.load(lengths + batch)
    channels, wide, steps = tl.arange(0, D), plane.to(tl.int64), tl.arange(0, BLOCK)
    token = block * BLOCK + (_key_order(steps) if REORDER else steps)
    x = _tile(k + batch * k_b + head * k_h, token, k_t, count, D)
    if FUSED:
        factor = tl.load(norms + batch * tokens + token, mask=token < count, other=0.0)
        x = _turn(x * factor[:, None], token, weight + head * D, table + batch * table_b, table_t,
                  table_half, turned, BLOCK, D)
    x = tl.where((token < count)[:, None], x - tl.load(means + wide * D + channels)[None, :], 0.0)
    x = _rotate(x * (1.0 / tl.load(balance + wide * D + channels)[None, :]), hadamard, D)
    amax = _amax(tl.max(tl.max(_bits(x), 1), 0))
    rows = wide * padded + block * BLOCK + steps
    tl.store(out + rows[:, None] * D + channels[None, :], (x * (_QK_MAX / amax)).to(tl.float8e4nv))
    tl.store(scales + wide * tl.num_programs(1) + block, amax / _QK_MAX)


@triton.jit
def _key_order(n):
    """Which token lies in row n: rows of 16 are reordered so that the two scores of a register of
    the first product, columns 2i and 2i + 1 of 8, and the two of the next 8 columns, are four
    neighbours, as a register of the second product's left operand has them."""
    return (n & -15) | ((n & 8) >> 2) | ((n & 6) << 1)


@triton.jit(do_not_specialize=["heads"])
def quantise_values(
    v, lengths, v_scales, out, v_b, v_t, v_h, heads, padded, BLOCK: tl.constexpr, D: tl.constexpr
):
    """v in e4m3 by channel, tokens together."""
    plane, block = tl.program_id(0), tl.program_id(1)
    batch, head = _place(plane, heads)
    count = tl.load(lengths + batch)
    channels, wide = tl.arange(0, D), plane.to(tl.int64)
    tokens = block * BLOCK + tl.arange(0, BLOCK)
    x = _tile(v + batch * v_b + head * v_h, tokens, v_t, count, D)
    values = (x * (1.0 / tl.load(v_scales + wide * D + channels)[None, :])).to(tl.float8e4nv)
    rows = (wide * D + channels) * padded
    tl.store(out + rows[:, None] + tokens[None, :], tl.trans(values))
