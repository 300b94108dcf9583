"""Namings and quantised forms: exact round trips, and files as other programs write them."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.wan_models.checkpoint_files import (
    SMALL,
    empty_model,
    raw,
    read,
    same,
    small_model,
    write,
)
from wan_models import CONFIGS, addons, zoo
from wan_models.block_swap import BlockSwap
from wan_models.checkpoint import NAMINGS, CheckpointError, detect, load, save, variant
from wan_models.quant import attach_lora, detach_lora, quantize_
from wan_models.quant.nvfp4 import quantize_nvfp4

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
RECIPES = (
    None,
    "fp8_e4m3fn",
    "fp8_e5m2",
    "fp8_e4m3fn_scaled",
    "fp8_e4m3fn_scaled_fast",
    "fp8_e4m3fn_dynamic_fast",
    "fp8_e5m2_scaled_fast",
    "fp4_experimental",
    "fp4_scaled",
    "fp4_scaled_fast",
)
#: The layer that files written here are about; not square, so that no mistake goes unseen.
PATH = "blocks.1.ffn.0"
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def quantised_model(recipe: str | None, config=SMALL):
    made = small_model(config)
    if recipe is not None:
        quantize_(made, recipe, ["time_embedding.*"])
    return made


def layer(made: nn.Module) -> nn.Module:
    return made.get_submodule(PATH)


def plain_tensors(**parts: torch.Tensor) -> dict[str, torch.Tensor]:
    """A whole file with official names; ``parts`` replace and add parts of the one layer."""
    tensors = {name: tensor.clone() for name, tensor in small_model().state_dict().items()}
    return tensors | {f"{PATH}.{part}": tensor for part, tensor in parts.items()}


def fp8(weight: torch.Tensor, dtype=E4M3, scale: float = 0.01) -> torch.Tensor:
    return (weight.double() / scale).float().to(dtype)


# -- round trips -------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("naming", NAMINGS)
def test_round_trips_are_exact(naming, recipe, tmp_path):
    made = quantised_model(recipe)
    file = tmp_path / "model.safetensors"
    prefix = "model.diffusion_model." if naming.startswith("comfyui") else ""
    if recipe is not None and "fp4" in recipe and naming in ("comfyui_old", "lightx2v"):
        with pytest.raises(ValueError, match=f"naming='{naming}' has no form for {recipe}: use"):
            save(made, file, naming=naming)
        assert not list(tmp_path.iterdir())
        return
    save(made, file, naming=naming, prefix=prefix)
    assert detect(file) == (naming, prefix, recipe)
    loaded = empty_model()
    report = load(loaded, file, device="cpu")
    same(loaded, made)
    assert (report.model, report.naming, report.prefix) == (loaded, naming, prefix)
    assert report.repaired + report.quantised + report.requantised + report.unused == ()
    assert bool(report.replaced) == (recipe is not None)
    again = tmp_path / "again.safetensors"
    save(loaded, again, naming=naming, prefix=prefix)
    assert again.read_bytes() == file.read_bytes()


@pytest.mark.parametrize("name", ["i2v-14b", "flf2v-14b", "vace-14b", "ti2v-5b"])
@pytest.mark.parametrize("naming", ["official", "diffusers"])
def test_every_variant(name, naming, tmp_path):
    sizes = {"dim": 128, "ffn_dim": 256, "num_heads": 1, "text_dim": 32, "text_len": 8}
    config = replace(CONFIGS[name].tiny(), **sizes)
    made = small_model(config)
    file = tmp_path / "model.safetensors"
    save(made, file, naming=naming)
    report = load(config, file, device="cpu")
    same(report.model, made)
    assert not any(tensor.is_meta for tensor in report.model.state_dict().values())


@pytest.mark.parametrize("name", ["t2v-14b", "i2v-a14b", "vace-1.3b", "mtvcrafter-14b"])
@pytest.mark.parametrize("quantization", [None, "fp8_e4m3fn_scaled_fast", "fp4_scaled_fast"])
def test_models_of_the_zoo(name, quantization, tmp_path):
    """What stays in high precision on saving is not quantised on loading either."""
    made = zoo.build(name, size="tiny", quantization=quantization)
    save(made, tmp_path / "model.safetensors", naming="comfyui", prefix="model.diffusion_model.")
    with torch.device("meta"):
        plain = zoo.build(name, size="tiny")
    load(plain, tmp_path / "model.safetensors", device="cpu")
    same(plain, made)


@pytest.mark.parametrize("addon", addons.NAMES)
def test_every_add_on(addon, tmp_path):
    config = SMALL if addon in ("humo", "ovi") else replace(SMALL, in_channels=36, image_dim=64)
    made, loaded = small_model(config), empty_model(config)
    for each in (made, loaded):
        addons.attach(each, addon)
        for big in ("audio_proj", "multitalk_audio_proj"):
            each._modules.pop(big, None)
    save(made, tmp_path / "model.safetensors", naming="diffusers")
    load(loaded, tmp_path / "model.safetensors", device="cpu")
    same(loaded, made)


@pytest.mark.parametrize("naming", NAMINGS)
def test_the_format_s_own_library_reads_what_is_saved(naming, tmp_path):
    library = pytest.importorskip("safetensors.torch")
    made = quantised_model("fp8_e4m3fn_scaled")
    file = tmp_path / "model.safetensors"
    save(made, file, naming=naming)
    for name, tensor in library.load_file(file).items():
        kind, shape, content = read(file)[name]
        assert (tuple(tensor.shape), raw(tensor)) == (shape, content), (name, kind)


def test_big_tensors_are_saved_at_aligned_places(tmp_path):
    file = tmp_path / "model.safetensors"
    save(quantised_model("fp8_e4m3fn_scaled"), file)
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__")
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        if (last - first) % 64 == 0:
            assert (start + first) % 64 == 0, name


# -- names -------------------------------------------------------------------------------------


def test_names_in_each_naming(tmp_path):
    made = quantised_model("fp8_e4m3fn_scaled_fast")
    parts = {
        "official": {"blocks.1.ffn.0.weight", "blocks.1.ffn.0.bias", "blocks.1.ffn.0.weight_scale"},
        "diffusers": {f"blocks.1.ffn.net.0.proj.{part}"
                      for part in ("weight", "bias", "weight_scale")},
        "comfyui_old": {f"blocks.1.ffn.0.{part}" for part in ("weight", "bias", "scale_weight")},
        "comfyui": {f"blocks.1.ffn.0.{part}"
                    for part in ("weight", "bias", "weight_scale", "comfy_quant")},
        "lightx2v": {f"blocks.1.ffn.0.{part}" for part in ("weight", "bias", "weight_scale")},
    }
    for naming, expected in parts.items():
        file = tmp_path / f"{naming}.safetensors"
        save(made, file, naming=naming)
        tensors = read(file)
        stem = "blocks.1.ffn.net.0." if naming == "diffusers" else "blocks.1.ffn.0."
        assert {name for name in tensors if name.startswith(stem)} == expected
        assert ("scaled_fp8" in tensors) == (naming == "comfyui_old")
        scale = "blocks.1.ffn.0.weight_scale"
        if naming == "lightx2v":
            assert tensors[scale][:2] == ("F32", (256, 1))
    assert json.loads(read(tmp_path / "comfyui.safetensors")[f"{PATH}.comfy_quant"][2]) == {
        "format": "float8_e4m3fn"
    }


@pytest.mark.parametrize("image", [False, True])
def test_files_of_diffusers_itself(image, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    library = pytest.importorskip("safetensors.torch")
    extra = {"image_dim": 64, "added_kv_proj_dim": 128, "pos_embed_seq_len": 514} if image else {}
    config = replace(SMALL, text_len=512)
    if image:
        config = replace(config, in_channels=36, image_dim=64, images=2)
    torch.manual_seed(0)
    theirs = diffusers.WanTransformer3DModel(
        num_attention_heads=1, attention_head_dim=128, in_channels=config.in_channels,
        out_channels=16, text_dim=32, freq_dim=64, ffn_dim=256, num_layers=2, **extra,
    ).eval()
    for parameter in theirs.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    library.save_file(theirs.state_dict(), file)
    assert detect(file) == ("diffusers", "", None)
    ours = load(config, file, device="cpu").model.eval()
    latents = torch.randn(1, config.in_channels, 2, 4, 6)
    context, states = torch.randn(1, 512, 32), torch.randn(1, 514, 64) if image else None
    with torch.no_grad():
        # Theirs takes the two images one after the other along the batch.
        images = states.view(2, 257, 64) if image else None
        expected = theirs(latents, torch.tensor([500.0]), context, images, return_dict=False)[0]
        got = ours(latents, torch.tensor([500.0]), context, states)
    assert (got - expected).norm() / expected.norm() < 1e-4
    again = tmp_path / "again.safetensors"
    save(ours, again, naming="diffusers")
    assert read(again) == read(file)

    unfused = theirs.state_dict()
    for i in range(2):
        for attention in (theirs.blocks[i].attn1, theirs.blocks[i].attn2):
            attention.fuse_projections()
    both = theirs.state_dict()
    library.save_file(both, file)
    report = load(config, file, device="cpu")
    same(report.model, ours)
    assert {name.rpartition(".")[0] for name in report.unused} == {
        f"blocks.{i}.{fused}" for i in range(2)
        for fused in ("attn1.to_qkv", "attn2.to_kv", *(("attn2.to_added_kv",) if image else ()))
    }
    parts = ("attn1.to_q.", "attn1.to_k.", "attn1.to_v.", "attn2.to_k.", "attn2.to_v.",
             "add_k_proj", "add_v_proj")
    only = {name: t for name, t in both.items() if not any(part in name for part in parts)}
    assert len(only) < len(unfused)
    library.save_file(only, file)
    same(load(config, file, device="cpu").model, ours)


def test_vace_names_are_those_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    from wan_models.checkpoint import naming

    config = replace(SMALL, num_layers=3, vace_layers=(0, 2))
    with torch.device("meta"):
        theirs = diffusers.WanVACETransformer3DModel(
            num_attention_heads=1, attention_head_dim=128, in_channels=16, out_channels=16,
            text_dim=32, freq_dim=64, ffn_dim=256, num_layers=3, vace_layers=[0, 2],
            vace_in_channels=96,
        )
    ours = empty_model(config).state_dict()
    assert {naming.diffusers(name) for name in ours} == theirs.state_dict().keys()
    assert {naming.official(name) for name in theirs.state_dict()} == ours.keys()
    for name, tensor in theirs.state_dict().items():
        assert ours[naming.official(name)].shape == tensor.shape, name


@pytest.mark.parametrize("prefix", ["", "model.", "diffusion_model.", "model.diffusion_model."])
@pytest.mark.parametrize("compiled", [False, True])
def test_prefixes_and_compiled_blocks(prefix, compiled, tmp_path):
    def named(name: str) -> str:
        if compiled and name.startswith("blocks."):
            number, rest = name.removeprefix("blocks.").split(".", 1)
            name = f"blocks.{number}._orig_mod.{rest}"
        return prefix + name

    made = small_model()
    tensors = {named(name): tensor for name, tensor in made.state_dict().items()}
    file = write(tmp_path / "model.safetensors", tensors)
    assert detect(file) == ("official", prefix, None)
    loaded = empty_model()
    if compiled:
        for i, each in enumerate(loaded.blocks):
            loaded.blocks[i] = torch.compile(each, backend="eager")
    load(loaded, file, device="cpu")
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, made.state_dict()[name.replace("_orig_mod.", "")]), name
    save(loaded, tmp_path / "again.safetensors")
    assert read(tmp_path / "again.safetensors").keys() == made.state_dict().keys()


def test_naming_and_prefix_can_be_given(tmp_path):
    made = small_model()
    other = {f"unet.{name}": tensor for name, tensor in made.state_dict().items()}
    file = write(tmp_path / "model.safetensors", other)
    with pytest.raises(CheckpointError, match=r"format names \(no Wan model's: unet\.blocks\.0"):
        detect(file)
    loaded = empty_model()
    load(loaded, file, device="cpu", naming="official", prefix="unet.")
    same(loaded, made)
    with pytest.raises(ValueError, match="naming='gguf': use one of 'official', 'diffusers'"):
        load(loaded, file, device="cpu", naming="gguf")
    with pytest.raises(ValueError, match="naming='gguf': use one of"):
        save(made, file, naming="gguf")


def test_add_on_files_under_their_own_names(tmp_path):
    config = replace(SMALL, in_channels=36, image_dim=64)
    made, loaded = small_model(config), empty_model(config)
    for each in (made, loaded):
        addons.attach(each, "fantasyportrait")
        with torch.device(each.head.modulation.device):  # the real one has 60 million weights
            each.multitalk_audio_proj = nn.ModuleDict(
                {"proj1": nn.Linear(8, 4), "norm": nn.LayerNorm(4)}
            ).bfloat16()
    state = made.state_dict()
    theirs = {
        name.replace("multitalk_audio_proj", "audio_proj").replace(
            "ip_adapter_single_stream_k_proj", "emo_k_proj"
        ): tensor
        for name, tensor in state.items()
    }
    assert len(theirs.keys() - state.keys()) == 4 + 2
    load(loaded, write(tmp_path / "model.safetensors", theirs), device="cpu")
    same(loaded, made)


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


# -- saving ------------------------------------------------------------------------------------


def test_one_old_marker_cannot_stand_for_two_recipes(tmp_path):
    made = small_model()
    quantize_(made.blocks[0], "fp8_e4m3fn_scaled")
    quantize_(made.blocks[1], "fp8_e4m3fn_scaled_fast")
    with pytest.raises(ValueError, match="marks a whole file by one recipe, not fp8_e4m3fn_scaled"):
        save(made, tmp_path / "m.safetensors", naming="comfyui_old")
    for naming in ("official", "diffusers", "comfyui", "lightx2v"):
        save(made, tmp_path / "m.safetensors", naming=naming)
        found = detect(tmp_path / "m.safetensors")
        assert found.quantisation == "fp8_e4m3fn_scaled, fp8_e4m3fn_scaled_fast"
        same(load(empty_model(), tmp_path / "m.safetensors", device="cpu").model, made)


def test_saving_over_the_file_that_a_model_is_mapped_from(tmp_path):
    made = small_model()
    file = tmp_path / "m.safetensors"
    save(made, file)
    loaded = load(empty_model(), file, device="cpu").model
    save(loaded, file, naming="diffusers")
    same(loaded, made)
    same(load(empty_model(), file, device="cpu").model, made)
    assert [each.name for each in tmp_path.iterdir()] == ["m.safetensors"]


def test_a_model_without_values_or_with_loras_is_not_saved(tmp_path):
    file = tmp_path / "m.safetensors"
    with pytest.raises(ValueError, match="is on the meta device and has no values"):
        save(empty_model(), file)
    made = small_model()
    attach_lora(layer(made), torch.zeros(2, 128), torch.zeros(256, 2))
    with pytest.raises(ValueError, match=r"blocks\.1\.ffn\.0 has unmerged LoRAs"):
        save(made, file)
    assert not list(tmp_path.iterdir())
    detach_lora(made)
    save(made, file)


def test_loras_stay_on_what_is_loaded(tmp_path):
    made = quantised_model("fp8_e4m3fn_scaled")
    save(made, tmp_path / "m.safetensors")
    loaded = small_model()
    down, up = torch.randn(2, 128), torch.randn(256, 2)
    for each in (made, loaded):
        attach_lora(layer(each), down, up, strength=0.5)
    load(loaded, tmp_path / "m.safetensors", device="cpu")
    x = torch.randn(3, 128).bfloat16()
    assert torch.equal(layer(loaded)(x), layer(made)(x))
    same(loaded, made)


@pytest.mark.parametrize("recipe", [None, "fp8_e4m3fn_scaled"])
def test_saving_and_loading_with_blocks_swapped(recipe, tmp_path):
    made = quantised_model(recipe)
    save(made, tmp_path / "one.safetensors")
    with BlockSwap(made, 2, "cpu"):
        save(made, tmp_path / "two.safetensors")
    assert read(tmp_path / "one.safetensors") == read(tmp_path / "two.safetensors")
    loaded = empty_model()
    swapped = BlockSwap(loaded, 1, "cpu")
    load(loaded, tmp_path / "one.safetensors", device=swapped.device_of)
    with swapped:
        assert loaded.state_dict().keys() == made.state_dict().keys()
    same(loaded, made)


# -- detection ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "tiny"])
@pytest.mark.parametrize("naming", ["official", "diffusers"])
def test_the_variant_of_a_file(name, naming, tmp_path):
    from wan_models.checkpoint.naming import diffusers

    config = CONFIGS[name]
    vace = config.vace_layers
    shapes = {"patch_embedding.weight": (config.dim, config.in_channels, 1, 2, 2)}
    shapes["blocks.0.cross_attn.k.weight"] = (config.dim, config.dim)
    if config.image_dim:
        shapes["blocks.0.cross_attn.k_img.weight"] = (config.dim, config.dim)
    if config.image_dim and config.images > 1:
        shapes["img_emb.emb_pos"] = (1, 514, 1280)
    if vace:
        shapes["vace_patch_embedding.weight"] = (config.dim, 96, 1, 2, 2)
    rename = diffusers if naming == "diffusers" else str
    # Only the header matters: bytes that are not there cost no disk.
    header, end = {}, 0
    for tensor, shape in shapes.items():
        size = 2 * torch.empty(shape, device="meta").numel()
        entry = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        header[rename(tensor)] = entry
        end += size
    text = json.dumps(header).encode()
    file = tmp_path / "m.safetensors"
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + end)
    expected = {"t2v-a14b": "t2v-14b"}.get(name, name)
    assert variant(file) == expected


def test_an_unknown_variant(tmp_path):
    save(small_model(), tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"is none of t2v-1\.3b, .* \[128, 16, 1, 2, 2\]"):
        variant(tmp_path / "m.safetensors")


def test_a_copy_of_the_model_is_not_touched(tmp_path):
    made = small_model()
    save(made, tmp_path / "m.safetensors")
    loaded = small_model()
    before = copy.deepcopy(loaded)
    kept = loaded.blocks[0].ffn[0].weight
    load(loaded, tmp_path / "m.safetensors", device="cpu", dtype=torch.float32)
    assert loaded.blocks[0].ffn[0].weight is not kept
    assert torch.equal(kept, before.blocks[0].ffn[0].weight)
