"""One step of attention in Triton, shared by the kernels: a block of queries meets a block of keys.

The softmax is the online one in base 2: the running maximum ``top``, the running sum ``total`` of
the weights and the running output ``acc`` are rescaled whenever a larger score appears.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Where the running maximum starts. Finite, so that a block without any valid key leaves no NaN.
START: tl.constexpr = tl.constexpr(-1e30)


@triton.jit
def attend(
    q, k, v, scale, valid, acc, total, top, MASKED: tl.constexpr, SHIFT: tl.constexpr
):
    """Update (acc, total, top).

    q (M, D), k (D, N), v (N, D); scale (M,) > 0 turns products into scores in base 2; valid (N,)
    is read if MASKED. Weights are 2^(score - top + SHIFT), rounded to the type of v; the sum is of
    the unrounded ones.
    """
    products = tl.dot(q, k)
    if MASKED:
        products = tl.where(valid[None, :], products, float("-inf"))
    new_top = tl.maximum(top, tl.max(products, 1) * scale)
    weights = tl.exp2(products * scale[:, None] - (new_top - SHIFT)[:, None])
    fade = tl.exp2(top - new_top)
    total = total * fade + tl.sum(weights, 1)
    # Added in fp32 here and not by the tensor cores, whose 8-bit products on Hopper keep fewer bits
    # of a running sum; in 16 bits the compiler makes one instruction of it.
    acc = acc * fade[:, None] + tl.dot(weights.to(v.dtype), v)
    return acc, total, new_top


@triton.jit
def finish(acc, total):
    """The output of a block of queries; zeros where no key was valid."""
    return acc / tl.where(total > 0, total, 1.0)[:, None]
