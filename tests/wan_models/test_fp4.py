"""NVFP4: its codes, scales and layouts against loops in float64, and the linears made of it."""

import itertools
import math

import pytest
import torch
from torch import nn

from tests.wan_models.float_grid import e2m1, e4m3, nearest_code, rounded
from wan_models.quant import Fp4Linear, Fp8Linear, quantized
from wan_models.quant import fp4 as fp4_module
from wan_models.quant.fp4 import fp4_linear, multiplies_fp4
from wan_models.quant.fp4_ops import FEW_ROWS
from wan_models.quant.nvfp4 import (
    Nvfp4,
    dequantize_nvfp4,
    nvfp4_to_e4m3,
    pack,
    quantize_nvfp4,
    round_to_e2m1,
    swap_halves,
    swizzle_scales,
    unpack,
    unswizzle_scales,
)
from wan_models.quant.recipes import E2M1, E4M3

FP4 = ("fp4_experimental", "fp4_scaled", "fp4_scaled_fast")


def linear(k: int = 64, n: int = 48, *, bias: bool = True, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(k, n, bias=bias).bfloat16()


def value_of(code: int) -> float:
    return -e2m1()[code - 8] if code >= 8 else e2m1()[code]


def reference(x: torch.Tensor, *, scaled: bool) -> tuple[list, list, float]:
    """Codes, block scales and tensor scale of a matrix, element by element in float64."""
    rows = x.double().tolist()
    tensor_scale = 1.0
    if scaled:
        tensor_scale = max(abs(v) for row in rows for v in row) / (448 * 6)
        tensor_scale = torch.tensor(tensor_scale, dtype=torch.float32).double().item()
    codes, scales = [], []
    for row in rows:
        row_codes, row_scales = [], []
        for start in range(0, len(row), 16):
            block = row[start : start + 16]
            wanted = max(abs(v) for v in block) / 6 / tensor_scale
            scale = max(rounded(wanted, e4m3()), 2.0**-9)
            row_scales.append(scale)
            for v in block:
                sign = 8 if math.copysign(1, v) < 0 else 0
                row_codes.append(sign + nearest_code(v / (scale * tensor_scale), e2m1()))
        codes.append(row_codes)
        scales.append(row_scales)
    return codes, scales, tensor_scale


# -- the format ----------------------------------------------------------------------------------


def test_the_eight_values():
    assert e2m1() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def test_rounding_of_every_bf16_value():
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    x = bits.view(torch.bfloat16)
    x = x[~x.isnan()].float()
    got = round_to_e2m1(x).tolist()
    for value, code in zip(x.tolist(), got, strict=True):
        sign = 8 if math.copysign(1, value) < 0 else 0
        assert code == sign + nearest_code(value, e2m1()), value


def test_rounding_around_every_midpoint():
    grid = e2m1()
    middles = torch.tensor([(a + b) / 2 for a, b in itertools.pairwise(grid)])
    below = torch.nextafter(middles, torch.tensor(-1.0))
    above = torch.nextafter(middles, torch.tensor(9.0))
    assert round_to_e2m1(middles).tolist() == [0, 2, 2, 4, 4, 6, 6]
    assert round_to_e2m1(below).tolist() == list(range(7))
    assert round_to_e2m1(above).tolist() == list(range(1, 8))


def test_every_byte_packs_unpacks_and_decodes():
    packed = torch.arange(256, dtype=torch.uint8).view(16, 16)
    codes = unpack(packed)
    assert torch.equal(pack(codes), packed)
    ones = Nvfp4(packed, torch.ones(16, 2).to(E4M3), torch.ones(()))
    got = dequantize_nvfp4(ones).tolist()
    for row in range(16):
        for byte in range(16):
            low, high = value_of(byte), value_of(row)  # byte value is 16 * row + byte
            assert codes[row, 2 * byte : 2 * byte + 2].tolist() == [byte, row]
            assert got[row][2 * byte : 2 * byte + 2] == [low, high]
    swapped = unpack(swap_halves(packed)).unflatten(-1, (-1, 2))
    assert torch.equal(swapped, codes.unflatten(-1, (-1, 2)).flip(-1))


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("size", [1e-3, 0.02, 1.0, 300.0])
def test_quantising_agrees_with_the_loop(scaled, size):
    torch.manual_seed(0)
    x = torch.randn(24, 64) * size
    x[3, 16:32] = 0  # a block of zeros
    x[5, 5] = 40 * size  # an outlier
    codes, scales, tensor_scale = reference(x, scaled=scaled)
    made = quantize_nvfp4(x, scaled=scaled)
    assert made.tensor_scale.dtype == torch.float32
    assert made.tensor_scale.item() == tensor_scale
    assert made.block_scale.float().tolist() == scales
    assert unpack(made.packed).tolist() == codes
    values = torch.tensor(codes, dtype=torch.int64).apply_(lambda c: int(2 * value_of(c))) / 2.0
    step = torch.tensor(scales, dtype=torch.float64).repeat_interleave(16, 1) * tensor_scale
    torch.testing.assert_close(
        dequantize_nvfp4(made).double(), values.double() * step, rtol=1e-6, atol=0
    )


def test_only_a_tensor_scale_keeps_the_precision_of_small_weights():
    torch.manual_seed(0)
    x = torch.randn(64, 256) * 1e-3
    error = {
        scaled: ((dequantize_nvfp4(quantize_nvfp4(x, scaled=scaled)) - x).norm() / x.norm()).item()
        for scaled in (True, False)
    }
    assert error[True] < 0.1  # measured 0.095
    assert error[False] > 2 * error[True]


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30])
def test_constant_weights_of_any_size_stay_finite(value):
    x = torch.full((4, 32), value)
    torch.testing.assert_close(dequantize_nvfp4(quantize_nvfp4(x)), x, rtol=1e-6, atol=0)


def test_nan_is_not_lost():
    x = torch.ones(2, 32)
    x[1, 3] = math.nan
    assert dequantize_nvfp4(quantize_nvfp4(x)).isnan().any()


def test_conversion_to_e4m3_agrees_with_the_loop():
    torch.manual_seed(0)
    made = quantize_nvfp4(torch.randn(8, 64))
    weight, scale = nvfp4_to_e4m3(made)
    assert weight.dtype == E4M3
    assert scale.item() == 8 * made.tensor_scale.item()
    blocks = made.block_scale.float().tolist()
    for row, codes in enumerate(unpack(made.packed).tolist()):
        for column, code in enumerate(codes):
            eighth = value_of(code) * blocks[row][column // 16] / 8
            assert weight[row, column].item() == rounded(eighth, e4m3())


@pytest.mark.parametrize("shape", [(128, 4), (1, 1), (48, 4), (130, 5), (300, 12)])
def test_swizzled_scales_lie_where_cublas_reads_them(shape):
    rows, columns = shape
    scales = torch.arange(rows * columns).remainder(127).to(torch.uint8).view(shape)
    swizzled = swizzle_scales(scales.view(E4M3)).view(torch.uint8).tolist()
    column_tiles = math.ceil(columns / 4)
    assert len(swizzled) == math.ceil(rows / 128) * 128 * column_tiles * 4
    seen = 0
    for r in range(rows):
        for c in range(columns):
            tile = (r // 128) * column_tiles + c // 4
            place = tile * 512 + (r % 32) * 16 + (r % 128) // 32 * 4 + c % 4
            assert swizzled[place] == scales[r, c]
            seen += swizzled[place]
    assert sum(swizzled) == seen  # all else is padding with 0
    back = unswizzle_scales(swizzle_scales(scales.view(E4M3)), shape)
    assert torch.equal(back.view(torch.uint8), scales)
    with pytest.raises(ValueError, match=f"{rows} rows of {columns + 4} need"):
        unswizzle_scales(swizzle_scales(scales.view(E4M3)), (rows, columns + 4))


# -- the linears ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("recipe", FP4)
def test_value_is_that_of_the_quantised_operands(recipe, bias, tokens):
    fp4 = quantized(linear(bias=bias), recipe)
    assert isinstance(fp4, Fp4Linear)
    x = torch.randn(tokens, 64, dtype=torch.bfloat16)
    codes, blocks = unpack(fp4.weight).tolist(), fp4.weight_scale.double().tolist()
    tensor_scale = fp4.weight_scale_2.item()
    rows = x.double().tolist()
    expected = torch.zeros(tokens, 48, dtype=torch.float64)
    for m, n in itertools.product(range(tokens), range(48)):
        step = max(map(abs, rows[m])) / 448
        total = 0.0
        for k in range(64):
            weight = value_of(codes[n][k]) * blocks[n][k // 16]
            if fp4.fast and tokens > FEW_ROWS:  # 8 bits on both sides; x by row
                total += step * rounded(rows[m][k] / step, e4m3()) * rounded(weight / 8, e4m3()) * 8
            else:
                total += rows[m][k] * weight
        expected[m, n] = total * tensor_scale + (fp4.bias[n].item() if bias else 0)
    # bf16 keeps 8 bits; a dequantised weight is rounded to it as well.
    torch.testing.assert_close(fp4(x).double(), expected, rtol=2**-8, atol=2**-8)


@pytest.mark.parametrize("recipe", FP4)
def test_half_the_memory_of_fp8_plus_scales(recipe):
    layer = linear(256, 128)
    fp4, fp8 = quantized(layer, recipe), quantized(layer, "fp8_e4m3fn_scaled")
    sizes = {name: t.numel() * t.element_size() for name, t in fp4.state_dict().items()}
    assert sizes == {
        "weight": fp8.weight.numel() // 2,
        "weight_scale": 256 * 128 // 16,
        "weight_scale_2": 4,
        "bias": 2 * 128,
    }
    assert fp4.weight_scale_2.item() == 1 or recipe != "fp4_experimental"


@pytest.mark.parametrize("recipe", FP4)
def test_state_survives_a_file_and_any_cast(recipe, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    fp4 = quantized(linear(), recipe)
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    before = fp4(x)
    safetensors.save_file(fp4.state_dict(), tmp_path / "layer.safetensors")
    other = quantized(linear(seed=1), recipe)
    other.load_state_dict(safetensors.load_file(tmp_path / "layer.safetensors"))
    assert torch.equal(other(x), before)
    for cast in (torch.float16, torch.float64, torch.bfloat16):
        other.to(cast)
        assert other.weight.dtype == torch.uint8
        assert other.weight_scale.dtype == E4M3
        assert other.weight_scale_2.dtype == torch.float32
        assert torch.equal(other(x), before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantized(nn.Linear(24, 48), "fp4_scaled"), "K=24 is not a multiple of 16"),
        (lambda: quantized(nn.Linear(64, 40), "fp4_scaled_fast"), "N=40 is not a multiple of 16"),
        (lambda: Fp4Linear.from_linear(linear(), "fp8_e5m2"), "'fp8_e5m2' is FP8: use Fp8Linear"),
        (lambda: Fp8Linear.from_linear(linear(), "fp4_scaled"), "'fp4_scaled' is FP4"),
        (
            lambda: Fp4Linear(torch.zeros(4, 12, dtype=torch.uint8), None, None, None),
            r"\(4, 12\): use uint8",
        ),
        (
            lambda: Fp4Linear(torch.zeros(4, 8, dtype=torch.uint8), torch.ones(4, 2), None, None),
            r"weight_scale is torch.float32 of shape \(4, 2\)",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_n_of_any_size_where_the_weight_is_dequantised():
    assert quantized(nn.Linear(64, 41), "fp4_scaled")(torch.randn(3, 64)).shape == (3, 41)


# -- the native product --------------------------------------------------------------------------


def test_only_nvidia_from_capability_10_on_multiplies_fp4(monkeypatch):
    class Properties:
        major = 9

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    gpu = torch.device("cuda:0")
    assert not multiplies_fp4(torch.device("cpu"))
    assert not multiplies_fp4(gpu)
    Properties.major = 12
    assert multiplies_fp4(gpu)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not multiplies_fp4(gpu)


@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 3, 64), (2, 0, 64)])
def test_torch_accepts_what_the_native_product_is_given(shape, monkeypatch):
    # Meta tensors go through torch's own checks of types, strides, sizes and swizzles.
    monkeypatch.setattr(fp4_module, "multiplies_fp4", lambda device: True)
    layer = quantized(linear().to("meta"), "fp4_scaled_fast")
    out = layer(torch.empty(shape, dtype=torch.bfloat16, device="meta"))
    assert out.shape == (*shape[:-1], 48)
    assert out.dtype == torch.bfloat16


def test_what_the_native_product_is_given_means_the_right_values(monkeypatch):
    given = {}

    def scaled_mm(a, b, **options):
        given.update(options, a=a, b=b)
        return torch.zeros(a.shape[0], b.shape[1], dtype=options["output_dtype"])

    monkeypatch.setattr(torch.nn.functional, "scaled_mm", scaled_mm)
    layer = quantized(linear(96, 48), "fp4_scaled_fast")
    x = torch.randn(2, 5, 96, dtype=torch.bfloat16)
    out = fp4_linear(x, layer.stored(), layer.bias)
    assert torch.equal(out, layer.bias.expand(2, 5, 48))
    assert given["a"].dtype == given["b"].dtype == E2M1
    assert given["a"].shape == (10, 48)
    assert given["b"].shape == (48, 48)
    assert given["b"].stride() == (1, 48)
    activations = quantize_nvfp4(x.view(10, 96))
    for operand, side, made in (
        (given["a"], "a", activations), (given["b"].t(), "b", layer.stored())
    ):
        assert torch.equal(operand.view(torch.uint8), made.packed)
        blocks, tensor_scale = given[f"scale_{side}"]
        shape = (made.packed.shape[0], 6)
        assert torch.equal(unswizzle_scales(blocks, shape).float(), made.block_scale.float())
        assert tensor_scale is made.tensor_scale or torch.equal(tensor_scale, made.tensor_scale)
        assert [int(r.value) for r in given[f"scale_recipe_{side}"]] == [2, 0]
        assert [int(s.value) for s in given[f"swizzle_{side}"]] == [1, 0]


def test_k_that_the_native_product_refuses_goes_by_e4m3(monkeypatch):
    layer = quantized(linear(48, 48), "fp4_scaled_fast")
    x = torch.randn(3, 48, dtype=torch.bfloat16)
    before = layer(x)
    monkeypatch.setattr(fp4_module, "multiplies_fp4", lambda device: True)
    assert torch.equal(layer(x), before)
