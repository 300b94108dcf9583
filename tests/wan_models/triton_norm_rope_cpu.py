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
from wan_models.attention.fp16 import score_factor
from wan_models.quant import fused_triton
from wan_models.quant.rows import Deferred
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
        for dtype in (torch.float32, torch.bfloat16):
            stored_cases(x.to(dtype), weight, table)
        deferred_cases(x, weight, table)


def deferred_cases(x: torch.Tensor, weight: torch.Tensor, table: torch.Tensor) -> None:
    """Sums whose scales and bias are applied on the way."""
    rows = torch.rand(*x.shape[:-1], 1) + 0.1
    for columns, bias in ((torch.rand(x.shape[-1]) + 0.1, torch.randn(x.shape[-1])),
                          (torch.rand(1) + 0.1, None)):
        wide = Deferred(x.double(), rows.double(), columns.double(), bias).wide()
        wanted = norm_rope_triton.run(wide.float(), weight, table, 1e-6)
        made = norm_rope_triton.run(x, weight, table, 1e-6, False, None, rows, columns, bias)
        facts = {
            "error": (made - wanted).abs().max().item() / 8, "dense": made.is_contiguous(),
            "shape": made.shape == wanted.shape,
        }
        sys.stdout.write(json.dumps(facts) + "\n")


def stored_cases(x: torch.Tensor, weight: torch.Tensor, table: torch.Tensor) -> None:
    """In fp16, with the factor of queries and without: the digits are those of x's type."""
    wide, half = x.double(), table.shape[-1]
    wide = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    turned = apply_rope(wide.unflatten(-1, (-1, 2 * half)).float(), table)
    for scale in (False, True):
        wanted = turned * (score_factor(2 * half) if scale else 1)
        made = norm_rope_triton.run(head_major(x), weight, table, 1e-6, scale, torch.float16)
        # Half of the last digit is allowed, once in bf16 or in fp16 alone.
        digit = wanted.abs() * 2.0 ** (-8 if x.dtype == torch.bfloat16 else -11)
        facts = {
            "error": ((made - wanted).abs() - digit).max().item(), "dense": made.is_contiguous(),
            "shape": made.shape == wanted.shape, "half": made.dtype == torch.float16,
            "digits": torch.equal(made.to(x.dtype).half(), made),
            "narrow": torch.equal(made.bfloat16().half(), made) == (x.dtype == torch.bfloat16),
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
