"""What the Gluon kernels for Hopper share: fp16 numbers in pairs, and rings of tiles in flight."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier


@gluon.jit
def halves(x, N: gl.constexpr):
    """(64, N) as its left and right halves."""
    return x.reshape([64, 2, N // 2]).permute(0, 2, 1).split()


@gluon.jit
def pairwise(x, y, SUM: gl.constexpr):
    """The larger, or the sum, of fp16 pairs, two to a register."""
    if SUM:
        return gl.inline_asm_elementwise(
            "add.f16x2 $0, $1, $2;", "=r,r,r", [x, y], dtype=gl.float16, is_pure=True, pack=2
        )
    return gl.inline_asm_elementwise(
        "max.f16x2 $0, $1, $2;", "=r,r,r", [x, y], dtype=gl.float16, is_pure=True, pack=2
    )


@gluon.jit
def ring(STAGES: gl.constexpr, CONSUMERS: gl.constexpr):
    """Barriers of tiles: ready once fetched, free once every consumer has read it."""
    F: gl.constexpr = mbarrier.MBarrierLayout()
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], F)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], F)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=CONSUMERS)
    return ready, free
