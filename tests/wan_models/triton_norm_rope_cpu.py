"""Run in a process of its own, under Triton's interpreter: norm with rotary on the CPU.

``python -m tests.wan_models.triton_norm_rope_cpu`` prints one JSON object per case: the largest
difference to the formulas in fp64, over an output that held NaN.
"""

from __future__ import annotations

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch
from triton.runtime import interpreter

from tests.wan_models.triton_cpu import _exactly
from tests.wan_models.triton_quant_cpu import column_major, head_major, poisoned
from wan_models.attention import norm_rope_triton
from wan_models.quant import fused_triton
from wan_models.rope import apply_rope, rope_table_1d


def cases() -> None:
    for batch, tokens, heads, half, turned, own in (
        (1, 5, 3, 8, 5, False), (2, 6, 2, 16, 4, True), (2, 3, 5, 4, 3, False),
    ):
        x = torch.randn(batch, tokens, 2 * heads * half)
        x[..., ::7] *= 30
        weight = torch.randn(x.shape[-1])
        positions = torch.rand(batch, turned + 2) * 50 if own else torch.rand(turned + 2) * 50
        # A slice of a longer table, whose sines are further on than its own size says.
        table = rope_table_1d(positions, 2 * half)[..., :turned, :, :]
        wide = x.double()
        wide = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
        wanted = apply_rope(wide.unflatten(-1, (heads, -1)).float(), table)
        for view in (x, head_major(x), column_major(x)):
            made = norm_rope_triton.run(view, weight, table, 1e-6)
            facts = {
                "error": (made - wanted).abs().max().item(), "dense": made.is_contiguous(),
                "shape": made.shape == wanted.shape,
            }
            sys.stdout.write(json.dumps(facts) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    interpreter._convert_float = _exactly
    torch.empty = poisoned
    for many in (8192, 2):  # rows from which a program takes several, the last of them in part
        fused_triton.MANY, fused_triton.ROWS = many, 4
        cases()
