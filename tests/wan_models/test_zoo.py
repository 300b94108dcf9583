"""Every model by name: structure, sizes, quantisation, what the zoo refuses."""

from __future__ import annotations

import re

import pytest
import torch

from wan_models import CONFIGS, WanModel, model_inputs, token_grid, zoo
from wan_models.quant import RECIPES, QuantizedLinear

#: Billions of parameters of the models with add-ons: blocks times what each gets, and projections.
WITH_ADDONS = {
    "fantasytalking-14b": 16.3949 + 40 * 2 * 5120 * 2048 / 1e9,
    "fantasyportrait-14b": 16.3949 + 40 * 2 * 5120 * 2048 / 1e9,
    "multitalk-14b": 16.3949 + 40 * (2 * 5120**2 + 10240 * 768) / 1e9 + 0.0746,
    "mtvcrafter-14b": 16.3949 + 10 * 4 * 5120**2 / 1e9,
    "humo-14b": 14.2889 + 40 * 2 * (5120**2 + 5120 * 1536) / 1e9 + 0.0391,
    "ovi-5b": 4.9998 + 30 * 2 * 3072**2 / 1e9,
}


def full(name: str, **options: object) -> WanModel:
    with torch.device("meta"):
        return zoo.build(name, **options)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_tiny_models_have_the_structure_of_the_large_ones(name):
    large, small = full(name), zoo.build(name, "tiny")
    assert small.config.head_dim == large.config.head_dim == 128

    def layers(model: WanModel) -> dict[str, set[str]]:
        """Parameter names of each kind of block and of the rest."""
        kinds: dict[str, set[str]] = {}
        for key in model.state_dict():
            found = re.match(r"((?:vace_)?blocks)\.(\d+)\.(.*)", key)
            if found is None:
                kinds.setdefault("top", set()).add(key)
            else:
                kinds.setdefault(f"{found[1]}.{found[2]}", set()).add(found[3])
        return kinds

    def kinds(model: WanModel, stem: str) -> set[frozenset[str]]:
        return {frozenset(v) for k, v in layers(model).items() if k.startswith(stem)}

    assert layers(small)["top"] == layers(large)["top"]
    for stem in ("blocks", "vace_blocks"):
        assert kinds(small, stem) == kinds(large, stem)
    linears = [m for m in small.modules() if isinstance(m, torch.nn.Linear)]
    assert all(m.in_features % 16 == m.out_features % 16 == 0 for m in linears)
    assert sum(p.numel() for p in small.parameters()) < 90e6


@pytest.mark.parametrize("name", zoo.NAMES)
def test_tiny_models_run(name):
    variant = zoo.variant(name, "tiny")
    model = zoo.build(name, "tiny")
    inputs = model_inputs(
        variant.config, (5, 4, 7), dtype=torch.bfloat16, addons=variant.addons
    )
    out = model(*inputs)
    assert out.shape == (1, variant.config.out_channels, 5, 8, 14)
    assert out.dtype == torch.float32
    assert out.isfinite().all()
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", WITH_ADDONS)
def test_parameters_of_models_with_addons(name):
    count = sum(p.numel() for p in full(name).parameters()) / 1e9
    assert count == pytest.approx(WITH_ADDONS[name], abs=0.003)


@pytest.mark.parametrize("name", ["t2v-14b", "ti2v-5b", "vace-14b", "multitalk-14b"])
def test_full_size_models_run_on_the_meta_device(name):
    variant = zoo.variant(name)
    frames, height, width = (121, 704, 1280) if name == "ti2v-5b" else (81, 480, 832)
    grid = token_grid(frames, height, width, vae_stride=variant.config.vae_stride)
    inputs = model_inputs(
        variant.config, grid, dtype=torch.bfloat16, device="meta", addons=variant.addons
    )
    model = full(name)
    out = model(*inputs)
    assert all(p.is_meta for p in model.parameters())
    vae = variant.config.vae_stride
    assert out.shape == (
        1, variant.config.out_channels, grid[0], height // vae[1], width // vae[2]
    )


def quantised_layers(model: WanModel) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, QuantizedLinear)]


@pytest.mark.parametrize("recipe", RECIPES)
def test_quantised_models_keep_the_named_layers(recipe):
    model = zoo.build("multitalk-14b", "tiny", recipe)
    plain = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert plain == {
        "time_embedding.0", "time_embedding.2", "time_projection.1", "text_embedding.0",
        "text_embedding.2", "img_emb.proj.1", "img_emb.proj.3", "multitalk_audio_proj.proj1",
        "multitalk_audio_proj.proj1_vf", "multitalk_audio_proj.proj2", "multitalk_audio_proj.proj3",
    }
    layers = quantised_layers(model)
    assert len(layers) == 2 * (10 + 2 + 3) + 1
    assert {model.get_submodule(name).recipe for name in layers} == {recipe}


@pytest.mark.parametrize("name", ["ti2v-5b", "mtvcrafter-14b", "vace-14b"])
def test_quantised_models_stay_near_the_plain_ones(name):
    variant = zoo.variant(name, "tiny")
    torch.manual_seed(0)
    plain = zoo.build(name, "tiny")
    torch.manual_seed(0)
    model = zoo.build(name, "tiny", "fp8_e4m3fn_scaled")
    inputs = model_inputs(variant.config, (5, 4, 7), addons=variant.addons)
    expected = plain(*inputs)
    error = (model(*inputs) - expected).norm() / expected.norm()
    assert 1e-4 < error < 0.1


def test_full_size_models_are_quantised_on_the_meta_device():
    model = full("t2v-14b", quantization="fp8_e4m3fn_scaled_fast")
    assert len(quantised_layers(model)) == 40 * 10 + 1
    assert all(tensor.is_meta for tensor in model.state_dict().values())


def test_a_quantised_model_compiles_under_contig_safe_to_the_same_values():
    model = zoo.build("t2v-14b", "tiny", "fp8_e4m3fn_scaled_fast")
    inputs = model_inputs(zoo.variant("t2v-14b", "tiny").config, (2, 2, 3), dtype=torch.bfloat16)
    expected = model(*inputs)
    model.compile_blocks(backend="contig_safe", fullgraph=True, options={"inner": "aot_eager"})
    assert torch.equal(model(*inputs), expected)


def test_the_default_dtype_is_left_alone():
    zoo.build("t2v-14b", "tiny")
    assert torch.get_default_dtype() == torch.float32
    with pytest.raises(ValueError, match="add-on"):
        zoo.addons.attach(zoo.build("t2v-14b", "tiny"), "nothing")
    assert torch.get_default_dtype() == torch.float32
    assert zoo.build("t2v-14b", "tiny", dtype=torch.float16).dtype == torch.float16


@pytest.mark.parametrize("mode", ["sdpa_math", "sdpa_flash", "radial"])
def test_the_attention_mode_reaches_every_attention(mode):
    model = zoo.build("humo-14b", "tiny", attention=mode, dtype=torch.float32)
    kernels = {m.mode for m in model.modules() if hasattr(m, "mode")}
    assert kernels == {"sdpa" if mode == "radial" else mode}
    assert all(block.sparse == (mode == "radial") for block in model.blocks)
    variant = zoo.variant("humo-14b", "tiny")
    inputs = model_inputs(variant.config, (2, 8, 16), addons=variant.addons)
    reference = zoo.build("humo-14b", "tiny", dtype=torch.float32)
    reference.load_state_dict(model.state_dict())
    # Two frames see one another widely: sparse and dense differ little, but do.
    out, expected = model(*inputs), reference(*inputs)
    error = (out - expected).norm() / expected.norm()
    assert error < (0.05 if mode == "radial" else 1e-5)


def test_names():
    assert set(CONFIGS) - {"tiny"} < set(zoo.NAMES)
    assert zoo.variant("ti2v-5b").config is CONFIGS["ti2v-5b"]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda: zoo.build("t2v-15b"), "model 't2v-15b': use one of 't2v-1.3b', 't2v-14b'"),
        (lambda: zoo.build("t2v-14b", "small"), "size 'small': use one of 'full', 'tiny'"),
        (lambda: zoo.build("t2v-14b", "tiny", "fp8"), "quantization 'fp8': use one of"),
        (lambda: zoo.build("t2v-14b", "tiny", attention="fast"), "attention mode 'fast'"),
        (lambda: zoo.build("t2v-14b", "tiny", attention="sdpa_cudnn"), "needs a CUDA device"),
    ],
)
def test_bad_input_is_named(broken, message):
    with pytest.raises(ValueError, match=message) as raised:
        broken()
    assert "\n" not in str(raised.value)
