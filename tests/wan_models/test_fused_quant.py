"""Activations quantised with what makes them, and their products: ops, kernels, graphs."""

import functools
import json
import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

import contig_pass
from tests.wan_models.triton_kernels import compiled, needs_interpreter, needs_triton
from wan_models import TINY, WanBlock, block_inputs, quantize_
from wan_models.quant import attach_lora, fused, producers, rows_linear
from wan_models.quant import feed_forward as ffn_module
from wan_models.quant.nvfp4 import quantize_nvfp4
from wan_models.quant.recipes import E4M3
from wan_models.quant.rows import QuantizedRows, quantise_rows

BF16 = torch.bfloat16
ROWWISE = "fp8_e4m3fn_rowwise_fast"


def outliers(*shape: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x[..., ::7] *= 30
    return x.to(BF16)


def modulation(batch: int, tokens: int, width: int) -> list[torch.Tensor]:
    """Shift, scale and gate (B, 1 or L, C), views of one tensor."""
    e = torch.randn(batch, tokens, 6, width, generator=torch.Generator().manual_seed(9))
    return [e[:, :, i] for i in range(3)]


def assert_rows(made: tuple[torch.Tensor, torch.Tensor], wanted: torch.Tensor) -> None:
    """``made`` is ``wanted``, float64, by row: half a step of e4m3 off at most."""
    values, scale = made
    assert values.dtype == E4M3
    assert scale.dtype == torch.float32
    assert values.is_contiguous()
    assert scale.is_contiguous()
    step = wanted.abs().amax(-1, keepdim=True) / 448
    torch.testing.assert_close(scale.double(), step, rtol=1e-5, atol=0)
    exact = wanted / step
    grain = torch.exp2(torch.floor(torch.log2(exact.abs().clamp(min=2.0**-6))) - 3)
    assert ((values.double() - exact).abs() / grain).max() < 0.501


# -- the ops on a CPU ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_rows_of_any_size_keep_their_precision(size):
    x = outliers(2, 5, 96) * size
    assert_rows(fused.quantise_rows(x), x.double())


def test_a_zero_row_stays_zero_and_nan_stays_nan():
    x = torch.zeros(1, 3, 32, dtype=BF16)
    x[0, 1, 4] = torch.nan
    values, scale = fused.quantise_rows(x)
    assert values[0, ::2].float().eq(0).all()
    assert scale[0, ::2].isfinite().all()
    assert values[0, 1].float().isnan().any()


@pytest.mark.parametrize("steps", [1, 5])
def test_norm_and_modulation_by_row(steps):
    x, (shift, scale, gate) = outliers(2, 5, 96), modulation(2, steps, 96)
    weight, bias = torch.randn(96, dtype=BF16), torch.randn(96, dtype=BF16)

    def normed(y):
        return F.layer_norm(y.double(), (96,), eps=1e-6)

    made = fused.norm_quantise(x, None, None, shift, scale, 1e-6)
    assert_rows(made, normed(x) * (1 + scale.double()) + shift.double())
    made = fused.norm_quantise(x.transpose(0, 1), weight, bias, None, None, 1e-6)
    assert_rows(made, normed(x.transpose(0, 1)) * weight.double() + bias.double())

    branch = outliers(2, 5, 96, seed=1)
    total, *made = fused.add_norm_quantise(
        x, branch, gate, None, None, shift, scale, 1e-6
    )
    wanted = (x.double() + branch.double() * gate.double())
    torch.testing.assert_close(total.double(), wanted, rtol=2**-8, atol=2**-8)
    assert_rows(tuple(made), normed(total) * (1 + scale.double()) + shift.double())
    total, *_ = fused.add_norm_quantise(x, branch, None, weight, bias, None, None, 1e-6)
    assert torch.equal(total, x + branch)


def test_gelu_of_a_bare_product_by_row():
    x, rows, columns = outliers(5, 96), torch.rand(5, 1), torch.rand(96)
    bias = torch.randn(96, dtype=BF16)
    y = x.double() * rows.double() * columns.double() + bias.double()
    assert_rows(
        fused.gelu_quantise(x, rows, columns, bias), F.gelu(y, approximate="tanh")
    )
    plain = F.gelu(x.double(), approximate="tanh")
    assert_rows(fused.gelu_quantise(x, None, None, None), plain)


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
def test_products_of_rows(dtype):
    values, scale = quantise_rows(torch.randn(33, 64))
    weight, columns = torch.randn(48, 64).to(E4M3), torch.rand(48) + 0.1
    for column_scale, bias in ((columns, torch.randn(48, dtype=BF16)), (columns[:1], None)):
        wanted = values.double() @ weight.double().t() * scale * column_scale
        wanted = wanted if bias is None else wanted + bias.double()
        made = rows_linear.fp8_rows_linear(values, scale, weight, column_scale, bias, dtype)
        assert made.dtype == dtype
        torch.testing.assert_close(made.double(), wanted, rtol=2**-7, atol=2**-6)
        into = torch.full((33, 48), torch.nan, dtype=dtype)
        rows_linear.product_into(into, values, scale, weight, column_scale, bias, dtype)
        assert torch.equal(into, made)
        half = rows_linear.fp8_rows_linear(
            values, scale, weight, column_scale, bias, dtype, torch.float16
        )
        assert half.dtype == torch.float16
        assert torch.equal(half, made.half())  # rounded to ``dtype`` all the same


@pytest.mark.parametrize("tokens", [7, 33, 100])
def test_slices_of_a_feed_forward_are_the_whole(tokens):
    values, scale = quantise_rows(torch.randn(33, 64))
    first = torch.randn(96, 64).to(E4M3), torch.rand(96) / 64, torch.randn(96, dtype=BF16)
    second = torch.randn(48, 96).to(E4M3), torch.rand(1) / 64, None
    hidden = values.double() @ first[0].double().t() * scale * first[1] + first[2].double()
    hidden = F.gelu(hidden, approximate="tanh")
    wanted = hidden @ second[0].double().t() * second[1]
    made = ffn_module.in_slices(values, scale, first, second, BF16, tokens)
    assert (made.double() - wanted).norm() / wanted.norm() < 0.03
    whole = ffn_module.in_slices(values, scale, first, second, BF16, 33)
    torch.testing.assert_close(made, whole, rtol=2**-7, atol=2**-7)


def op_cases() -> dict[str, tuple]:
    x, branch = outliers(2, 5, 64), outliers(2, 5, 64, seed=1)
    shift, scale, gate = modulation(2, 1, 64)
    weight, bias = torch.randn(64, dtype=BF16), torch.randn(64, dtype=BF16)
    values, rows = quantise_rows(x[0])
    w0, w2 = torch.randn(96, 64).to(E4M3), torch.randn(48, 96).to(E4M3)
    packed = tuple(quantize_nvfp4(torch.randn(48, 64)))
    return {
        "quantise_rows": (x.transpose(0, 1),),
        "norm_quantise": (x, None, None, shift, scale, 1e-6),
        "add_norm_quantise": (x, branch, gate, weight, bias, None, None, 1e-6),
        "gelu_quantise": (x[0], rows, torch.rand(64), bias),
        "fp8_rows_linear": (values, rows, w0, torch.rand(96), None, torch.float16),
        "fp8_rows_linear in fp16": (
            values, rows, w0, torch.rand(1), bias.repeat(2)[:96], BF16, torch.float16
        ),
        "fp8_feed_forward": (
            values, rows, w0, torch.rand(96), None, w2, torch.rand(1), None, BF16
        ),
        "expand_fp4": packed[:2],
        "fp4_few_rows": (x[0], *packed, bias[:48]),
        "fp4_weight_linear": (outliers(20, 64), *packed, None),
    }


@pytest.mark.parametrize("name", op_cases())
def test_fakes_are_honest(name):
    op, args = getattr(torch.ops.wan_models, name.split()[0]).default, op_cases()[name]
    tests = ["test_faketensor", "test_aot_dispatch_dynamic"]
    if all(arg.dtype != E4M3 for arg in args if isinstance(arg, torch.Tensor)):
        tests.append("test_schema")  # it multiplies its inputs, which torch cannot do in 8 bits
    torch.library.opcheck(op, args, test_utils=tests)


def test_a_modulation_that_is_not_unit_stride_is_named():
    x, (shift, scale, _) = outliers(1, 3, 32), modulation(1, 1, 64)
    with pytest.raises(ValueError, match=r"norm_quantise: the last dimension of shift must be"):
        fused.norm_quantise(x, None, None, shift[..., ::2], scale[..., :32], 1e-6)


# -- the block -----------------------------------------------------------------------------------


def quantised_block(recipe: str) -> tuple[WanBlock, tuple]:
    torch.manual_seed(0)
    block = WanBlock(TINY).bfloat16().eval()
    quantize_(block, recipe)
    return block, block_inputs(TINY, (1, 3, 4), dtype=BF16)


def graph_of(block: WanBlock, inputs: tuple) -> list[str]:
    """Names of the ops of ours in the graph that Inductor would get, in order."""
    seen: list[str] = []

    def backend(gm, example_inputs):
        from functorch.compile import make_boxed_func
        from torch._dynamo.backends.common import aot_autograd

        def compiler(graph, _):
            seen.extend(
                node.target._schema.name.removeprefix("wan_models::")
                for node in graph.graph.nodes
                if getattr(node.target, "namespace", None) == "wan_models"
            )
            return make_boxed_func(graph)

        return aot_autograd(fw_compiler=compiler)(gm, example_inputs)

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(block, backend=backend, fullgraph=True)(*inputs)
    return seen


@pytest.mark.parametrize("recipe", [ROWWISE, "fp4_scaled_fast"])
def test_one_quantisation_serves_q_k_and_v(recipe):
    names = graph_of(*quantised_block(recipe))
    if recipe == ROWWISE:
        assert "expand_fp4" not in names
    else:
        # q, k, v and the text's q from rows that are there, and both of the feed-forward.
        assert names.count("expand_fp4") == 6
    ours = [name for name in names if name != "expand_fp4"]
    # v, then q and k, each of which is normed and turned in one pass.
    assert ours[:6] == ["norm_quantise", "fp8_rows_linear"] + 2 * ["fp8_bare_product", "norm_rope"]
    assert ours.count("norm_quantise") == 1
    assert ours.count("add_norm_quantise") == 2
    assert ours.count("fp8_feed_forward") == 1
    # Beside v: o, and the text's q, k, v and o.
    by_rows = ours.count("fp8_rows_linear") + ours.count("fp4_weight_linear")
    assert by_rows == 6
    assert ours.count("quantise_rows") == (4 if recipe == ROWWISE else 0)


@pytest.mark.parametrize("recipe", [ROWWISE, "fp4_scaled_fast"])
def test_fused_block_is_as_near_the_exact_one_as_one_that_quantises_by_itself(recipe, monkeypatch):
    torch.manual_seed(0)
    block = WanBlock(TINY).float().eval()
    inputs = block_inputs(TINY, (1, 3, 4), dtype=BF16)
    x = inputs[0].float()
    with torch.no_grad():
        wanted = block(x, inputs[1], inputs[2].float(), *inputs[3:])
        block = block.bfloat16()
        quantize_(block, recipe)
        fused_out = block(*inputs).float()
        monkeypatch.setattr(producers, "all_take_rows", lambda readers: False)
        plain = block(*inputs).float()
    assert F.cosine_similarity(fused_out.flatten(), wanted.flatten(), dim=0) > 0.999
    # Of the block's update. The fused one skips roundings to bf16, the other one does not.
    errors = [((y - wanted).norm() / (wanted - x).norm()).item() for y in (fused_out, plain)]
    assert errors[0] != errors[1]
    assert errors[0] < 1.05 * errors[1]
    assert errors[0] < (0.08 if recipe == ROWWISE else 0.2)  # measured 0.072 and 0.184


def test_a_lora_makes_its_linear_quantise_by_itself():
    block, inputs = quantised_block(ROWWISE)
    before = graph_of(block, inputs)
    attach_lora(block.self_attn.q, torch.randn(4, 256), torch.randn(256, 4))
    after = graph_of(block, inputs)
    assert before.count("norm_quantise") == 1
    assert after.count("norm_quantise") == 0
    assert after.count("quantise_rows") == before.count("quantise_rows") + 3
    with torch.no_grad():
        assert block(*inputs).isfinite().all()


def test_a_misaligned_activation_is_fixed_where_it_is_read():
    flat = torch.randn(2 * 5 * 64 + 8).to(BF16)

    def run(flat):
        return fused.quantise_rows(flat[1 : 1 + 640].view(2, 5, 64))

    torch._dynamo.reset()
    made = torch.compile(run, backend="contig_safe", fullgraph=True, options={"inner": "aot_eager"})
    for got, wanted in zip(made(flat), run(flat), strict=True):
        assert torch.equal(got, wanted)
    (fix,) = contig_pass.last_reports()[-1].fixes
    assert "quantise_rows" in str(fix)


def test_quantised_rows_say_what_they_are():
    x = outliers(2, 3, 32)
    rows = fused.rows_of(x)
    assert isinstance(rows, QuantizedRows)
    assert rows.shape == x.shape
    assert rows.device == x.device
    assert (rows.dequantised() - x).float().norm() / x.float().norm() < 0.04


# -- kernels -------------------------------------------------------------------------------------


@functools.cache
def interpreted() -> dict[str, list[dict]]:
    run = subprocess.run(
        [sys.executable, "-m", "tests.wan_models.triton_quant_cpu"],
        capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"},
    )
    assert run.returncode == 0, run.stderr
    found: dict[str, list[dict]] = {}
    for line in run.stdout.splitlines():
        case = json.loads(line)
        found.setdefault(case["name"], []).append(case)
    return found


@needs_interpreter
@pytest.mark.parametrize(("name", "count"), [("quantise", 18), ("zero", 2), ("norm", 36),
                                             ("add", 12), ("gelu", 24)])
def test_kernels_quantise_as_the_formulas_do(name, count):
    cases = interpreted()[name]
    assert len(cases) == count
    for case in cases:
        assert case["finite"]
        assert case["dense"]
        assert case["scale"] < 1e-6
        # A step of e4m3 where fp32 rounds another way at a midpoint, which is seldom.
        assert case["steps"] <= 1.01
        assert case["share"] < 0.01


@needs_interpreter
@pytest.mark.parametrize(
    ("name", "count", "most"),
    # The interpreter cuts off what does not fit bf16: a step of it, not half a step.
    [("total", 12, 2**-7), ("gemm", 6, 1e-6), ("stored", 6, 2**-9), ("few", 9, 2**-8)],
)
def test_kernels_agree_with_the_exact_values(name, count, most):
    cases = interpreted()[name]
    assert len(cases) == count
    assert all(case["finite"] and case["error"] <= most for case in cases)


@needs_interpreter
def test_a_product_in_bf16_is_stored_in_fp16():
    assert [(case["half"], case["same"]) for case in interpreted()["stored"]] == [(True, True)] * 6


@needs_interpreter
def test_expanded_weights_are_equal_to_the_bit():
    assert [case["equal"] for case in interpreted()["expand"]] == [True] * 3


_POINTERS = {
    "x": "*bf16", "branch": "*bf16", "total": "*bf16", "weight": "*bf16", "bias": "*bf16",
    "shift": "*fp32", "scale": "*fp32", "gate": "*fp32", "values": "*fp8e4nv", "scales": "*fp32",
    "eps": "fp32",
    "row_scale": "*fp32", "column_scale": "*fp32",
}


def shared_and_code(name: str, constants: dict, warps: int) -> tuple[int, str]:
    from wan_models.quant import fused_triton

    kernel = getattr(fused_triton, name)
    types = {arg: _POINTERS.get(arg, "i") for arg in kernel.arg_names}
    made = compiled(kernel, types, constants, 90, num_warps=warps)
    return made.metadata.shared, made.asm["ptx"]


@needs_triton
@pytest.mark.parametrize("name", ["norm_quantise", "add_norm_quantise", "gelu_quantise"])
def test_rows_are_loaded_ahead_by_vectors_on_hopper(name):
    width = 16384 if name == "gelu_quantise" else 4096 + 1024
    constants = {
        "x_c": 1, "b_c": 1, "c_s": 1, "GATED": True, "AFFINE": False, "MODULATED": True,
        "PER_TOKEN": False, "DEFERRED": True, "BIAS": True, "ROWS": 8, "STAGES": 3,
        "BLOCK": width, "LOW": 4096, "HIGH": 1024,
    }
    from wan_models.quant import fused_triton

    names = getattr(fused_triton, name).arg_names
    constants = {key: value for key, value in constants.items() if key in names}
    shared, code = shared_and_code(name, constants, 16 if name == "gelu_quantise" else 4)
    assert shared >= 2 * 2 * width  # two rows on their way
    assert "cp.async.cg.shared.global" in code  # 16 bytes each


@needs_triton
def test_the_product_runs_on_hoppers_tensor_cores():
    from wan_models.quant import rows_gemm

    bm, bn, bk = rows_gemm.TILE
    types = {
        "a": f"tensordesc<fp8e4nv[{bm},{bk}]>", "b": f"tensordesc<fp8e4nv[{bn},{bk}]>",
        "c": f"tensordesc<bf16[{bm},{bn // 2}]>", "row_scale": "*fp32", "column_scale": "*fp32",
        "bias": "*bf16", "m": "i32", "n": "i32", "k": "i32",
    }
    made = compiled(
        rows_gemm.row_scaled_product, types,
        {"c_s": 1, "BM": bm, "BN": bn, "BK": bk, "GROUP": 16, "PROGRAMS": 132, "BIAS": True,
         "ROUNDED": rows_gemm.TYPES[BF16]},
        90, num_warps=8, num_stages=4,
    )
    assert made.metadata.shared <= 227 * 1024
    assert "wgmma.mma_async.sync.aligned.m64n256k32.f32.e4m3.e4m3" in made.asm["ptx"]
