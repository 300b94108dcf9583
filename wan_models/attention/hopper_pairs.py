"""fp16 numbers two to a register: the larger and the sum of pairs, for the Gluon kernels."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def halves(x, N: gl.constexpr):
    """(64, N) as its left and right halves."""
    return x.reshape([64, 2, N // 2]).permute(0, 2, 1).split()


@gluon.jit
def pairwise(x, y, SUM: gl.constexpr):
    """The larger, or the sum, of fp16 pairs."""
    if SUM:
        return gl.inline_asm_elementwise(
            "add.f16x2 $0, $1, $2;", "=r,r,r", [x, y], dtype=gl.float16, is_pure=True, pack=2
        )
    return gl.inline_asm_elementwise(
        "max.f16x2 $0, $1, $2;", "=r,r,r", [x, y], dtype=gl.float16, is_pure=True, pack=2
    )
