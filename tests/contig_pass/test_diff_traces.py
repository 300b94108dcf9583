"""What ``contig-pass diff`` traces: the zoo, attention on a GPU that is not there, fake tensors."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from contig_pass.contracts.target import CPU, Target
from contig_pass.differ import command
from contig_pass.differ import zoo as differ_zoo
from contig_pass.differ.targets import Program, WanOptions, resolve
from contig_pass.differ.tracing import trace
from contig_pass.inductor import rehearsal
from contig_pass.inductor.faking import Faking
from contig_pass.report.model import Report
from wan_models import quant, zoo
from wan_models.attention import attention as wan_attention
from wan_models.attention import kernels, sdpa
from wan_models.config import WanConfig
from wan_models.quant import fp4

SM90, SM100, SM120 = Target("cuda", (9, 0)), Target("cuda", (10, 0)), Target("cuda", (12, 0))
FAST = "fp8_e4m3fn_scaled_fast"


@pytest.fixture(autouse=True)
def one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models of one block: what is traced here is the kinds of layers, not their number."""
    tiny = WanConfig.tiny

    def smaller(config: WanConfig) -> WanConfig:
        layers = (0,) if config.vace_layers else ()
        return dataclasses.replace(tiny(config), num_layers=1, vace_layers=layers)

    monkeypatch.setattr(WanConfig, "tiny", smaller)


def traced(
    text: str, target: Target = SM90, device: str | None = None, **options: object
) -> Report:
    faking = Faking(device)
    program = resolve(text, target, WanOptions(**options), faking)
    return trace(program, target, "dense", faking)


def traced_function(
    function: Callable[..., object],
    *args: torch.Tensor,
    target: Target = SM90,
    around: Callable[..., object] = contextlib.nullcontext,
) -> Report:
    faking = Faking()
    if isinstance(function, torch.nn.Module):
        faking.place(function)
    program = Program("function", function, faking.placed(args), {}, around)
    return trace(program, target, "dense", faking)


# -- the zoo -------------------------------------------------------------------------------------

#: Names whose tiny models differ; the others are a twin of one of them.
DISTINCT = tuple({zoo.variant(name, "tiny"): name for name in zoo.NAMES}.values())
SMALL = {"size": "tiny", "resolution": "128x96", "frames": 9}


def test_every_name_is_a_program() -> None:
    for name in zoo.NAMES:
        program = resolve(f"wan:{name}", SM90, WanOptions(**SMALL), Faking())
        assert program.name.startswith(f"wan:{name} (tiny, unquantised, sdpa, 128x96, 9 frames")
        tensors = [*program.model.parameters(), *program.model.buffers(), program.args[0]]
        assert {(t.device.type, type(t).__name__) for t in tensors} == {("cpu", "FakeTensor")}


# The VACE models are traced in test_diff.py, where two runs give one file.
@pytest.mark.parametrize("name", [name for name in DISTINCT if not name.startswith("vace")])
def test_every_model_is_traced(name: str) -> None:
    recipe = FAST if name.startswith("t2v") else None
    report = traced(f"wan:{name}", quantization=recipe, **SMALL)
    assert report.targets == ("sm90",)
    # At least q, k and v of self and cross attention.
    assert report.totals.uses >= 6
    assert report.clean


@pytest.mark.parametrize(
    ("target", "op", "scale"),
    [
        # One op that expands the weight to FP8. Blackwell multiplies FP4 itself, by block scales
        # beside a tensor's.
        (SM90, "wan_models::fp4_weight_linear.default", "block_scale"),
        (SM100, "aten::_scaled_mm_v2.default", "scale_a[1]"),
    ],
)
def test_linears_take_the_path_of_the_target(
    target: Target, op: str, scale: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watched_uses(monkeypatch)
    with torch.device("meta"):
        linear = quant.quantized(torch.nn.Linear(256, 128).bfloat16(), "fp4_scaled_fast")
    traced_function(
        linear, torch.empty(64, 256, dtype=torch.bfloat16, device="meta"), target=target,
        around=lambda: differ_zoo.as_on(target),
    )
    assert {name for name, _ in seen} == {op}
    assert (op, scale) in seen


@pytest.mark.parametrize(
    ("mode", "op", "target"),
    [
        ("sdpa", "aten::_scaled_dot_product_cudnn_attention.default", SM90),
        ("sdpa", "aten::_scaled_dot_product_flash_attention.default", SM120),
        ("sdpa", "aten::_scaled_dot_product_flash_attention_for_cpu.default", CPU),
        ("sdpa_efficient", "aten::_scaled_dot_product_efficient_attention.default", SM90),
        ("flash_attn_3", "wan_models::flash_attn_3.default", SM90),
        ("sageattn_3", "wan_models::sageattn_3.default", SM120),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_kernels_need_neither_package_nor_gpu(
    mode: str, op: str, target: Target, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lens: torch.Tensor):
        # Computed, since of inputs no more is known than that they start on 16 bytes.
        q, k, v = q + 1, k + 1, v + 1
        return wan_attention(q, k, v, mode=mode, k_lens=lens if masked else None)

    if masked and mode == "flash_attn_3":
        op = "wan_models::flash_attn_3_varlen.default"
    if masked and mode == "sageattn_3":
        op = "wan_models::sageattn_3_masked.default"
    if masked and (mode, target) == ("sdpa", SM120):
        op = "aten::_scaled_dot_product_efficient_attention.default"
    seen = watched_uses(monkeypatch)
    # 41 keys: a boolean mask would lie on rows that are not aligned.
    q, k = (torch.empty(2, n, 2, 128, dtype=torch.bfloat16, device="meta") for n in (40, 41))
    lens = torch.empty(2, dtype=torch.int32, device="meta")
    report = traced_function(
        function, q, k, k.clone(), lens, target=target, around=lambda: differ_zoo.as_on(target)
    )
    assert op in {name for name, _ in seen}
    assert report.clean


def test_the_zoo_is_left_as_it_was() -> None:
    before = kernels.check_mode, sdpa.key_mask, fp4.multiplies_fp4
    with contextlib.suppress(KeyError), differ_zoo.as_on(SM100):
        assert fp4.multiplies_fp4(torch.device("cpu"))
        raise KeyError
    assert (kernels.check_mode, sdpa.key_mask, fp4.multiplies_fp4) == before
    with differ_zoo.as_on(CPU):
        assert (kernels.check_mode, sdpa.key_mask, fp4.multiplies_fp4) == before


def test_full_size_models_take_no_memory() -> None:
    options = WanOptions(FAST, resolution="1280x720")
    program = resolve("wan:i2v-14b", SM90, options, Faking())
    assert sum(p.nbytes for p in program.model.state_dict().values()) > 14e9
    assert program.args[0].shape == (1, 36, 21, 90, 160)
    assert command._peak_megabytes() < 4000


@pytest.mark.skipif(torch.version.cuda is None, reason="torch is built without CUDA")
@pytest.mark.parametrize("name", DISTINCT)
def test_fake_cuda_tensors_give_the_same_fixes(name: str) -> None:
    recipe = FAST if name != "multitalk-14b" else "fp4_scaled_fast"
    rows = [
        [dataclasses.replace(row, device="", node="", copy=None) for row in report.rows]
        for report in (
            traced(f"wan:{name}", device=device, quantization=recipe, **SMALL)
            for device in ("cpu", "cuda")
        )
    ]
    assert rows[0] == rows[1]


def watched_uses(monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, str]]:
    """(op, operand) of every use that is judged from here on."""
    from contig_pass import pipeline

    seen: set[tuple[str, str]] = set()
    original = pipeline.analyse

    def analyse(*args: object, **kwargs: object) -> object:
        found = original(*args, **kwargs)
        seen.update((use.contract.op, use.operand.name) for use in found.uses)
        return found

    monkeypatch.setattr(pipeline, "analyse", analyse)
    return seen


# -- attention -----------------------------------------------------------------------------------


def attention(mask: torch.Tensor | None = None, **kwargs: object) -> Callable[..., torch.Tensor]:
    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        # Views that start two bytes after 16.
        k = k.flatten()[1 : 1 + v.numel()].view(v.shape)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, **kwargs)

    return function


def heads(tokens: int, size: int = 64, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(1, 2, tokens, size, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("target", "backend"),
    [(SM90, "cudnn_attention"), (SM120, "flash_attention"), (CPU, None)],
)
def test_attention_is_judged_by_the_kernel_of_the_target(
    target: Target, backend: str | None
) -> None:
    report = traced_function(attention(), heads(40), heads(41), heads(40), target=target)
    if backend is None:
        assert report.clean
        return
    (row,) = report.rows
    assert row.op == f"aten::_scaled_dot_product_{backend}.default"
    assert (row.operand, row.rules) == ("key", ("pointer aligned to 16 bytes",))
    assert row.before.offset == 2


@pytest.mark.parametrize(
    ("backend", "op"),
    [
        (SDPBackend.FLASH_ATTENTION, "flash_attention"),
        (SDPBackend.EFFICIENT_ATTENTION, "efficient_attention"),
        (SDPBackend.MATH, None),
    ],
)
def test_a_kernel_that_is_asked_for_is_the_one(backend: SDPBackend, op: str | None) -> None:
    def function(*tensors: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return attention()(*tensors)

    report = traced_function(function, heads(40), heads(41), heads(40))
    expected = [] if op is None else [f"aten::_scaled_dot_product_{op}.default"]
    assert [row.op for row in report.rows] == expected


def test_masks_lie_as_torch_lays_them() -> None:
    def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)

    mask = torch.empty(1, 1, 40, 41, dtype=torch.bool, device="meta")
    tensors = (heads(40), heads(41), heads(41), mask)
    # cuDNN is handed rows of 82 bytes; the memory-efficient kernel gets a padded mask.
    (row,) = traced_function(masked, *tensors, target=SM90).rows
    assert (row.operand, row.before.strides[-2]) == ("attn_bias", 41)
    assert traced_function(masked, *tensors, target=SM120).clean


@pytest.mark.parametrize(
    ("target", "tensors", "expected"),
    [
        (SM90, [heads(40)] * 3, "cudnn"),
        (SM100, [heads(40)] * 3, "cudnn"),
        (SM120, [heads(40)] * 3, "flash"),
        (SM90, [heads(40, 256)] * 3, "flash"),
        (SM90, [heads(1), heads(40), heads(40)], "flash"),
        (SM90, [heads(40, 60)] * 3, "flash"),
        (SM90, [heads(40, dtype=torch.float32)] * 3, "efficient"),
        (SM90, [heads(40, dtype=torch.float64)] * 3, "math"),
        (SM90, [heads(0)] * 3, "math"),
        (Target("cuda", (7, 5)), [heads(40, dtype=torch.float16)] * 3, "efficient"),
        (Target("cuda", (7, 5)), [heads(40)] * 3, "math"),
    ],
)
def test_the_choice_of_a_kernel(
    target: Target, tensors: list[torch.Tensor], expected: str
) -> None:
    assert rehearsal.choose(target, *tensors, None) == expected


def test_attention_outside_of_a_rehearsal_is_torchs_own() -> None:
    traced_function(attention(), heads(40), heads(41), heads(40))
    q = torch.randn(1, 2, 5, 8)
    compiled = torch.compile(
        torch.nn.functional.scaled_dot_product_attention, backend="aot_eager"
    )
    expected = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert torch.equal(compiled(q, q, q), expected)


# -- fake tensors --------------------------------------------------------------------------------


def test_moved_parameters_keep_ties_and_shared_memory() -> None:
    with torch.device("meta"):
        memory = torch.empty(100)
        module = torch.nn.Module()
        module.a = torch.nn.Parameter(memory[:50])
        module.b = torch.nn.Linear(2, 2)
        module.b.weight = module.a
        module.register_buffer("c", memory[3:].t())
        module.table = {"rope": [memory[5:]], "size": 3}
    faking = Faking()
    faking.place(module)
    assert module.a is module.b.weight
    assert isinstance(module.a, torch.nn.Parameter)
    assert module.a.requires_grad
    assert not module.c.requires_grad
    assert module.c.storage_offset() == 3
    assert module.a.untyped_storage()._cdata == module.c.untyped_storage()._cdata
    assert {t.device.type for t in (*module.parameters(), *module.buffers())} == {"cpu"}
    assert module.table["rope"][0].device.type == "cpu"
    assert module.table["rope"][0].untyped_storage()._cdata == module.a.untyped_storage()._cdata
    real = torch.ones(3)
    assert faking.placed({"x": [real, 1]})["x"][0] is real
