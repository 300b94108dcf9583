"""Replacing the linears of a module: which, which not and why, and what is refused."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from wan_models import CONFIGS, TINY, Fp8Linear, WanBlock, WanModel, quantize_
from wan_models.quant import HIGH_PRECISION, Fp4Linear, convert, high_precision
from wan_models.quant.measured import AUTO, TABLE
from wan_models.quant.recipes import RECIPES


def linear(*, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(64, 48).bfloat16()


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
    assert actions["cross_attn.k"] == (
        "kept", "named in skip by 'cross_attn.k': 512 rows gain no time in 8 bits"
    )
    assert actions["self_attn.v"][0] == actions["cross_attn.v"][0] == "kept"
    assert actions["odd"] == ("kept", "K=24 is not a multiple of 16, as _scaled_mm demands")
    assert isinstance(block.self_attn.q, Fp8Linear)
    assert isinstance(block.ffn[0], Fp8Linear)
    assert isinstance(block.cross_attn.k, nn.Linear)


def test_layers_attached_later_are_quantised_by_a_second_call():
    block = WanBlock(TINY).bfloat16()
    rows = quantize_(block, "fp8_e4m3fn_scaled_fast", skip=["ffn.2"])
    assert [row.action for row in rows].count("quantised") == 9
    first = block.self_attn.q
    block.cross_attn.k_proj = nn.Linear(2048, 256, bias=False).bfloat16()
    rows = quantize_(block, "fp4_scaled", skip=["ffn.2"])
    actions = {row.name: (row.action, row.reason) for row in rows}
    assert len(rows) == 11
    assert actions.pop("cross_attn.k_proj") == ("quantised", "fp4_scaled")
    assert actions.pop("ffn.2") == ("kept", "named in skip by 'ffn.2'")
    assert set(actions.values()) == {("already quantised", "fp8_e4m3fn_scaled_fast")}
    assert block.self_attn.q is first
    assert isinstance(block.cross_attn.k_proj, Fp4Linear)
    with pytest.raises(ValueError, match=r"'self_attn.q' names self_attn.q, which is quantised"):
        quantize_(block, "fp4_scaled", skip=["self_attn.q"])


def test_a_recipe_that_multiplies_nothing_takes_any_size():
    holder = nn.ModuleDict({"odd": nn.Linear(12, 7), "fits": nn.Linear(64, 48)})
    assert [row.action for row in quantize_(holder, "fp8_e5m2_scaled")] == ["quantised"] * 2
    assert holder["odd"](torch.randn(3, 12)).shape == (3, 7)


class Skeleton(nn.Module):
    """Linears by the names that a Wan model gives them, with add-ons and traps for substrings."""

    def __init__(self) -> None:
        super().__init__()
        for name in (
            *HIGH_PRECISION,
            "head.head",
            "blocks.0.self_attn.q",
            "blocks.0.cross_attn.k_proj",
            "blocks.0.cross_attn.ip_adapter_single_stream_k_proj",
            "blocks.0.audio_cross_attn.kv_linear",
            "blocks.0.motion_attn.k",
            "vace_blocks.0.after_proj",
            "address.time_embedding.0",
            "time_embedding.0_norm",
        ):
            *path, leaf = name.split(".")
            parent = self
            for component in path:
                if not hasattr(parent, component):
                    parent.add_module(component, nn.Module())
                parent = getattr(parent, component)
            parent.add_module(leaf, nn.Linear(32, 32))


def test_high_precision_is_exact_names():
    model = Skeleton()
    assert tuple(high_precision(model)) == HIGH_PRECISION
    rows = quantize_(model, "fp4_scaled", skip=[*high_precision(model), "blocks.*.self_attn.q"])
    kept = {row.name for row in rows if row.action == "kept"}
    assert kept == {*HIGH_PRECISION, "blocks.0.self_attn.q"}
    assert isinstance(model.head.head, Fp4Linear)


def test_high_precision_leaves_out_what_a_model_lacks():
    model = Skeleton()
    del model.img_emb, model.multitalk_audio_proj, model.audio_proj
    assert high_precision(model) == list(HIGH_PRECISION[:5])
    assert high_precision(WanBlock(TINY)) == []
    quantize_(model, "fp8_e5m2")
    assert high_precision(model) == []  # nothing of it is left in high precision


@pytest.mark.parametrize(
    ("auto", "kind", "counted"),
    [("auto_fp8", Fp8Linear, (1.33, 3.67, 3.52)), ("auto_fp4", Fp4Linear, (1.35, 3.73, 3.58))],
)
def test_auto_chooses_by_the_record_and_says_so(auto, kind, counted):
    with torch.device("meta"):
        model = WanModel(replace(CONFIGS["t2v-14b"], num_layers=1)).bfloat16()
    rows = {row.name: row for row in quantize_(model, auto, high_precision(model))}
    block = model.blocks[0]
    for name, ms, wide in zip(
        ("self_attn.q", "ffn.0", "ffn.2"), counted, (2.11, 6.45, 6.13), strict=True
    ):
        assert isinstance(block.get_submodule(name), kind)
        assert rows[f"blocks.0.{name}"][1:] == (
            "quantised",
            f"{AUTO[auto]}: {ms} ms with quantising against {wide} ms in bf16 (32760 rows, H100)",
        )
    assert rows["head.head"][1:] == (
        "kept", "N=64 is below 768: quantising a row takes longer than its product gains"
    )
    assert rows["time_projection.1"] == (
        "time_projection.1", "kept",
        "named in skip by 'time_projection.1': few rows, once a step or a video, and every block "
        "reads the result",
    )
    assert isinstance(block.cross_attn.k, kind)


def test_text_keys_and_values_stay_wide_on_demand():
    with torch.device("meta"):
        model = WanModel(replace(CONFIGS["t2v-14b"], num_layers=2)).bfloat16()
    skip = high_precision(model, text=True)
    assert skip == [*high_precision(model), "blocks.*.cross_attn.k", "blocks.*.cross_attn.v"]
    assert high_precision(WanBlock(TINY), text=True) == ["cross_attn.k", "cross_attn.v"]
    rows = quantize_(model, "auto_fp8", skip)
    kept = [row.name for row in rows if row.action == "kept" and "cross_attn" in row.name]
    assert kept == [f"blocks.{i}.cross_attn.{part}" for i in (0, 1) for part in "kv"]


def test_every_recorded_choice_is_the_faster_one_and_accurate():
    for row in TABLE:
        assert row.row_wise + row.quantise < row.wide
        assert row.relative_l1 <= 0.04


@pytest.mark.parametrize(("capability", "refused"), [((8, 6), True), ((8, 9), False)])
def test_a_gpu_that_multiplies_no_fp8_is_named(monkeypatch, capability, refused):
    class Properties:
        major, minor = capability

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    gpu = torch.device("cuda:0")
    convert.check_device(RECIPES["fp8_e5m2_scaled"], gpu)
    fast = RECIPES["fp8_e5m2_scaled_fast"]
    if not refused:
        convert.check_device(fast, gpu)
        return
    with pytest.raises(ValueError, match=r"8\.9 or later: cuda:0 has 8\.6, use 'fp8_e5m2_scaled'"):
        convert.check_device(fast, gpu)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize_(WanBlock(TINY), "fp8"), "quantization 'fp8'.*'auto_fp8', 'auto_fp4'"),
        (lambda: quantize_(WanBlock(TINY), "fp8_e4m3fn_fast", skip=["attn"]), "names no linear"),
        (lambda: quantize_(linear(), "fp8_e4m3fn_fast"), "inside a module: use quantized"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
