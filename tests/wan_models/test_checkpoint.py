"""Whole checkpoints: exact round trips, names in each naming, saving, the variant of a file."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.wan_models.checkpoint_files import (
    PATH,
    RECIPES,
    SMALL,
    empty_model,
    layer,
    quantised_model,
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
