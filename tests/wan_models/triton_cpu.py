"""Run in a process of its own, under Triton's interpreter: our kernels on the CPU.

``python -m tests.wan_models.triton_cpu fp8|radial`` prints one JSON object per case.
"""

from __future__ import annotations

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from tests.wan_models import attention_cases as cases

_convert = interpreter._convert_float


def _exactly(values: np.ndarray, source: object, target: object, rounding: object) -> np.ndarray:
    """The interpreter's own cast to e4m3 loses the carry where rounding reaches the next power of
    two (Triton 3.7); torch's rounds as the GPU does."""
    if target != tl.float8e4nv:
        return _convert(values, source, target, rounding)
    assert source == tl.float32
    numbers = torch.from_numpy(np.ascontiguousarray(values)).clamp(-448, 448)
    return numbers.to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def fp8_cases() -> None:
    from wan_models.attention import fp8, fp8_triton

    torch.manual_seed(0)
    for size, queries, keys, lengths, layout in (
        (64, 130, 200, None, None),
        (64, 3, 256, None, "head_major"),
        (64, 40, 129, (129, 128), "fused_chunk"),
        (64, 20, 140, (0, 77), "padded_slice"),
        (128, 17, 131, (131, 5), None),
    ):
        q, k, v = (torch.randn(2, n, 2, size) for n in (queries, keys, keys))
        k += 2.0  # a mean that smoothing has to remove
        lens = None if lengths is None else torch.tensor(lengths)
        expected = fp8.reference(q, k, v, lens)
        if lens is not None:
            for b, length in enumerate(lengths):
                k[b, length:], v[b, length:] = torch.nan, torch.nan
        views = [q, k, v] if layout is None else [getattr(cases, layout)(x) for x in (q, k, v)]
        _report(fp8_triton.forward(*views, lens), expected)


def radial_cases() -> None:
    from wan_models.attention import radial, radial_triton

    torch.manual_seed(0)
    for grid, block, size, lengths, layout in (
        ((5, 8, 8), 64, 64, None, None),
        ((2, 8, 16), 128, 64, None, "head_major"),
        ((5, 8, 8), 64, 64, (320, 70), "fused_chunk"),
        ((2, 8, 16), 64, 128, (130, 1), "padded_slice"),
    ):
        pattern = radial.RadialPattern(grid, block=block)
        q, k, v = (torch.randn(2, pattern.tokens, 2, size) for _ in range(3))
        lens = None if lengths is None else torch.tensor(lengths)
        expected = radial.masked(q.double(), k.double(), v.double(), lens, pattern)
        views = [q, k, v] if layout is None else [getattr(cases, layout)(x) for x in (q, k, v)]
        lists = radial.kept_blocks(pattern, torch.device("cpu"))
        _report(radial_triton.forward(*views, lens, *lists, block), expected)


def _report(out: torch.Tensor, expected: torch.Tensor) -> None:
    result = {
        "error": cases.relative_error(out, expected.double()),
        "dense": out.is_contiguous(),
        "finite": bool(out.isfinite().all()),
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    interpreter._convert_float = _exactly
    {"fp8": fp8_cases, "radial": radial_cases}[sys.argv[1]]()
