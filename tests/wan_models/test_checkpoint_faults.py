"""Faults of files: every one in one list, in the file's names, with nothing loaded."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from torch import nn

from tests.wan_models.checkpoint_files import empty_model, raw, read, small_model, state, write
from wan_models.checkpoint import CheckpointError, load, save
from wan_models.checkpoint.reader import Placer
from wan_models.quant import quantize_

WEIGHT = "blocks.0.ffn.0.weight"


def problems(tmp_path, tensors=None, target=None, **options) -> list[tuple[str, str]]:
    """What loading a faulty file says; fails if it loads, or changes the model."""
    target = small_model(dtype=torch.float32) if target is None else target
    before = {name: (tensor, raw(tensor)) for name, tensor in tensors_of(target).items()}
    file = tmp_path / "faulty.safetensors"
    if tensors is not None:
        write(file, tensors, **options)
    with pytest.raises(CheckpointError) as error:
        load(target, file, device="cpu")
    after = tensors_of(target)
    assert after.keys() == before.keys()
    for name, (tensor, values) in before.items():
        assert after[name] is tensor, name
        assert raw(tensor) == values, name
    message = str(error.value)
    assert "\n" not in message
    found = [(problem.kind, problem.name) for problem in error.value.problems]
    for kind, name in found:
        assert f"{kind} {name}" in message
    return found


def tensors_of(made: nn.Module) -> dict[str, torch.Tensor]:
    return dict(made.named_parameters()) | dict(made.named_buffers())


# -- faults ------------------------------------------------------------------------------------


def test_every_kind_of_fault_in_one_list(tmp_path):
    tensors = state(small_model())
    last = list(tensors)[-1]
    del tensors["blocks.0.self_attn.q.weight"]
    tensors["blocks.1.ffn.2.weight"] = torch.zeros(128, 255)
    tensors["blocks.1.norm3.bias"] = torch.zeros(128, dtype=torch.int64)
    tensors["blocks.0.modulation"] = torch.zeros(1, 5, 128)
    tensors["blocks.0.cross_attn.k.weight"] = torch.zeros(128, 128, dtype=torch.int64)
    tensors["blocks.0.extra"] = torch.zeros(3)
    tensors["lora_up.weight"] = torch.zeros(3)
    tensors[last] = tensors.pop(last)
    found = problems(
        tmp_path, tensors, cut=1, edit={
            "text_embedding.0.bias": {"dtype": "I4"},
            "text_embedding.2.bias": {"shape": [127]},
            "time_embedding.0.bias": {"data_offsets": [0, 256]},
        },
    )
    assert sorted(found) == sorted([
        ("missing", "blocks.0.self_attn.q.weight"),
        ("shape", "blocks.1.ffn.2.weight"),
        ("dtype", "blocks.1.norm3.bias"),
        ("shape", "blocks.0.modulation"),
        ("dtype", "blocks.0.cross_attn.k.weight"),
        ("extra", "blocks.0.extra"),
        ("extra", "lora_up.weight"),
        ("dtype", "text_embedding.0.bias"),
        ("corrupt", "text_embedding.2.bias"),
        ("corrupt", "patch_embedding.weight"),  # shares its bytes with time_embedding.0.bias
        ("truncated", last),
    ])


@pytest.mark.parametrize("missing", [1, 300, 40_000])
def test_a_truncated_file_names_what_it_lost(missing, tmp_path):
    tensors = state(small_model())
    end = sum(tensor.nbytes for tensor in tensors.values())
    lost, start = set(), 0
    for name, tensor in tensors.items():
        start += tensor.nbytes
        if start > end - missing:
            lost.add(name)
    found = problems(tmp_path, tensors, cut=missing)
    assert set(found) == {("truncated", name) for name in lost}


@pytest.mark.parametrize("naming", ["official", "diffusers", "comfyui", "comfyui_old"])
def test_names_are_those_of_the_file(naming, tmp_path):
    made = small_model()
    quantize_(made, "fp8_e4m3fn_scaled")
    file = tmp_path / "m.safetensors"
    save(made, file, naming=naming, prefix="model.")
    content = read(file)
    path = {"diffusers": "blocks.0.ffn.net.0.proj"}.get(naming, "blocks.0.ffn.0")
    head = {"diffusers": "proj_out"}.get(naming, "head.head")
    kinds = {"F8_E4M3": torch.float8_e4m3fn, "F32": torch.float32, "BF16": torch.bfloat16,
             "U8": torch.uint8}
    tensors = {
        name: torch.frombuffer(bytearray(data), dtype=kinds[kind]).reshape(shape)
        if data else torch.empty(shape, dtype=kinds[kind])
        for name, (kind, shape, data) in content.items()
    }
    del tensors[f"model.{path}.weight"], tensors[f"model.{head}.bias"]
    found = problems(tmp_path, tensors)
    assert sorted(found) == [
        ("missing", f"model.{path}.weight"), ("missing", f"model.{head}.bias")
    ]


def test_faults_of_quantised_layers(tmp_path):
    made = small_model()
    quantize_(made, "fp4_scaled")
    good = state(made)
    stem = "blocks.0.ffn.0"
    e4m3 = torch.float8_e4m3fn
    faults = {
        "weight": (torch.zeros(256, 63, dtype=torch.uint8), "shape"),
        "weight_scale": (torch.zeros(256, 7).to(e4m3), "shape"),
        "weight_scale_2": (torch.zeros(2), "shape"),
        "bias": (torch.zeros(255, dtype=torch.bfloat16), "shape"),
    }
    for part, (tensor, kind) in faults.items():
        found = problems(tmp_path, good | {f"{stem}.{part}": tensor})
        assert found == [(kind, f"{stem}.{part}")]
    for part in ("weight_scale", "weight_scale_2"):
        tensors = {name: t for name, t in good.items() if name != f"{stem}.{part}"}
        assert problems(tmp_path, tensors) == [("missing", f"{stem}.{part}")]
    found = problems(tmp_path, good | {f"{stem}.weight_scale": torch.zeros(256, 8)})
    assert found == [("dtype", f"{stem}.weight_scale")]
    found = problems(tmp_path, good | {f"{stem}.weight_scale_2": torch.zeros(()).to(e4m3)})
    assert found == [("dtype", f"{stem}.weight_scale_2")]
    found = problems(tmp_path, good | {f"{stem}.bias": torch.zeros(256).to(e4m3)})
    assert found == [("dtype", f"{stem}.bias")]


@pytest.mark.parametrize(
    ("settings", "kind"),
    [({"format": "mxfp8"}, "format"), ({}, "format"), ([1], "format"),
     ({"format": "float8_e4m3fn"}, None), ({"format": "nvfp4"}, "dtype")],
)
def test_comfyui_formats_that_do_not_fit(settings, kind, tmp_path):
    tensors = state(small_model())
    tensors[WEIGHT] = tensors[WEIGHT].to(torch.float8_e4m3fn)
    tensors["blocks.0.ffn.0.weight_scale"] = torch.ones(())
    text = json.dumps(settings).encode()
    tensors["blocks.0.ffn.0.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    if kind is None:
        load(empty_model(), write(tmp_path / "m.safetensors", tensors), device="cpu")
    else:
        name = "blocks.0.ffn.0.comfy_quant" if kind == "format" else WEIGHT
        assert problems(tmp_path, tensors) == [(kind, name)]


def test_scales_beside_a_weight_in_full_precision_are_extra(tmp_path):
    tensors = state(small_model()) | {"blocks.0.ffn.0.weight_scale": torch.ones(())}
    assert problems(tmp_path, tensors) == [("extra", "blocks.0.ffn.0.weight_scale")]


def test_a_layer_that_the_recipe_does_not_fit(tmp_path):
    holder = nn.Module()
    holder.head = nn.Module()
    holder.head.head = nn.Linear(24, 16)
    tensors = {
        "head.head.weight": torch.zeros(16, 24).to(torch.float8_e4m3fn),
        "head.head.weight_scale": torch.ones(()),
        "head.head.bias": torch.zeros(16),
    }
    found = problems(tmp_path, tensors, holder)
    assert found == [("shape", "head.head.weight")]
    load(holder, tmp_path / "faulty.safetensors", device="cpu", quantization="fp8_e4m3fn_scaled")
    assert holder.head.head.recipe == "fp8_e4m3fn_scaled"


def test_the_same_tensor_under_two_names(tmp_path):
    tensors = state(small_model())
    tensors["blocks.0._orig_mod.ffn.0.weight"] = tensors[WEIGHT]
    assert problems(tmp_path, tensors) == [("twice", "blocks.0._orig_mod.ffn.0.weight")]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "corrupt faulty.safetensors (it does not begin with a header's length)"),
        (b"\x00" * 7, "corrupt faulty.safetensors (it does not begin with a header's length)"),
        (b"PK\x03\x04" * 20, "corrupt faulty.safetensors (it does not begin with a header's"),
        (struct.pack("<Q", 99) + b"{}", "truncated faulty.safetensors (the header ends at byte"),
        (struct.pack("<Q", 2) + b"[]", "corrupt faulty.safetensors (the header is no JSON object)"),
        (struct.pack("<Q", 2) + b"{]", "corrupt faulty.safetensors (the header is no JSON object)"),
        (struct.pack("<Q", 2) + b"{}", "format names (no Wan model's: nothing"),
    ],
)
def test_files_that_are_no_safetensors_files(content, fault, tmp_path):
    (tmp_path / "faulty.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        load(empty_model(), tmp_path / "faulty.safetensors", device="cpu")
    assert fault in str(error.value)


@pytest.mark.parametrize(
    "change",
    [{"shape": [-1, -128]}, {"shape": "x"}, {"shape": [1.0, 2.0]}, {"data_offsets": [0]},
     {"data_offsets": [64, 0]}, {"data_offsets": [-8, 8]}, {"data_offsets": None}],
)
def test_entries_of_the_header_that_make_no_sense(change, tmp_path):
    tensors = state(small_model())
    assert problems(tmp_path, tensors, edit={WEIGHT: change}) == [("corrupt", WEIGHT)]


def test_the_whole_message(tmp_path):
    holder = nn.Module()
    holder.head = nn.Module()
    holder.head.head = nn.Linear(4, 2)
    file = write(tmp_path / "m.safetensors", {"head.head.weight": torch.zeros(2, 5)})
    with pytest.raises(CheckpointError) as error:
        load(holder, file, device="cpu")
    assert str(error.value) == (
        f"{file} cannot be loaded, 2 problems: missing head.head.bias; "
        "shape head.head.weight (is [2, 5], wanted [2, 4])"
    )


def test_a_load_that_is_not_strict_reports_what_is_missing_and_extra(tmp_path):
    made = small_model()
    tensors = state(made)
    del tensors[WEIGHT], tensors["blocks.1.modulation"]
    tensors["other.weight"] = torch.zeros(2)
    target = small_model(dtype=torch.float32)
    before = target.blocks[1].modulation.clone()
    file = write(tmp_path / "m.safetensors", tensors)
    report = load(target, file, device="cpu", strict=False)
    assert set(report.missing) == {WEIGHT, "blocks.1.modulation"}
    assert report.extra == ("other.weight",)
    assert torch.equal(target.blocks[1].modulation, before)
    assert torch.equal(target.blocks[0].ffn[2].weight, made.blocks[0].ffn[2].weight)
    write(file, tensors, cut=1)
    with pytest.raises(CheckpointError, match="1 problem: truncated other"):
        load(target, file, device="cpu", strict=False)


def test_a_bias_that_is_missing_stays_when_its_layer_is_quantised(tmp_path):
    made = small_model()
    quantize_(made, "fp8_e4m3fn_scaled")
    tensors = state(made)
    del tensors["blocks.0.ffn.0.bias"]
    target = small_model()
    bias = target.blocks[0].ffn[0].bias.clone()
    file = write(tmp_path / "m.safetensors", tensors)
    report = load(target, file, device="cpu", strict=False)
    assert report.missing == ("blocks.0.ffn.0.bias",)
    assert torch.equal(target.blocks[0].ffn[0].bias, bias)


def test_buffers_that_no_checkpoint_holds(tmp_path):
    file = tmp_path / "m.safetensors"
    save(small_model(), file)
    target = empty_model()
    target.register_buffer("table", torch.empty(3, device="meta"), persistent=False)
    with pytest.raises(CheckpointError, match=r"missing table \(a buffer outside of state_dict on"):
        load(target, file, device="cpu")
    target.table = torch.zeros(3)
    load(target, file, device="cpu")


@pytest.mark.parametrize("recipe", [None, "fp8_e4m3fn_scaled"])
def test_a_failure_while_reading_leaves_the_model_as_it_was(recipe, tmp_path, monkeypatch):
    made = small_model()
    if recipe is not None:
        quantize_(made, recipe)
    file = tmp_path / "m.safetensors"
    save(made, file)
    target = small_model(dtype=torch.float32)
    before = state(target)
    modules = {name: type(module) for name, module in target.named_modules()}
    left = [30]
    place = Placer.__call__

    def failing(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            raise MemoryError("planted")
        return place(*args, **kwargs)

    monkeypatch.setattr(Placer, "__call__", failing)
    with pytest.raises(MemoryError, match="planted"):
        load(target, file, device="cpu")
    assert {name: type(module) for name, module in target.named_modules()} == modules
    for name, tensor in target.state_dict().items():
        assert raw(tensor) == raw(before[name]), name


def test_a_single_layer_is_no_model(tmp_path):
    file = tmp_path / "m.safetensors"
    save(small_model(), file)
    with pytest.raises(ValueError, match="Linear is a single layer: use a module that holds it"):
        load(nn.Linear(2, 2), file, device="cpu")
