"""Run in a process of its own, under Triton's interpreter: the quantising kernels on the CPU.

``python -m tests.wan_models.triton_quant_cpu`` prints one JSON object per case: how far a kernel is
from its formula in torch, over outputs that held NaN before.
"""

from __future__ import annotations

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch
from triton.runtime import interpreter

from tests.wan_models.triton_cpu import _exactly
from wan_models.quant import fp4_triton, fused, fused_triton, rows, rows_gemm
from wan_models.quant.nvfp4 import dequantize_nvfp4, nvfp4_to_e4m3, quantize_nvfp4

BF16 = torch.bfloat16


def poisoned(*args: object, **kwargs: object) -> torch.Tensor:
    """``torch.empty`` full of NaN, or of 0x7f bytes, which are NaN in e4m3 as well."""
    made = _empty(*args, **kwargs)
    if made.dtype.itemsize == 1:
        made.view(torch.uint8).fill_(0x7F)
    else:
        made.fill_(torch.nan)
    return made


_empty = torch.empty


def outliers(*shape: int) -> torch.Tensor:
    x = torch.randn(shape)
    x[..., ::7] *= 30
    return x.to(BF16)


def head_major(x: torch.Tensor) -> torch.Tensor:
    """(B, L, C) with the values of ``x`` and rows 3 C apart, off by C."""
    wide = torch.randn(*x.shape[:-1], 3 * x.shape[-1]).to(x.dtype)
    width = x.shape[-1]
    wide[..., width : 2 * width] = x
    return wide[..., width : 2 * width]


def column_major(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def report(
    name: str, made: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """Scales agree to rounding; values to one step of e4m3, and seldom that much."""
    values, scale = (x.float() for x in made)
    wanted, wanted_scale = (x.float() for x in expected)
    step = (wanted.abs() / 8).clamp(min=2.0**-9)
    off = (values - wanted).abs() / step
    emit(
        name,
        steps=off.max().item(),
        share=(off > 0).float().mean().item(),
        scale=((scale - wanted_scale).abs() / wanted_scale).max().item(),
        finite=bool(values.isfinite().all() and scale.isfinite().all()),
        dense=made[0].is_contiguous(),
    )


def emit(name: str, **facts: object) -> None:
    sys.stdout.write(json.dumps({"name": name, **facts}) + "\n")


def rows_cases() -> None:
    for batch, tokens, width in ((1, 5, 96), (2, 3, 100), (1, 1, 256)):
        x = outliers(batch, tokens, width)
        for view in (x, head_major(x), column_major(x)):
            report("quantise", fused_triton.run_quantise(view), rows.quantise_rows(view))
    zero = torch.zeros(1, 2, 64, dtype=BF16)
    report("zero", fused_triton.run_quantise(zero), rows.quantise_rows(zero))


def norm_cases() -> None:
    for batch, tokens, width, steps in ((1, 5, 96, 1), (2, 3, 100, 3), (2, 4, 160, 1)):
        x = outliers(batch, tokens, width)
        e = torch.randn(batch, steps, 6, width)
        shift, scale = e[:, :, 0], e[:, :, 1]
        weight, bias = torch.randn(width, dtype=BF16), torch.randn(width, dtype=BF16)
        for view in (x, head_major(x), column_major(x)):
            for args in ((None, None, shift, scale), (weight, bias, None, None)):
                made = fused_triton.run_norm_quantise(view, *args, 1e-6)
                wide = fused.norm_modulate(view, *args, 1e-6)
                report("norm", made, rows.quantise_rows(wide))


def add_cases() -> None:
    for batch, tokens, width, steps in ((1, 5, 96, 1), (2, 3, 100, 3)):
        x, branch = outliers(batch, tokens, width), outliers(batch, tokens, width)
        e = torch.randn(batch, steps, 6, width)
        weight, bias = torch.randn(width, dtype=BF16), torch.randn(width, dtype=BF16)
        for gate, shape in ((e[:, :, 2], (weight, bias, None, None)),
                            (None, (None, None, e[:, :, 0], e[:, :, 1])),
                            (e[:, :, 2], (None, None, e[:, :, 0], e[:, :, 1]))):
            total, *made = fused_triton.run_add_norm_quantise(
                column_major(x), head_major(branch), gate, *shape, 1e-6
            )
            added = branch.float() if gate is None else branch.float() * gate
            wanted = (x.float() + added).to(BF16)
            error = (total.float() - wanted.float()).abs() / wanted.float().abs().clamp(min=1)
            emit("total", error=error.max().item(), finite=bool(total.isfinite().all()))
            # From the sum that was stored: one bf16 step of it would change the norm.
            wide = fused.norm_modulate(total, *shape, 1e-6)
            report("add", tuple(made), rows.quantise_rows(wide))


def gelu_cases() -> None:
    for count, width in ((5, 96), (3, 100)):
        x = outliers(1, count, width)[0]
        scales = torch.rand(count, 1), torch.rand(width), torch.randn(width, dtype=BF16)
        for view in (x, head_major(x[None])[0]):
            for given in ((None, None, None), scales, (scales[0], torch.rand(1), None)):
                made = fused_triton.run_gelu_quantise(view, *given)
                y = torch.nn.functional.gelu(fused.scaled(view, *given), approximate="tanh")
                report("gelu", made, rows.quantise_rows(y))


def gemm_cases() -> None:
    for m, k, n in ((5, 96, 48), (130, 256, 272), (300, 144, 64)):
        values, scale = rows.quantise_rows(torch.randn(m, k))
        pitched = torch.randn(m, k + 32).to(values.dtype)[:, 16 : k + 16]
        pitched.copy_(values)
        weight, bias = torch.randn(n, k).to(values.dtype), torch.randn(n, dtype=BF16)
        for columns, added in ((torch.rand(n) + 0.1, bias), (torch.rand(1) + 0.1, None)):
            made = rows_gemm.run(pitched, scale, weight, columns, added, torch.float32)
            wanted = values.double() @ weight.double().t() * scale * columns
            wanted = wanted if added is None else wanted + added.double()
            error = (made.double() - wanted).norm() / wanted.norm()
            emit("gemm", error=error.item(), finite=bool(made.isfinite().all()))
            parts = pitched, scale, weight, columns, added, BF16
            made, narrow = rows_gemm.run(*parts, stored=torch.float16), rows_gemm.run(*parts)
            error = (made.double() - wanted).norm() / wanted.norm()
            emit(
                "stored", error=error.item(), finite=bool(made.isfinite().all()),
                half=made.dtype == torch.float16 and made.is_contiguous(),
                same=torch.equal(made, narrow.half()) and torch.equal(made.bfloat16(), narrow),
            )


def fp4_cases() -> None:
    for n, k in ((6, 64), (33, 96), (16, 2080)):
        weight = quantize_nvfp4(torch.randn(n, k) * torch.logspace(-2, 2, k))
        expanded = fp4_triton.run_expand(weight.packed, weight.block_scale)
        emit("expand", equal=torch.equal(expanded.float(), nvfp4_to_e4m3(weight)[0].float()))
        for m, dtype in ((1, torch.float16), (3, torch.bfloat16), (8, torch.float16)):
            x = torch.randn(m, k).to(dtype)
            bias = torch.randn(n, dtype=BF16) if m != 3 else None
            made = fp4_triton.run_few_rows(head_major(x[None])[0], *weight, bias)
            wanted = x.double() @ dequantize_nvfp4(weight).double().t()
            wanted = wanted if bias is None else wanted + bias.double()
            error = (made.double() - wanted).norm() / wanted.norm()
            emit("few", error=error.item(), finite=bool(made.isfinite().all()))


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    interpreter._convert_float = _exactly
    torch.empty = poisoned
    producers = rows_cases, norm_cases, add_cases, gelu_cases
    for many in (8192, 2):  # rows from which a program takes several, the last of them in part
        fused_triton.MANY, fused_triton.ROWS = many, 4
        for case in producers:
            case()
    gemm_cases()
    fp4_cases()
