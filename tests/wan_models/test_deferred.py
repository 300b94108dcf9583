"""Products whose scales and bias the next pass applies: bare sums, and who reads them."""

from __future__ import annotations

import pytest
import torch

import contig_pass
from tests.wan_models.attention_cases import relative_error
from wan_models.attention import WanSelfAttention
from wan_models.attention.norm_rope import norm_rope
from wan_models.quant import quantize_, quantized
from wan_models.quant.fused import rows_of
from wan_models.quant.rows_linear import deferred, fp8_bare_product, rows_linear
from wan_models.rope import rope_table_1d

BF16, HALF = torch.bfloat16, torch.float16
ROWWISE, FP4 = "fp8_e4m3fn_rowwise_fast", "fp4_scaled_fast"


def linear(recipe: str, bias: bool = True):
    torch.manual_seed(0)
    return quantized(torch.nn.Linear(64, 128, bias=bias).to(BF16).requires_grad_(False), recipe)


@pytest.mark.parametrize("recipe", [ROWWISE, FP4])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_product(recipe, bias):
    made, x = linear(recipe, bias), torch.randn(2, 5, 64).to(BF16)
    rows = rows_of(x)
    left = deferred(rows, *made.operands(), made.bias)
    assert (left.sums.shape, left.sums.dtype) == ((2, 5, 128), BF16)
    assert left.sums.is_contiguous()
    assert left.row_scale is rows.scale
    whole = rows_linear(rows._replace(dtype=torch.float32), *made.operands(), made.bias)
    # Half a digit of bf16, relative to the product without its bias.
    bound = (whole - (0 if made.bias is None else made.bias.float())).abs() * 2**-8 + 1e-6
    assert ((left.wide() - whole).abs() <= bound).all()


@pytest.mark.parametrize("columns", [128, 1])
@pytest.mark.parametrize("dtype", [None, HALF])
def test_norm_and_rotary_apply_the_rest(columns, dtype):
    torch.manual_seed(0)
    sums, weight = torch.randn(2, 6, 128).to(BF16), torch.rand(128) + 0.5
    rest = torch.rand(2, 6, 1), torch.rand(columns), torch.randn(128).to(BF16)
    table = rope_table_1d(torch.arange(5), 64)
    made = norm_rope(sums, weight, table, 1e-6, True, dtype, *rest)
    assert made.dtype == (dtype or BF16)
    wide = sums.float() * rest[0] * rest[1] + rest[2].float()
    wanted = norm_rope(wide, weight, table, 1e-6, True)
    assert relative_error(made, wanted.double()) < 0.003


def test_opcheck():
    values = torch.randn(6, 64).to(torch.float8_e4m3fn)
    torch.library.opcheck(
        fp8_bare_product, (values, torch.randn(32, 64).to(torch.float8_e4m3fn)),
        test_utils="test_faketensor",  # the others compare e4m3, which the CPU cannot
    )
    weight, table = torch.rand(128), rope_table_1d(torch.arange(5), 64)
    rest = torch.rand(2, 6, 1), torch.rand(128), torch.randn(128).to(BF16)
    torch.library.opcheck(
        norm_rope, (torch.randn(2, 6, 128).to(BF16), weight, table, 1e-6, True, HALF, *rest),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static"),
    )


def test_a_misaligned_operand_is_copied_under_contig_safe():
    weight = torch.randn(32, 64).to(torch.float8_e4m3fn)

    def function(flat):
        return fp8_bare_product(flat[1:].view(6, 64), weight)

    flat = torch.randn(6 * 64 + 1).to(torch.float8_e4m3fn)
    compiled = torch.compile(
        function, backend=contig_pass.contig_safe, fullgraph=True, options={"inner": "aot_eager"}
    )
    assert torch.equal(compiled(flat), function(flat))
    (fix,) = contig_pass.last_reports()[-1].fixes
    assert (fix.op.split(".")[0], fix.operand) == ("wan_models::fp8_bare_product", "values")


@pytest.mark.parametrize(("dtype", "bare"), [(BF16, 2), (HALF, 0)])
def test_q_and_k_are_so_where_sums_have_the_digits_of_the_layer(dtype, bare):
    torch.manual_seed(0)
    layer = WanSelfAttention(192, 3).to(dtype).eval().requires_grad_(False)
    quantize_(layer, ROWWISE)
    x, table, seen = torch.randn(2, 60, 192).to(dtype), rope_table_1d(torch.arange(60), 64), []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch.compile(lambda x: layer(rows_of(x), table), backend=backend, fullgraph=True)(x)
    assert sum("fp8_bare_product" in name for name in seen) == bare
    assert sum("norm_rope" in name for name in seen) == 2
