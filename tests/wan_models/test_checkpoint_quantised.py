"""Quantised checkpoints: files as other programs write them, and loading in another form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.wan_models.checkpoint_files import (
    PATH,
    RECIPES,
    empty_model,
    layer,
    quantised_model,
    raw,
    read,
    same,
    small_model,
    write,
)
from wan_models.checkpoint import CheckpointError, detect, load, save
from wan_models.quant import quantize_
from wan_models.quant.nvfp4 import quantize_nvfp4

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def plain_tensors(**parts: torch.Tensor) -> dict[str, torch.Tensor]:
    """A whole file with official names; ``parts`` replace and add parts of the one layer."""
    tensors = {name: tensor.clone() for name, tensor in small_model().state_dict().items()}
    return tensors | {f"{PATH}.{part}": tensor for part, tensor in parts.items()}


def fp8(weight: torch.Tensor, dtype=E4M3, scale: float = 0.01) -> torch.Tensor:
    return (weight.double() / scale).float().to(dtype)


# -- what other programs write -----------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize(
    ("marker", "recipe"),
    [
        (None, "fp8_e4m3fn_scaled_fast"),
        (torch.zeros(0, dtype=E4M3), "fp8_e4m3fn_scaled_fast"),
        (torch.zeros(1, dtype=torch.float32), "fp8_e4m3fn_scaled_fast"),
        (torch.zeros(2, dtype=E4M3), "fp8_e4m3fn_scaled"),
    ],
)
def test_comfyui_s_old_scaled_fp8(marker, recipe, shape, tmp_path):
    weight = layer(small_model()).weight
    parts = {"weight": fp8(weight), "scale_weight": torch.full(shape, 0.01)}
    tensors = plain_tensors(**parts)
    if marker is not None:
        tensors["scaled_fp8"] = marker
    file = write(
        tmp_path / "m.safetensors", {f"model.diffusion_model.{k}": t for k, t in tensors.items()}
    )
    assert detect(file) == ("comfyui_old", "model.diffusion_model.", recipe)
    report = load(empty_model(), file, device="cpu")
    got = layer(report.model)
    assert report.replaced == (PATH,)
    assert (got.recipe, got.weight_scale.shape, got.weight_scale.dtype) == (
        recipe, (), torch.float32
    )
    assert torch.equal(got.dequantised(), parts["weight"].float() * torch.tensor(0.01))
    assert isinstance(report.model.blocks[0].ffn[0], nn.Linear)


def test_the_old_marker_means_e5m2_by_its_type(tmp_path):
    weight = layer(small_model()).weight
    tensors = plain_tensors(weight=fp8(weight, E5M2), scale_weight=torch.tensor(0.01))
    tensors["scaled_fp8"] = torch.zeros(0, dtype=E5M2)
    file = write(tmp_path / "m.safetensors", tensors)
    assert detect(file).quantisation == "fp8_e5m2_scaled_fast"
    tensors["scaled_fp8"] = torch.zeros(0, dtype=E4M3)
    write(file, tensors)
    with pytest.raises(CheckpointError, match=r"dtype .*F8_E5M2: scaled_fp8 says F8_E4"):
        load(empty_model(), file, device="cpu")


@pytest.mark.parametrize("old", [True, False])
def test_input_scales(old, tmp_path):
    made = small_model()
    parts = {"weight": fp8(layer(made).weight)}
    names = ("scale_weight", "scale_input") if old else ("weight_scale", "input_scale")
    parts |= {names[0]: torch.tensor(0.01), names[1]: torch.tensor(0.25)}
    naming = "comfyui_old" if old else "official"
    file = write(tmp_path / "m.safetensors", plain_tensors(**parts))
    report = load(empty_model(), file, device="cpu", naming=naming)
    got = layer(report.model)
    assert got.input_scale == 0.25
    assert report.unused == ()
    x = torch.randn(3, 128).bfloat16()
    rows = (x.float() / 0.25).clamp(-448, 448).to(E4M3).double() * 0.25
    expected = rows @ (parts["weight"].double() * 0.01).t() + layer(made).bias.double()
    torch.testing.assert_close(got(x).double(), expected, rtol=2**-7, atol=2**-7)
    save(report.model, tmp_path / "again.safetensors", naming=naming)
    assert read(tmp_path / "again.safetensors")[f"{PATH}.{names[1]}"] == (
        "F32", (), raw(torch.tensor(0.25))
    )
    dequantising = load(
        empty_model(), file, device="cpu", naming=naming, quantization="fp8_e4m3fn_scaled"
    )
    assert dequantising.unused == (f"{PATH}.{names[1]}",)


@pytest.mark.parametrize("where", ["tensor", "header"])
@pytest.mark.parametrize("full_precision", [False, True])
def test_comfyui_s_newer_fp8(where, full_precision, tmp_path):
    settings = {"format": "float8_e4m3fn"}
    if full_precision:
        settings["full_precision_matrix_mult"] = True
    parts = {"weight": fp8(layer(small_model()).weight), "weight_scale": torch.tensor(0.01)}
    metadata = None
    if where == "tensor":
        text = json.dumps(settings).encode()
        parts["comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    else:
        metadata = {"_quantization_metadata": json.dumps({"layers": {PATH: settings}})}
    file = write(tmp_path / "m.safetensors", plain_tensors(**parts), metadata=metadata)
    recipe = "fp8_e4m3fn_scaled" if full_precision else "fp8_e4m3fn_scaled_fast"
    assert detect(file) == ("comfyui", "", recipe)
    got = layer(load(empty_model(), file, device="cpu").model)
    assert got.recipe == recipe
    assert torch.equal(got.dequantised(), parts["weight"].float() * torch.tensor(0.01))


def tiles(scales: list[list[float]]) -> torch.Tensor:
    """Block scales in cuBLAS's order, written as its documentation puts it, one by one."""
    rows, columns = -(-len(scales) // 128) * 128, -(-len(scales[0]) // 4) * 4
    out = torch.zeros(rows * columns)
    for r, row in enumerate(scales):
        for c, value in enumerate(row):
            tile = (r // 128) * (columns // 4) + c // 4
            out[tile * 512 + (r % 32) * 16 + (r % 128) // 32 * 4 + c % 4] = value
    return out.view(rows, columns).to(E4M3)


@pytest.mark.parametrize("comfyui", [True, False])
def test_nvfp4_values_of_files_packed_by_hand(comfyui, tmp_path):
    rows, columns = 256, 128
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (rows, columns), generator=generator).tolist()
    scales = (torch.rand(rows, columns // 16, generator=generator) * 8 + 0.1).to(E4M3)
    tensor_scale = 0.0123
    expected = torch.tensor([
        [(-1.0) ** (code >> 3) * E2M1[code & 7] * scales[r, c // 16].item() * tensor_scale
         for c, code in enumerate(row)]
        for r, row in enumerate(codes)
    ])
    first, second = (4, 0) if comfyui else (0, 4)  # ComfyUI: the first value in the high half
    packed = torch.tensor([
        [row[i] << first | row[i + 1] << second for i in range(0, columns, 2)] for row in codes
    ], dtype=torch.uint8)
    parts = {
        "weight": packed,
        "weight_scale": tiles(scales.float().tolist()) if comfyui else scales,
        "weight_scale_2": torch.tensor(tensor_scale),
    }
    if comfyui:
        parts["comfy_quant"] = torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
    file = write(tmp_path / "m.safetensors", plain_tensors(**parts))
    naming = "comfyui" if comfyui else "official"
    assert detect(file) == (naming, "", "fp4_scaled_fast")
    report = load(empty_model(), file, device="cpu")
    got = layer(report.model)
    torch.testing.assert_close(got.dequantised(), expected, rtol=1e-6, atol=0)
    save(report.model, tmp_path / "again.safetensors", naming=naming)
    again = read(tmp_path / "again.safetensors")
    for part, tensor in parts.items():
        assert again[f"{PATH}.{part}"][2] == raw(tensor), part


@pytest.mark.parametrize("rows_of_scales", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_lightx2v(rows_of_scales, transposed, tmp_path):
    """One number in all, or repeated for every row; weights as (K, N) or not, square ones too."""
    made = small_model()
    square = "blocks.0.self_attn.q"
    tensors, weights = plain_tensors(), {}
    for path in (PATH, square):
        weights[path] = fp8(made.get_submodule(path).weight)
        stored = weights[path].t() if transposed else weights[path]
        count = (weights[path].shape[0], 1) if rows_of_scales else ()
        tensors[f"{path}.weight"] = stored.clone(memory_format=torch.contiguous_format)
        tensors[f"{path}.weight_scale"] = torch.full(count, 0.01)
    file = write(tmp_path / "m.safetensors", tensors)
    found = detect(file)
    assert found.naming == ("lightx2v" if rows_of_scales or transposed else "official")
    report = load(empty_model(), file, device="cpu", naming="lightx2v")
    assert set(report.transposed) == ({f"{p}.weight" for p in weights} if transposed else set())
    for path, weight in weights.items():
        got = report.model.get_submodule(path)
        assert torch.equal(got.weight.float(), weight.float())
        assert got.weight.stride() == (weight.shape[1], 1)
        assert got.weight_scale.shape == ()
    save(report.model, tmp_path / "again.safetensors", naming="lightx2v")
    same(load(empty_model(), tmp_path / "again.safetensors", device="cpu").model, report.model)


def rows_file(made: nn.Module, path: Path, **parts: torch.Tensor) -> tuple[Path, torch.Tensor]:
    """A file in which one layer has a scale a row, and the weight that it stands for."""
    scales = torch.rand(256, 1) * 0.01 + 0.005
    weight = (layer(made).weight.float() / scales).to(E4M3)
    tensors = plain_tensors(weight=weight, weight_scale=scales, **parts)
    return write(path / "m.safetensors", tensors), weight.float() * scales


def test_a_scale_a_row_loads_as_it_is(tmp_path):
    made = small_model()
    file, exact = rows_file(made, tmp_path)
    assert detect(file) == ("lightx2v", "", "fp8_e4m3fn_rowwise_fast")
    report = load(empty_model(), file, device="cpu")
    assert report.requantised == ()
    again = layer(report.model)
    assert again.recipe == "fp8_e4m3fn_rowwise_fast"
    assert again.weight_scale.shape == (256, 1)
    assert torch.equal(again.dequantised(), exact)
    for naming in ("lightx2v", "official"):
        save(report.model, tmp_path / "again.safetensors", naming=naming)
        same(load(empty_model(), tmp_path / "again.safetensors", device="cpu").model, report.model)
    for naming in ("comfyui", "comfyui_old"):
        with pytest.raises(ValueError, match="one scale for a weight, fp8_e4m3fn_rowwise_fast one"):
            save(report.model, tmp_path / "no.safetensors", naming=naming)


def test_a_single_scale_stands_for_those_of_all_channels_exactly(tmp_path):
    weight = fp8(layer(small_model()).weight)
    tensors = plain_tensors(
        weight=weight, weight_scale=torch.tensor(0.01), input_scale=torch.tensor(2.0)
    )
    file = write(tmp_path / "m.safetensors", tensors)
    recipe = "fp8_e4m3fn_rowwise_fast"
    report = load(empty_model(), file, device="cpu", quantization=recipe)
    assert report.requantised == ()
    assert report.unused == (f"{PATH}.input_scale",)  # its activations bring their own scales
    got = layer(report.model)
    assert torch.equal(got.weight.view(torch.uint8), weight.view(torch.uint8))
    assert torch.equal(got.weight_scale, torch.full((256, 1), 0.01))


def test_a_scale_a_row_is_never_narrowed_in_silence(tmp_path):
    made = small_model()
    # A weight of e5m2 has no recipe with a scale for every channel.
    scales = torch.rand(256, 1) * 0.01 + 0.005
    weight = (layer(made).weight.float() / scales).to(E5M2)
    file = write(tmp_path / "wide.safetensors", plain_tensors(weight=weight, weight_scale=scales))
    assert detect(file) == ("lightx2v", "", "fp8_e5m2_scaled_fast with a scale a row")
    with pytest.raises(CheckpointError, match=r"format .*0\.weight_scale \(one scale a row"):
        load(empty_model(), file, device="cpu")

    file, exact = rows_file(made, tmp_path)
    report = load(empty_model(), file, device="cpu", quantization=None, dtype=torch.float32)
    assert report.dequantised == (PATH,)
    assert torch.equal(layer(report.model).weight, exact)
    report = load(empty_model(), file, device="cpu", quantization="fp8_e4m3fn_scaled")
    assert report.requantised == (PATH,)
    again = layer(report.model)
    assert (again.dequantised() - exact).norm() / exact.norm() < 0.04
    quantised = empty_model()
    quantize_(quantised, "fp4_scaled", [n for n, m in quantised.named_modules()
                                        if isinstance(m, nn.Linear) and n != PATH])
    report = load(quantised, file, device="cpu")
    assert report.requantised == (PATH,)
    expected = quantize_nvfp4(exact)
    assert torch.equal(layer(quantised).weight, expected.packed)


# -- another form than the file's --------------------------------------------------------------


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe])
def test_a_plain_file_is_quantised_while_loading(recipe, tmp_path):
    made = small_model()
    save(made, tmp_path / "m.safetensors")
    expected = quantised_model(recipe)
    loaded = empty_model()
    quantize_(loaded, recipe, ["time_embedding.*"])
    report = load(loaded, tmp_path / "m.safetensors", device="cpu")
    same(loaded, expected)
    assert len(report.quantised) == sum(hasattr(m, "recipe") for m in expected.modules())
    assert report.replaced == ()


@pytest.mark.parametrize("recipe", ["fp8_e4m3fn", "fp8_e5m2_scaled", "fp4_scaled"])
def test_a_quantised_file_is_dequantised_on_demand(recipe, tmp_path):
    made = quantised_model(recipe)
    save(made, tmp_path / "m.safetensors")
    report = load(
        empty_model(), tmp_path / "m.safetensors", device="cpu", dtype=torch.bfloat16,
        quantization=None,
    )
    assert PATH in report.dequantised
    assert torch.equal(layer(report.model).weight, layer(made).dequantised(torch.bfloat16))
    with pytest.raises(CheckpointError, match="give dtype= to dequantise it"):
        load(empty_model(), tmp_path / "m.safetensors", device="cpu", quantization=None)


def test_another_recipe_of_the_same_form_keeps_the_bits(tmp_path):
    made = quantised_model("fp8_e4m3fn_scaled")
    save(made, tmp_path / "m.safetensors")
    report = load(
        empty_model(), tmp_path / "m.safetensors", device="cpu",
        quantization="fp8_e4m3fn_scaled_fast",
    )
    assert report.requantised == ()
    assert layer(report.model).recipe == "fp8_e4m3fn_scaled_fast"
    assert raw(layer(report.model).weight) == raw(layer(made).weight)
    quantised = empty_model()
    quantize_(quantised, "fp8_e4m3fn_scaled_fast")
    report = load(quantised, tmp_path / "m.safetensors", device="cpu")
    assert "time_embedding.0" in report.quantised
    assert PATH not in report.quantised + report.requantised
    assert raw(layer(quantised).weight) == raw(layer(made).weight)


def test_one_form_is_quantised_anew_as_another(tmp_path):
    made = quantised_model("fp4_scaled")
    save(made, tmp_path / "m.safetensors")
    report = load(
        empty_model(), tmp_path / "m.safetensors", device="cpu", quantization="fp8_e4m3fn_scaled"
    )
    assert PATH in report.requantised
    linear = nn.Linear(128, 256)
    linear.weight.data = layer(made).dequantised()
    holder = nn.ModuleList([linear])
    quantize_(holder, "fp8_e4m3fn_scaled")
    assert raw(layer(report.model).weight) == raw(holder[0].weight)
    with pytest.raises(ValueError, match="quantization 'fp3': use one of"):
        load(empty_model(), tmp_path / "m.safetensors", device="cpu", quantization="fp3")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scales_stay_fp32_whatever_the_type(dtype, tmp_path):
    made = quantised_model("fp8_e4m3fn_scaled")
    save(made, tmp_path / "m.safetensors")
    got = load(empty_model(), tmp_path / "m.safetensors", device="cpu", dtype=dtype).model
    for name, tensor in got.state_dict().items():
        if name.endswith("scale"):
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, made.state_dict()[name])
        elif tensor.dtype != E4M3:
            bias = name.endswith("bias") and hasattr(
                got.get_submodule(name.rpartition(".")[0]), "recipe"
            )
            half = torch.bfloat16 if dtype == torch.float32 else dtype
            assert tensor.dtype == (half if bias else dtype), name
            assert torch.equal(tensor, made.state_dict()[name].to(tensor.dtype)), name


def test_narrow_scales_of_a_file_are_widened_exactly(tmp_path):
    scale = torch.tensor([0.0123]).bfloat16()
    parts = {"weight": fp8(layer(small_model()).weight), "weight_scale": scale}
    file = write(tmp_path / "m.safetensors", plain_tensors(**parts))
    got = layer(load(empty_model(), file, device="cpu").model)
    assert got.weight_scale.dtype == torch.float32
    assert got.weight_scale == scale.float()


def test_unscaled_fp8_widens_what_is_no_linear_weight(tmp_path):
    tensors = plain_tensors()
    for name in ("blocks.0.modulation", "blocks.0.norm3.weight", "blocks.0.ffn.0.weight"):
        tensors[name] = tensors[name].to(E4M3)
    file = write(tmp_path / "m.safetensors", tensors)
    with pytest.raises(CheckpointError) as error:
        load(empty_model(), file, device="cpu")
    assert [(p.kind, p.name) for p in error.value.problems] == [
        ("dtype", "blocks.0.modulation"), ("dtype", "blocks.0.norm3.weight")
    ]
    got = load(empty_model(), file, device="cpu", dtype=torch.bfloat16).model
    assert torch.equal(got.blocks[0].modulation, tensors["blocks.0.modulation"].bfloat16())
    assert got.blocks[0].ffn[0].recipe == "fp8_e4m3fn"
