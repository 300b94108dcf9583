"""Run in a process of its own, under Triton's interpreter: our kernels on the CPU.

``python -m tests.wan_models.triton_cpu fp8|fp8_fused|fp8_poison|radial`` prints one JSON object per
case.
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
    """The interpreter's own casts to e4m3 and bf16 lose the carry where rounding reaches the next
    power of two (Triton 3.7); torch's round as the GPU does."""
    if source != tl.float32 or target not in (tl.float8e4nv, tl.bfloat16):
        return _convert(values, source, target, rounding)
    numbers = torch.from_numpy(np.ascontiguousarray(values))
    if target == tl.bfloat16:
        return numbers.bfloat16().view(torch.uint16).numpy()
    return numbers.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def fp8_cases() -> None:
    from wan_models.attention import fp8, fp8_triton

    torch.manual_seed(0)
    for size, queries, keys, lengths, layout in (
        (64, 130, 200, None, None),
        (64, 3, 256, None, "head_major"),
        (64, 40, 129, (129, 128), "fused_chunk"),
        (64, 20, 140, (0, 77), "padded_slice"),
        (128, 17, 131, (131, 5), None),
        (128, 1, 1, None, None),
        (64, 5, 4300, (4300, 4100), None),  # more than are sampled whole
        (64, 4200, 3, None, "padded_slice"),
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


def fp8_fused_cases() -> None:
    from wan_models.attention import fp8_fused, fp8_operands, fp8_triton, fp8_values
    from wan_models.rope import rope_table_1d

    torch.manual_seed(0)
    for size, tokens, turned, lengths, pitch, by_sample in (
        (64, 130, 130, None, 0, False),
        (64, 200, 150, (200, 130), 16, False),
        (128, 77, 60, (77, 1), 0, True),
        (64, 1, 1, None, 0, False),
        (64, 4200, 4200, (4200, 4100), 0, False),
    ):
        width = 2 * size
        batch = 1 if tokens > 4000 else 2
        q, k, v = (torch.randn(batch, tokens, width + pitch)[..., :width] for _ in range(3))
        k += 1.0
        weights = 1 + 0.3 * torch.randn(2, width)
        positions = torch.arange(turned, dtype=torch.float32)
        if by_sample:
            positions = torch.stack([positions, 3 * positions])
        table = rope_table_1d(positions, size)
        lens = None if lengths is None else torch.tensor(lengths[:batch])
        heads = [x.unflatten(-1, (2, size)) for x in (q, k, v)]
        expected = fp8_fused.fused_reference(*heads, *weights, table, 1e-6, lens)
        if lens is not None:
            for b in range(batch):
                k[b, lengths[b] :], v[b, lengths[b] :] = torch.nan, torch.nan
        producer = fp8_operands.Producer(*weights, table, 1e-6)
        narrow = fp8_operands.quantise_values(heads[2], lens)
        by_torch = fp8_values.run(v, size, lens)
        assert torch.equal(narrow[1], by_torch[1])
        # A product of the kernel may lie a bit beside, and tip over to the next e4m3 number.
        differ = (narrow[0].float() != by_torch[0].float()).float().mean()
        assert differ < 1e-3, differ
        _report(fp8_triton.forward_narrow(*heads[:2], narrow, lens, producer), expected)


def fp8_poison_cases() -> None:
    """What is not finite where one element of q, k or v is not: by query, head and channel."""
    from wan_models.attention import fp8_triton

    for which in range(3):
        for value in (torch.nan, torch.inf):
            torch.manual_seed(0)
            operands = [torch.randn(1, 150, 2, 64) for _ in range(3)]
            operands[which][0, 140, 1, 7] = value
            bad = ~fp8_triton.forward(*operands, None).isfinite()[0]
            expected = torch.zeros_like(bad)
            expected[((140, 1), (slice(None), 1), (slice(None), 1, 7))[which]] = True
            sys.stdout.write(json.dumps({"right": torch.equal(bad, expected)}) + "\n")


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
    {
        "fp8": fp8_cases, "fp8_fused": fp8_fused_cases, "fp8_poison": fp8_poison_cases,
        "radial": radial_cases,
    }[sys.argv[1]]()
