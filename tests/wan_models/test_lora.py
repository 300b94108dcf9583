"""LoRAs: values against float64, on every kind of linear, and what they refuse."""

import copy
import io

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import contig_pass
from wan_models import TINY, SlabLinear, WanBlock, block_inputs, quantize_
from wan_models.layers import WideLinear
from wan_models.quant import (
    QuantizedLinear,
    attach_lora,
    detach_lora,
    merge_lora_,
    quantized,
    set_lora_strength,
)
from wan_models.quant.recipes import RECIPES

KINDS = ["plain", *RECIPES, "slab"]


def linear(k: int = 64, n: int = 48, *, dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(k, n).to(dtype)


def layer_of(kind: str) -> nn.Module:
    if kind == "plain":
        return linear()
    if kind == "slab":
        return SlabLinear.from_linear(linear(), "fp8_e4m3fn_scaled_fast", weight_offset=1)
    return quantized(linear(), kind)


def factors(r: int = 4, k: int = 64, n: int = 48, *, seed: int = 1) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(seed)
    return torch.randn(r, k), torch.randn(n, r)


def delta(
    x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, alpha: float | None, strength: float
) -> torch.Tensor:
    """What a LoRA adds, one element at a time in float64."""
    rank = down.shape[0]
    factor = strength * (rank if alpha is None else alpha) / rank
    rows, down, up = x.double().reshape(-1, x.shape[-1]).tolist(), down.tolist(), up.tolist()
    out = torch.zeros(len(rows), len(up), dtype=torch.float64)
    for m, row in enumerate(rows):
        inner = [sum(a * b for a, b in zip(row, d, strict=True)) for d in down]
        for n, u in enumerate(up):
            out[m, n] = factor * sum(a * b for a, b in zip(inner, u, strict=True))
    return out.reshape(*x.shape[:-1], len(up))


@pytest.mark.parametrize(("alpha", "strength"), [(None, 1.0), (8.0, 0.7), (1.0, -0.3)])
@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 0, 64), (2, 3, 2, 64)])
def test_plain_linear_in_fp32_agrees_with_the_loop(shape, alpha, strength):
    layer = linear(dtype=torch.float32)
    down, up = factors()
    x = torch.randn(shape)
    expected = x.double() @ layer.weight.double().t() + layer.bias.double()
    expected = expected + delta(x, down, up, alpha, strength)
    attach_lora(layer, down, up, alpha, strength)
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_delta_is_added_to_the_product_and_sees_no_scale(kind):
    layer = layer_of(kind)
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    base = layer(x)
    down, up = (factor.bfloat16() for factor in factors())
    attach_lora(layer, down, up, alpha=2.0, strength=0.5)
    got = layer(x).double() - base.double()
    expected = delta(x, down, up, 2.0, 0.5)
    assert expected.abs().max() > 5  # much more than what a weight scale of 2^-11 would leave
    torch.testing.assert_close(got, expected, rtol=2**-6, atol=2**-4)
    set_lora_strength(layer, 0.0)
    assert torch.equal(layer(x), base)
    assert detach_lora(layer) == 1
    assert torch.equal(layer(x), base)
    assert type(layer) is type(layer_of(kind))
    assert layer.state_dict().keys() == layer_of(kind).state_dict().keys()


@pytest.mark.parametrize("kind", ["plain", "fp8_e5m2_scaled", "fp4_scaled_fast"])
def test_several_loras_add_up_and_come_off_one_by_one(kind):
    layer = layer_of(kind)
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    base, one, other = layer(x), factors(4), factors(7, seed=2)
    attach_lora(layer, *one, name="one")
    attach_lora(layer, *other, alpha=3.5, name="other")
    both = delta(x, *one, None, 1.0) + delta(x, *other, 3.5, 1.0)
    torch.testing.assert_close((layer(x) - base).double(), both, rtol=0.03, atol=0.5)
    detach_lora(layer, "one")
    alone = delta(x, *other, 3.5, 1.0)
    torch.testing.assert_close((layer(x) - base).double(), alone, rtol=0.03, atol=0.5)
    detach_lora(layer, "other")
    assert torch.equal(layer(x), base)


@pytest.mark.parametrize("kind", KINDS)
def test_state_and_moves(kind):
    layer, other = layer_of(kind), layer_of(kind)
    attach_lora(layer, *factors(), alpha=3.0, strength=0.3, name="style")
    attach_lora(other, *factors(seed=2), name="style")
    names = {f"lora.style.{leaf}" for leaf in ("down", "up", "alpha", "strength")}
    assert names < layer.state_dict().keys()
    other.load_state_dict(layer.state_dict())
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    model = nn.Sequential(layer).to(torch.float16)
    style = layer.lora["style"]
    assert style.down.dtype == style.up.dtype == torch.float16
    assert style.strength.dtype == style.alpha.dtype == torch.float32
    assert model(x.half()).dtype == torch.float16
    assert {buffer.device.type for buffer in model.to("meta").buffers()} == {"meta"}


def test_a_pickled_linear_keeps_its_lora():
    layer = linear()
    attach_lora(layer, *factors())
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), layer(x))


def test_a_linear_of_another_class_keeps_its_own_forward():
    layer = WideLinear(64, 48).bfloat16()
    x = torch.randn(5, 64)
    base = layer(x)
    attach_lora(layer, *factors())
    assert isinstance(layer, WideLinear)
    assert layer(x).dtype == torch.float32
    expected = base.double() + delta(x, *(f.bfloat16() for f in factors()), None, 1.0)
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-4)
    detach_lora(layer)
    assert type(layer) is WideLinear
    assert torch.equal(layer(x), base)


@pytest.mark.parametrize("recipe", ["fp8_e4m3fn_scaled", "fp4_scaled"])
def test_quantising_takes_attached_loras_along(recipe):
    holder = nn.ModuleDict({"q": linear()})
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    attach_lora(holder["q"], *factors(), strength=0.5)
    [row] = quantize_(holder, recipe)
    assert row == ("q", "quantised", recipe)
    base = quantized(linear(), recipe)(x)
    expected = delta(x, *(f.bfloat16() for f in factors()), None, 0.5)
    torch.testing.assert_close((holder["q"](x) - base).double(), expected, rtol=0.03, atol=0.3)


# -- merging -------------------------------------------------------------------------------------


def merged(layer: nn.Linear, down: torch.Tensor, up: torch.Tensor, factor: float) -> torch.Tensor:
    return layer.weight.double() + factor * (up.double() @ down.double())


def test_merging_into_a_plain_linear():
    layer = linear(dtype=torch.float32)
    down, up = factors()
    expected = merged(layer, down, up, 0.5 * 2 / 4)
    address = layer.weight.data_ptr()
    merge_lora_(layer, down, up, alpha=2, strength=torch.tensor(0.5))
    torch.testing.assert_close(layer.weight.double(), expected, rtol=1e-5, atol=1e-6)
    assert layer.weight.data_ptr() == address
    assert isinstance(layer.weight, nn.Parameter)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_merging_after_quantising_requantises_the_sum(kind):
    layer = layer_of(kind)
    down, up = factors()
    sum_ = nn.Linear(64, 48)
    sum_.weight.data = (layer.dequantised().double() + 0.25 * up.double() @ down.double()).float()
    recipe = "fp8_e4m3fn_scaled_fast" if kind == "slab" else kind
    expected = quantized(sum_, recipe).dequantised()
    addresses = {name: buffer.data_ptr() for name, buffer in layer.named_buffers()}
    merge_lora_(layer, down, up, alpha=2.0, strength=0.5)
    # The sum made in fp32 may fall on the other side of a rounding boundary.
    differing = (layer.dequantised() - expected).abs() > 1e-6 * expected.abs()
    assert differing.float().mean() < 0.01
    assert {name: buffer.data_ptr() for name, buffer in layer.named_buffers()} == addresses


@pytest.mark.parametrize("recipe", ["fp8_e4m3fn_scaled_fast", "fp8_e4m3fn_scaled", "fp4_scaled"])
def test_merged_and_unmerged_agree(recipe):
    down, up = factors()
    x = torch.randn(33, 64, dtype=torch.bfloat16)
    before, after, unmerged = linear(), quantized(linear(), recipe), quantized(linear(), recipe)
    expected = x.double() @ merged(before, down, up, 0.1).t() + before.bias.double()
    merge_lora_(before, down, up, strength=0.1)
    merge_lora_(after, down, up, strength=0.1)
    attach_lora(unmerged, down, up, strength=0.1)
    error = [
        ((layer(x).double() - expected).norm() / expected.norm()).item()
        for layer in (quantized(before, recipe), after, unmerged)
    ]
    rounding = 0.12 if RECIPES[recipe].fp4 else 0.045
    assert error[0] < rounding
    assert error[1] < 1.5 * rounding  # rounded twice
    assert error[2] < rounding


# -- compiled ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "fp8_e4m3fn_scaled", "fp8_e5m2_fast", "fp4_scaled_fast"])
def test_changing_strength_recompiles_nothing(kind):
    layer = layer_of(kind)
    attach_lora(layer, *factors(), strength=0.25)
    attach_lora(layer, *factors(7, seed=2), name="other")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        results = [compiled(x)]
        for strength in (0.5, torch.tensor(-1.0), 0):
            assert set_lora_strength(layer, strength) == 1
            results.append(compiled(x))
            assert torch.equal(results[-1], layer(x))
    assert counter.frame_count == 1
    assert all(not torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("kind", ["plain", "fp8_e4m3fn_scaled"])
def test_a_compiled_caller_sees_loras_come_and_go(kind):
    model = nn.Sequential(layer_of(kind), nn.GELU())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        base = compiled(x)
        attach_lora(model[0], *factors())
        assert torch.equal(compiled(x), model(x))
        assert not torch.equal(compiled(x), base)
        attach_lora(model[0], *factors(seed=2), name="other")
        assert torch.equal(compiled(x), model(x))
        detach_lora(model, "other")
        assert torch.equal(compiled(x), model(x))
        detach_lora(model)
        assert torch.equal(compiled(x), base)


def test_a_quantised_block_with_loras_is_clean():
    torch.manual_seed(0)
    block = WanBlock(TINY).bfloat16().eval()
    quantize_(block, "fp8_e4m3fn_scaled_fast")
    layers = [layer for layer in block.modules() if isinstance(layer, QuantizedLinear)]
    for layer in layers:
        down, up = factors(4, layer.in_features, layer.out_features)
        attach_lora(layer, 0.1 * down, 0.1 * up)
    inputs = block_inputs(TINY, (1, 2, 3), dtype=torch.bfloat16)
    compiled = torch.compile(
        block, backend="contig_safe", fullgraph=True, options={"inner": "aot_eager"}
    )
    with torch.no_grad():
        first = compiled(*inputs)
        assert torch.equal(first, block(*inputs))
        assert set_lora_strength(block, 0.5) == len(layers) == 10
        assert torch.equal(compiled(*inputs), block(*inputs))
        assert not torch.equal(compiled(*inputs), first)
    (report,) = contig_pass.last_reports()  # one compile
    assert report.fixes == ()


# -- refusals ------------------------------------------------------------------------------------


def attach_twice() -> None:
    layer = linear()
    attach_lora(layer, *factors(), name="style")
    attach_lora(layer, *factors(), name="style")


def detach_unknown() -> None:
    layer = linear()
    attach_lora(layer, *factors(), name="style")
    detach_lora(layer, "motion")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: attach_lora(nn.Conv1d(4, 4, 1), *factors()), "Conv1d takes no LoRA"),
        (
            lambda: attach_lora(linear(), *factors()[::-1]),
            r"down \(48, 4\) and up \(4, 64\) do not fit a linear of K=64 and N=48: use \(r, 64\)",
        ),
        (lambda: merge_lora_(linear(), *factors(k=32)), r"down \(4, 32\)"),
        (lambda: attach_lora(linear(), factors(3)[0], factors(4)[1]), r"down \(3, 64\) and up"),
        (lambda: attach_lora(linear(), *factors(0)), r"down \(0, 64\)"),
        (lambda: attach_lora(linear(), *(f.int() for f in factors())), "torch.int32"),
        (lambda: attach_lora(linear(), *factors(), alpha=torch.ones(2)), r"alpha has shape \(2,\)"),
        (lambda: attach_lora(linear(), *factors(), name="a.b"), "name='a.b'"),
        (lambda: attach_lora(linear(), *factors(), name="keys"), "name='keys'"),
        (lambda: attach_lora(linear(), *factors(), name=""), "name=''"),
        (attach_twice, "Linear.* has a LoRA called 'style': detach it first"),
        (detach_unknown, "no linear of Linear.* has a LoRA called 'motion': there are 'style'"),
        (lambda: set_lora_strength(linear(), 0.5), "called 'lora': there are none"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
