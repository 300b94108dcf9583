"""Norm with rotary in one pass: against the modules, where a layer takes it, and its kernel."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

import contig_pass
from tests.wan_models.attention_cases import exact, relative_error
from tests.wan_models.triton_kernels import needs_interpreter
from wan_models.attention import WanSelfAttention
from wan_models.attention.fp16 import score_factor
from wan_models.attention.norm_rope import norm_rope
from wan_models.layers import WanRMSNorm
from wan_models.quant import attach_lora, quantize_
from wan_models.rope import apply_rope, rope_table_1d

BF16 = torch.bfloat16
DIM, HEADS, TOKENS = 64, 4, 24


def operands(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (2, 24, 64), a weight, a table for all tokens but five."""
    torch.manual_seed(0)
    x, weight = torch.randn(2, TOKENS, DIM) * 3, 1 + 0.3 * torch.randn(DIM)
    return x.to(dtype), weight.to(dtype), rope_table_1d(torch.arange(TOKENS - 5), DIM // HEADS)


def by_modules(x: torch.Tensor, weight: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    norm = WanRMSNorm(DIM, 1e-6).to(x.dtype)
    norm.weight.data.copy_(weight)
    return apply_rope(norm(x).detach().unflatten(-1, (HEADS, -1)), table)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (BF16, 0.005)])
def test_it_is_norm_and_rotary(dtype, bound):
    x, weight, table = operands(dtype)
    for view in (x, x.transpose(0, 1).contiguous().transpose(0, 1)):
        got = norm_rope(view, weight, table, 1e-6)
        assert got.is_contiguous()
        assert got.dtype == dtype
        assert relative_error(got, by_modules(x, weight, table)) < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16])
@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
def test_it_scales_as_scores_want_and_stores_in_another_type(dtype, scale, stored):
    x, weight, table = operands(dtype)
    factor = score_factor(DIM // HEADS) if scale else 1
    wide = x.double()
    wide = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    wanted = apply_rope(wide.unflatten(-1, (HEADS, -1)).float(), table) * factor
    for view in (x, x.transpose(0, 1).contiguous().transpose(0, 1)):
        got = norm_rope(view, weight, table, 1e-6, scale, stored)
        assert (got.dtype, got.is_contiguous()) == (stored, True)
        assert torch.equal(got.to(dtype).to(stored), got)  # the digits of x's type, no more
        digit = {torch.float32: 2**-24, torch.float16: 2**-11, BF16: 2**-8}
        bound = max(digit[dtype], digit[stored])
        assert ((got - wanted).abs() <= 1.02 * bound * wanted.abs() + 1e-6).all()
    assert torch.equal(got, norm_rope(x, weight, table, 1e-6, scale).to(stored))


def test_opcheck():
    for tokens, others in ((TOKENS, ()), (1, ()), (TOKENS, (True, torch.float16)), (1, (True,))):
        x, weight, _ = operands()
        table = rope_table_1d(torch.arange(tokens), DIM // HEADS)
        torch.library.opcheck(
            norm_rope, (x[:, :tokens], weight, table, 1e-6, *others),
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static"),
        )


def test_operands_that_are_not_unit_stride_are_refused():
    x, weight, table = operands()
    with pytest.raises(ValueError, match="last dimension of weight must be unit-stride"):
        norm_rope(x, weight.repeat_interleave(2)[::2], table, 1e-6)


def layer(recipe: str | None) -> WanSelfAttention:
    torch.manual_seed(1)
    made = WanSelfAttention(DIM, HEADS).to(BF16).eval().requires_grad_(False)
    if recipe:
        quantize_(made, recipe)
    return made


def taken(made: WanSelfAttention) -> list[str]:
    """Ops of ours, but for the linears', in the graph of a forward."""
    seen: list[str] = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    x, _, table = operands(BF16)
    with torch.no_grad():
        torch.compile(made, backend=backend, fullgraph=True)(x, table)
    return [name for name in seen if "norm_rope" in name]


def test_it_is_for_projections_that_take_quantised_rows():
    assert taken(layer(None)) == []
    assert taken(layer("fp8_e4m3fn_scaled")) == []
    for recipe in ("fp8_e4m3fn_rowwise_fast", "fp4_scaled_fast"):
        assert len(taken(layer(recipe))) == 2
    made = layer("fp8_e4m3fn_rowwise_fast")
    attach_lora(made.q, torch.randn(2, DIM), torch.randn(DIM, 2))
    assert len(taken(made)) == 1
    made.norm_k = torch.nn.Identity()
    assert taken(made) == []


def test_a_layer_is_as_its_weights_say_and_a_wrong_table_is_named():
    made = layer("fp8_e4m3fn_rowwise_fast")
    x, _, table = operands(BF16)
    q, k, v = made.project(x, table)
    wanted = [by_modules(p(x), n.weight, table) for p, n in ((made.q, made.norm_q),
                                                             (made.k, made.norm_k))]
    assert relative_error(q, wanted[0]) < 0.005
    assert relative_error(k, wanted[1]) < 0.005
    expected = made.o(exact(q, k, v).to(BF16).flatten(2))
    assert relative_error(made(x, table), expected) < 0.05
    with pytest.raises(ValueError, match="rotary table is for 24 tokens of head dimension 8"):
        made(x, rope_table_1d(torch.arange(TOKENS), 8))


def test_under_contig_safe_a_projection_off_16_bytes_is_copied():
    _, weight, table = operands(BF16)

    def function(flat):
        x = flat[1:].view(2, TOKENS, DIM)
        return norm_rope(x, weight, table, 1e-6)

    flat = torch.randn(2 * TOKENS * DIM + 1).to(BF16)
    got = torch.compile(function, backend=contig_pass.contig_safe, fullgraph=True)(flat)
    (fix,) = contig_pass.last_reports()[-1].fixes
    assert (fix.op.split(".")[0], fix.operand) == ("wan_models::norm_rope", "x")
    assert torch.equal(got, function(flat))


@needs_interpreter
def test_the_kernel_in_the_interpreter():
    run = subprocess.run(
        [sys.executable, "-m", "tests.wan_models.triton_norm_rope_cpu"],
        capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"},
    )
    assert run.returncode == 0, run.stderr
    cases = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(cases) == 54
    for case in cases:
        assert case["error"] < 2e-5
        assert case["dense"]
        assert case["shape"]
    stored = [case for case in cases if "half" in case]
    assert len(stored) == 24
    assert all(case["half"] and case["digits"] and case["narrow"] for case in stored)
