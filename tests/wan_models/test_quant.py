"""FP8 linears: values, what they leave alone, and what they refuse."""

import pytest
import torch
from torch import nn

from wan_models import TINY, Fp8Linear, SlabLinear, WanBlock, block_inputs, quantize_
from wan_models.quant.recipes import E4M3, RECIPES, quantize


def linear(k: int = 64, n: int = 48, *, bias: bool = True, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(k, n, bias=bias).bfloat16()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("bias", [True, False])
def test_value_is_that_of_the_quantised_operands(recipe, bias):
    layer = linear(bias=bias)
    fp8 = Fp8Linear.from_linear(layer, recipe)
    x = torch.randn(33, 64, dtype=torch.bfloat16)
    dequantised = fp8.weight.float() * fp8.weight_scale
    expected = quantize(x).float() @ dequantised.t()
    if bias:
        expected = expected + fp8.bias.float()
    torch.testing.assert_close(fp8(x).float(), expected, rtol=2**-7, atol=2**-7)
    error = (fp8(x).float() - layer(x).float()).norm() / layer(x).float().norm()
    assert error < 0.06  # e4m3 keeps 3 bits of mantissa: about 2^-4 of each operand


def test_scaled_weight_fills_the_range_and_scale_is_fp32():
    fp8 = Fp8Linear.from_linear(linear(), "fp8_e4m3fn_scaled_fast")
    assert fp8.weight.dtype == E4M3
    assert fp8.weight_scale.dtype == torch.float32
    assert fp8.weight_scale.shape == ()
    assert fp8.weight.float().abs().max() == 448


@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 5, 64), (2, 3, 5, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_any_number_of_dimensions(shape, dtype):
    fp8 = Fp8Linear.from_linear(linear(), "fp8_e4m3fn_scaled_fast")
    x = torch.randn(shape, dtype=dtype)
    out = fp8(x)
    assert out.shape == (*shape[:-1], 48)
    assert out.dtype == dtype
    assert torch.equal(out.reshape(-1, 48), fp8(x.reshape(-1, 64)))


def test_input_beyond_the_range_is_clamped_out_of_place():
    fp8 = Fp8Linear.from_linear(linear(), "fp8_e4m3fn_fast")
    x = torch.full((16, 64), 1000.0, dtype=torch.bfloat16)
    out = fp8(x)
    assert torch.equal(x, torch.full_like(x, 1000.0))
    assert torch.equal(out, fp8(x.clamp(-448, 448)))
    assert out.isfinite().all()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "layout", [{}, {"weight_offset": 1}, {"row_padding": 3}, {"bias_gap": 2},
               {"weight_offset": 5, "row_padding": 1, "bias_gap": 6}],
)
def test_slab_has_the_same_values_at_the_planted_address(layout, bias):
    layer = linear(bias=bias)
    slab = SlabLinear.from_linear(layer, "fp8_e4m3fn_fast", **layout)
    dense = Fp8Linear.from_linear(layer, "fp8_e4m3fn_fast")
    x = torch.randn(33, 64, dtype=torch.bfloat16)
    assert torch.equal(slab(x), dense(x))
    weight = slab.weight()
    assert weight.data_ptr() - slab.slab.data_ptr() == layout.get("weight_offset", 0)
    assert weight.stride() == (64 + layout.get("row_padding", 0), 1)
    if bias:
        assert (slab.bias().data_ptr() - slab.slab.data_ptr()) % 16 == layout.get("bias_gap", 0)


def test_quantize_names_every_linear_and_why():
    block = WanBlock(TINY).bfloat16()
    block.odd = nn.Linear(24, 48)
    rows = quantize_(block, "fp8_e4m3fn_fast", skip=["cross_attn.k", "*.v"])
    actions = {row.name: (row.action, row.reason) for row in rows}
    assert len(rows) == 11
    assert actions["self_attn.q"] == ("quantised", "fp8_e4m3fn_fast")
    assert actions["cross_attn.k"] == ("kept", "named in skip by 'cross_attn.k'")
    assert actions["self_attn.v"][0] == actions["cross_attn.v"][0] == "kept"
    assert actions["odd"] == ("kept", "K=24 is not a multiple of 16, as _scaled_mm demands")
    assert isinstance(block.self_attn.q, Fp8Linear)
    assert isinstance(block.ffn[0], Fp8Linear)
    assert isinstance(block.cross_attn.k, nn.Linear)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize_(WanBlock(TINY), "fp8"), "quantization 'fp8'"),
        (lambda: quantize_(WanBlock(TINY), "fp8_e4m3fn_fast", skip=["attn"]), "names no linear"),
        (lambda: Fp8Linear.from_linear(nn.Linear(24, 48), "fp8_e4m3fn_fast"), "K=24"),
        (lambda: SlabLinear.from_linear(linear(), "fp8_e4m3fn_fast", bias_gap=1), "bias_gap=1"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_quantised_block_compiles_in_one_graph_to_the_same_values():
    torch.manual_seed(0)
    block = WanBlock(TINY).bfloat16().eval()
    quantize_(block, "fp8_e4m3fn_scaled_fast")
    inputs = block_inputs(TINY, (2, 3, 4), dtype=torch.bfloat16)
    with torch.no_grad():
        compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(*inputs), block(*inputs))
