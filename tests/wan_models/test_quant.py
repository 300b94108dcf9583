"""FP8 linears: values, what they leave alone, and what they refuse."""

import pytest
import torch
from torch import nn

from wan_models import CONFIGS, TINY, Fp8Linear, SlabLinear, WanBlock, block_inputs, quantize_
from wan_models.quant.recipes import E4M3, RECIPES, quantize


def linear(k: int = 64, n: int = 48, *, bias: bool = True, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(k, n, bias=bias).bfloat16()


def slab_of(size: int, *, pitch: int = 64, bias_offset: int | None = None) -> SlabLinear:
    slab = torch.zeros(size, dtype=torch.uint8)
    return SlabLinear(slab, torch.ones(()), (48, 64), 0, pitch, bias_offset)


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
    assert error < 0.06  # measured 0.037: e4m3 keeps 3 bits of mantissa, about 2^-4 at worst


def test_only_a_scale_keeps_the_precision_of_small_weights():
    torch.manual_seed(0)
    layer = nn.Linear(1024, 64).bfloat16()
    layer.weight.data.mul_(0.1)  # many below e4m3's smallest normal number, 2^-6
    x = torch.randn(33, 1024, dtype=torch.bfloat16)
    expected = x.float() @ layer.weight.float().t() + layer.bias.float()
    error = {
        recipe: (Fp8Linear.from_linear(layer, recipe)(x).float() - expected).norm()
        / expected.norm()
        for recipe in RECIPES
    }
    assert error["fp8_e4m3fn_scaled_fast"] < 0.06
    assert error["fp8_e4m3fn_fast"] > 2 * error["fp8_e4m3fn_scaled_fast"]


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_slab_has_the_same_values_in_other_types(dtype):
    layer = linear().to(dtype)
    layout = {"weight_offset": 3, "row_padding": 5, "bias_gap": 2}
    slab = SlabLinear.from_linear(layer, "fp8_e4m3fn_scaled_fast", **layout)
    dense = Fp8Linear.from_linear(layer, "fp8_e4m3fn_scaled_fast")
    x = torch.randn(33, 64, dtype=dtype)
    assert torch.equal(slab(x), dense(x))
    assert slab(x).dtype == dtype


def test_a_bias_may_lie_before_its_weight():
    dense = Fp8Linear.from_linear(linear(), "fp8_e4m3fn_fast")
    buffer = torch.zeros(3300, dtype=torch.uint8)
    slab = SlabLinear(buffer, dense.weight_scale, (48, 64), 101, 64, 2)
    slab.weight().copy_(dense.weight)
    slab.bias().copy_(dense.bias)
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    assert torch.equal(slab(x), dense(x))


def test_slab_compiles_in_one_graph_to_the_same_values():
    slab = SlabLinear.from_linear(
        linear(), "fp8_e4m3fn_scaled_fast", weight_offset=1, row_padding=3, bias_gap=2
    )
    x = torch.randn(2, 5, 64, dtype=torch.bfloat16)
    compiled = torch.compile(slab, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), slab(x))


@pytest.mark.parametrize("cast", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", [Fp8Linear, SlabLinear])
def test_casting_the_module_leaves_weight_and_scales_alone(kind, cast):
    layer = kind.from_linear(linear(), "fp8_e4m3fn_scaled_fast")
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    before, state = layer(x), {n: t.clone() for n, t in layer.state_dict().items()}
    nn.Sequential(layer).to(cast)
    for name in set(state) - {"bias"}:
        assert layer.state_dict()[name].dtype == state[name].dtype
    assert torch.equal(layer(x), before)


def test_scales_are_fp32_whatever_the_default_type():
    layer = linear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        kinds = [kind.from_linear(layer, "fp8_e4m3fn_fast") for kind in (Fp8Linear, SlabLinear)]
    finally:
        torch.set_default_dtype(torch.float32)
    for made in kinds:
        assert made.input_scale.dtype == made.weight_scale.dtype == torch.float32


def test_a_zero_weight_and_a_huge_one_stay_finite():
    layer = linear(bias=False)
    for value in (0.0, 3e38):
        layer.weight.data.fill_(value)
        fp8 = Fp8Linear.from_linear(layer, "fp8_e4m3fn_scaled_fast")
        assert fp8.weight.float().isfinite().all()
        back = fp8.weight.float() * fp8.weight_scale
        torch.testing.assert_close(back, layer.weight.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("value", "kept"), [(448.0, 448.0), (449.0, 448.0), (480.0, 448.0), (-1e9, -448.0)]
)
def test_cast_to_e4m3_saturates(value, kept):
    assert quantize(torch.tensor(value)).float() == kept


def test_a_full_size_block_quantises_on_the_meta_device():
    with torch.device("meta"):
        block = WanBlock(CONFIGS["t2v-14b"]).bfloat16()
    rows = quantize_(block, "fp8_e4m3fn_scaled_fast")
    assert [row.action for row in rows] == ["quantised"] * 10
    assert block.ffn[2].weight.shape == (5120, 13824)
    assert block.ffn[2].weight.device.type == "meta"


def test_a_shared_linear_stays_shared():
    holder = nn.ModuleDict({"a": linear(), "b": linear(), "c": linear(seed=1)})
    holder["b"] = holder["a"]
    rows = quantize_(holder, "fp8_e4m3fn_fast")
    assert [row.name for row in rows] == ["a", "b", "c"]
    assert isinstance(holder["a"], Fp8Linear)
    assert holder["a"] is holder["b"]

    holder = nn.ModuleDict({"a": linear(), "c": linear(seed=1)})
    holder["b"] = holder["a"]
    rows = quantize_(holder, "fp8_e4m3fn_fast", skip=["b"])
    assert [(row.name, row.action) for row in rows] == [
        ("a", "kept"), ("c", "quantised"), ("b", "kept")
    ]


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
        (lambda: quantize_(linear(), "fp8_e4m3fn_fast"), "use Fp8Linear.from_linear"),
        (lambda: SlabLinear.from_linear(linear(), "fp8_e4m3fn_fast", bias_gap=1), "bias_gap=1"),
        (lambda: slab_of(100), "weight takes bytes 0 to 3072 of a slab of 100"),
        (lambda: slab_of(4096, pitch=63), "pitch=63"),
        (lambda: slab_of(4096, bias_offset=3073), "bias_offset=3073: use a multiple of 2"),
        (lambda: slab_of(4096, bias_offset=3000), "overlaps the weight"),
        (lambda: slab_of(4096, bias_offset=4090), "bias takes bytes 4090 to 4186"),
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
