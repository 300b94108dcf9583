"""Quantised linears: values, what they leave alone, and what they refuse."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import contig_pass
from tests.wan_models import float_grid
from wan_models import TINY, Fp8Linear, SlabLinear, WanBlock, block_inputs, quantize_
from wan_models.quant import QuantizedLinear, quantized
from wan_models.quant.recipes import E4M3, E5M2, RECIPES, quantize

FP8 = [name for name, recipe in RECIPES.items() if not recipe.fp4]
GRIDS = {E4M3: float_grid.e4m3(), E5M2: float_grid.e5m2()}


def linear(k: int = 64, n: int = 48, *, bias: bool = True, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(k, n, bias=bias).bfloat16()


def fp8(dtype: torch.dtype, scales: int, recipe: str) -> Fp8Linear:
    scale = torch.ones(scales) if scales else None
    return Fp8Linear(torch.zeros(48, 64).to(dtype), scale, None, recipe)


def slab_of(size: int, *, pitch: int = 64, bias_offset: int | None = None) -> SlabLinear:
    slab = torch.zeros(size, dtype=torch.uint8)
    return SlabLinear(slab, torch.ones(()), (48, 64), 0, pitch, bias_offset)


def test_recipes_have_the_names_of_the_seed():
    flavours = ("", "_scaled", "_fast", "_scaled_fast")
    fp8 = {f"fp8_{kind}{flavour}" for kind in ("e4m3fn", "e5m2") for flavour in flavours}
    ours = {"fp8_e4m3fn_dynamic_fast", "fp8_e4m3fn_rowwise_fast"}
    assert set(RECIPES) == fp8 | ours | {"fp4_experimental", "fp4_scaled", "fp4_scaled_fast"}


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_cast_agrees_with_the_loop(dtype):
    torch.manual_seed(0)
    x = torch.randn(4000) * torch.logspace(-8, 6, 4000)
    got = quantize(x, dtype).double().tolist()
    assert got == [float_grid.rounded(value, GRIDS[dtype]) for value in x.double().tolist()]


@pytest.mark.parametrize("recipe", FP8)
def test_stored_weight_agrees_with_the_loop(recipe):
    layer = linear()
    fp8 = quantized(layer, recipe)
    grid, weight = GRIDS[RECIPES[recipe].dtype], layer.weight.double()
    scales = torch.ones(48, dtype=torch.float64)
    if RECIPES[recipe].channels:
        scales = (weight.abs().amax(1) / grid[-1]).float().double()
    elif RECIPES[recipe].scaled:
        scales = (weight.abs().max() / grid[-1]).float().double().expand(48)
    assert torch.equal(fp8.weight_scale.double().expand(48, 1).flatten(), scales)
    assert fp8.weight.dtype == RECIPES[recipe].dtype
    rows = zip(fp8.weight.double().tolist(), weight.tolist(), scales.tolist(), strict=True)
    for got, row, scale in rows:
        assert got == [float_grid.rounded(value / scale, grid) for value in row]
    stored = (fp8.weight.double() * scales[:, None]).float()
    assert torch.equal(fp8.dequantised(), stored)


@pytest.mark.parametrize("recipe", FP8)
@pytest.mark.parametrize("bias", [True, False])
def test_value_is_that_of_the_quantised_operands(recipe, bias):
    fp8 = quantized(linear(bias=bias), recipe)
    x = torch.randn(9, 64, dtype=torch.bfloat16)
    weight, scales = fp8.weight.double().tolist(), fp8.weight_scale.expand(48, 1).flatten().tolist()
    largest = {"static": 448.0, "tensor": x.abs().max().item()}
    expected = torch.zeros(9, 48, dtype=torch.float64)
    for m, row in enumerate(x.double().tolist()):
        step = largest.get(RECIPES[recipe].activations, max(map(abs, row))) / 448
        if fp8.fast:
            row = [step * float_grid.rounded(value / step, GRIDS[E4M3]) for value in row]
        for n in range(48):
            total = sum(a * b for a, b in zip(row, weight[n], strict=True))
            expected[m, n] = total * scales[n] + (fp8.bias[n].item() if bias else 0.0)
    # bf16 keeps 8 bits; a scaled weight that is dequantised is rounded to it as well.
    torch.testing.assert_close(fp8(x).double(), expected, rtol=2**-8, atol=2**-8)


#: Least cosine to the unquantised product. e5m2 keeps 2 bits of mantissa: 0.9983 is its best.
LEAST_COSINE = {E4M3: 0.999, E5M2: 0.998, RECIPES["fp4_scaled"].dtype: 0.99}


@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_accuracy(recipe, outliers):
    torch.manual_seed(0)
    layer = nn.Linear(512, 128).bfloat16()
    layer.weight.data.normal_(0, 0.03)
    x = torch.randn(17, 512, dtype=torch.bfloat16)
    if outliers:
        x[:, ::97] *= 30
    expected = x.double() @ layer.weight.double().t() + layer.bias.double()
    got = quantized(layer, recipe)(x).double()
    cosine = nn.functional.cosine_similarity(got.flatten(), expected.flatten(), dim=0)
    assert cosine > LEAST_COSINE[RECIPES[recipe].dtype]


@pytest.mark.parametrize("kind", ["e4m3fn", "e5m2"])
def test_only_a_scale_keeps_the_precision_of_small_weights(kind):
    torch.manual_seed(0)
    layer = nn.Linear(1024, 64).bfloat16()
    layer.weight.data.mul_(0.1 if kind == "e4m3fn" else 1e-4)  # many below the smallest normal
    x = torch.randn(33, 1024, dtype=torch.bfloat16)
    expected = x.float() @ layer.weight.float().t() + layer.bias.float()
    for fast in ("", "_fast"):
        error = {
            flavour: (quantized(layer, f"fp8_{kind}{flavour}{fast}")(x).float() - expected).norm()
            / expected.norm()
            for flavour in ("", "_scaled")
        }
        assert error["_scaled"] < 0.07
        assert error[""] > 1.5 * error["_scaled"]


def test_scaled_weight_fills_the_range_and_scale_is_fp32():
    fp8 = Fp8Linear.from_linear(linear(), "fp8_e4m3fn_scaled_fast")
    assert fp8.weight.dtype == E4M3
    assert fp8.weight_scale.dtype == torch.float32
    assert fp8.weight_scale.shape == ()
    assert fp8.weight.float().abs().max() == 448


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 5, 64), (2, 3, 5, 64), (2, 0, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_any_number_of_dimensions(recipe, shape, dtype):
    layer = quantized(linear(), recipe)
    x = torch.randn(shape, dtype=dtype)
    out = layer(x)
    assert out.shape == (*shape[:-1], 48)
    assert out.dtype == dtype
    assert torch.equal(out.reshape(-1, 48), layer(x.reshape(-1, 64)))


def test_strided_input_gives_the_values_of_its_dense_copy():
    base = torch.randn(2, 64, 7, dtype=torch.bfloat16)
    for recipe in RECIPES:
        layer, x = quantized(linear(), recipe), base.transpose(1, 2)
        dense = x.clone(memory_format=torch.contiguous_format)
        # The order of a sum may follow the layout.
        torch.testing.assert_close(layer(x), layer(dense), rtol=2**-7, atol=2**-9)


def test_calibrated_input_scale_divides_activations_and_is_state():
    layer = quantized(linear(), "fp8_e4m3fn_scaled_fast")
    x = 1000 * torch.randn(5, 64, dtype=torch.bfloat16)
    layer.set_input_scale(torch.tensor([8.0], dtype=torch.bfloat16))
    assert layer.state_dict()["input_scale"].dtype == torch.float32
    weight = layer.weight.double() * layer.weight_scale.double()
    expected = quantize(x.float() / 8).double() * 8 @ weight.t() + layer.bias.double()
    torch.testing.assert_close(layer(x).double(), expected, rtol=2**-8, atol=2**-8)
    again = Fp8Linear(layer.weight, layer.weight_scale, layer.bias, input_scale=torch.tensor(8.0))
    assert torch.equal(again(x), layer(x))


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
@pytest.mark.parametrize("recipe", [*RECIPES, "slab"])
def test_casting_the_module_leaves_weight_and_scales_alone(recipe, cast):
    if recipe == "slab":
        layer = SlabLinear.from_linear(linear(), "fp8_e4m3fn_scaled_fast")
    else:
        layer = quantized(linear(), recipe)
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    before, types = layer(x), {n: t.dtype for n, t in layer.named_buffers()}
    nn.Sequential(layer).to(cast)
    for name, buffer in layer.named_buffers():
        assert buffer.dtype == (cast if name == "bias" else types[name])
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("recipe", RECIPES)
def test_state_holds_scales_for_scaled_recipes_alone(recipe):
    names = {"weight", "bias"}
    if RECIPES[recipe].fp4:
        names |= {"weight_scale", "weight_scale_2"}
    elif RECIPES[recipe].scaled:
        names |= {"weight_scale"}
    assert set(quantized(linear(), recipe).state_dict()) == names


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("recipe", RECIPES)
def test_leaving_the_meta_device(recipe, assign):
    layer = quantized(linear(), recipe)
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    other = quantized(linear(seed=1).to("meta"), recipe)
    if not assign:
        other.to_empty(device="cpu")
    other.load_state_dict(layer.state_dict(), assign=assign)
    assert all(not buffer.is_meta for buffer in other.buffers())
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(other)(x), layer(x))


@pytest.mark.parametrize("recipe", RECIPES)
def test_leaving_the_meta_device_one_buffer_after_the_other(recipe):
    layer = quantized(linear(), recipe)
    other = quantized(linear(seed=1).to("meta"), recipe)
    for name, tensor in layer.state_dict().items():
        setattr(other, name, tensor)
    other.restore_ones()
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    assert torch.equal(other(x), layer(x))


def test_a_move_to_where_it_is_changes_no_address():
    layer = quantized(linear(), "fp8_e4m3fn_fast")
    before = {name: buffer.data_ptr() for name, buffer in layer.named_buffers()}
    layer.to("cpu", torch.bfloat16)
    assert {name: buffer.data_ptr() for name, buffer in layer.named_buffers()} == before


@pytest.mark.parametrize("recipe", FP8)
def test_memory_is_one_byte_a_weight_plus_scale_and_bias(recipe):
    state = quantized(linear(256, 128), recipe).state_dict()
    scale = 4 * (128 if RECIPES[recipe].channels else RECIPES[recipe].scaled)
    assert sum(t.numel() * t.element_size() for t in state.values()) == 256 * 128 + scale + 256


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


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantized(linear(), "fp8"), "quantization 'fp8': use one of 'fp8_e4m3fn', "),
        (lambda: Fp8Linear.from_linear(nn.Linear(24, 48), "fp8_e4m3fn_fast"), "K=24"),
        (lambda: SlabLinear.from_linear(linear(), "fp8_e5m2_fast"), "'fp8_e5m2_fast': a slab"),
        (lambda: SlabLinear.from_linear(linear(), "fp8_e4m3fn"), "'fp8_e4m3fn': a slab"),
        (lambda: fp8(E5M2, 1, "fp8_e4m3fn"), "weight is torch.float8_e5m2: recipe 'fp8_e4m3fn'"),
        (lambda: fp8(E4M3, 0, "fp8_e4m3fn_scaled"), "'fp8_e4m3fn_scaled' needs a weight_scale"),
        (lambda: fp8(E4M3, 3, "fp8_e4m3fn_scaled"), r"weight_scale has shape \(3,\)"),
        (lambda: fp8(E4M3, 3, "fp8_e4m3fn_rowwise_fast"), r"\(3,\): use \(48, 1\), one for every"),
        (
            lambda: fp8(E4M3, 1, "fp8_e4m3fn_rowwise_fast").set_input_scale(torch.ones(())),
            "scales activations by what they are: it has no input_scale",
        ),
        (lambda: fp8(E4M3, 1, "fp4_scaled"), "'fp4_scaled' is FP4: use Fp4Linear"),
        (lambda: fp8(E4M3, 1, "fp8_e4m3fn").set_input_scale(torch.ones(())), "no input_scale"),
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


@pytest.mark.parametrize("recipe", RECIPES)
def test_compiled_linears_are_clean_and_equal(recipe):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32, bias=False)).bfloat16()
    quantize_(model, recipe)
    x = torch.randn(2, 5, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        compiled = torch.compile(
            model, backend="contig_safe", fullgraph=True, options={"inner": "aot_eager"}
        )
        assert torch.equal(compiled(x), model(x))
    (report,) = contig_pass.last_reports()
    assert report.clean
    assert report.fixes == ()
    # Both matrices of both products at the least, where there is a scaled product, traced or within
    # an op of ours.
    assert (report.totals.uses >= 4) == RECIPES[recipe].fast


@pytest.mark.parametrize("recipe", RECIPES)
def test_another_token_count_recompiles_nothing(recipe):
    # 20 rows are fewer than N and K, 100 are more: nothing may be chosen by their number.
    layer = quantized(linear(), recipe)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for tokens in (10, 50, 33):
            x = torch.randn(2, tokens, 64, dtype=torch.bfloat16)
            assert torch.equal(compiled(x), layer(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    "recipe", ["fp8_e5m2_scaled", "fp8_e4m3fn_rowwise_fast", "fp4_scaled_fast"]
)
def test_quantised_block_compiles_in_one_graph_to_the_same_values(recipe):
    torch.manual_seed(0)
    block = WanBlock(TINY).bfloat16().eval()
    quantize_(block, recipe)
    assert sum(isinstance(layer, QuantizedLinear) for layer in block.modules()) == 10
    inputs = block_inputs(TINY, (1, 3, 4), dtype=torch.bfloat16)
    with torch.no_grad():
        compiled = torch.compile(
            block, backend="contig_safe", fullgraph=True, options={"inner": "aot_eager"}
        )
        assert torch.equal(compiled(*inputs), block(*inputs))
    (report,) = contig_pass.last_reports()
    assert report.fixes == ()
