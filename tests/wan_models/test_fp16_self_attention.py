"""Self-attention and the block in mode "fp16": where q, k and v are made as the kernel takes them.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import contig_pass
from tests.wan_models.attention_cases import exact, relative_error
from wan_models import TINY, WanBlock, WanModel, addons, block_inputs, quantize_
from wan_models.attention import WanSelfAttention, fp16
from wan_models.layers import WanRMSNorm
from wan_models.quant import attach_lora
from wan_models.quant.fused import rows_of
from wan_models.rope import rope_table
from wan_models.vace import VaceBlock

BF16, HALF = torch.bfloat16, torch.float16
ROWWISE, FP4 = "fp8_e4m3fn_rowwise_fast", "fp4_scaled_fast"


def layer(recipe: str | None, dtype: torch.dtype = BF16) -> WanSelfAttention:
    torch.manual_seed(0)
    made = WanSelfAttention(192, 3, mode="fp16")
    for norm in (made.norm_q, made.norm_k):
        nn.init.normal_(norm.weight, 1, 0.3)
    made = made.to(dtype).eval().requires_grad_(False)
    if recipe:
        quantize_(made, recipe)
    return made


def states(dtype: torch.dtype = BF16, rows: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, 15 * rows, 192).to(dtype), rope_table((3, rows, 5), 64)


def by_steps(attn: WanSelfAttention, x, table, lens=None) -> torch.Tensor:
    return attn.o(attn.attend(*attn.project(x, table), lens).flatten(2))


@pytest.fixture
def stepwise(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Calls of :func:`fp16.run`, which the fused path goes around."""
    seen, kept = [], fp16.run
    monkeypatch.setattr(fp16, "run", lambda *args: seen.append(args) or kept(*args))
    return seen


@pytest.mark.parametrize("recipe", [ROWWISE, FP4])
@pytest.mark.parametrize("dtype", [BF16, HALF])
@pytest.mark.parametrize("tokens", [60, 55])
def test_the_layer_makes_what_the_kernel_takes(stepwise, recipe, dtype, tokens):
    """A table may be for fewer tokens than there are."""
    attn, (x, table) = layer(recipe, dtype), states(dtype)
    attn.o, rows, table = nn.Identity(), rows_of(x), table[:, :tokens]
    out = attn(rows, table)
    assert not stepwise
    assert out.dtype == dtype
    expected = exact(*attn.project(rows, table)).flatten(2)
    assert relative_error(out, expected) < (0.004 if dtype == BF16 else 0.001)


@pytest.mark.parametrize("recipe", [ROWWISE, FP4])
def test_the_layer_is_one_graph_of_fp16_operands(recipe):
    nodes = []

    def backend(graph, _):
        nodes.extend(n for n in graph.graph.nodes if "wan_models" in str(n.target))
        return graph

    x, table = states()
    attn = layer(recipe)
    run = torch.compile(lambda x: attn(rows_of(x), table), backend=backend, fullgraph=True)
    assert torch.equal(run(x), attn(rows_of(x), table))
    (kernel,) = (n for n in nodes if "fp16_attention" in str(n.target))
    assert kernel.args[4] == BF16
    q, k = kernel.args[:2]
    for made, scale in ((q, True), (k, False)):
        assert "norm_rope" in str(made.target)
        assert (True in made.args, HALF in made.args) == (scale, True)
    assert kernel.args[2].meta["example_value"].dtype == HALF
    assert sum(HALF in n.args for n in nodes) == 3  # with the product that is v


@pytest.mark.parametrize(
    "case", ["lora q", "lora k", "lora v", "lengths", "norm", "subclass", "plain", "rows", "scaled"]
)
def test_the_layer_takes_steps_elsewhere(stepwise, case):
    recipe = {"plain": None, "scaled": "fp8_e4m3fn_scaled_fast"}.get(case, ROWWISE)
    attn, (x, table) = layer(recipe), states()
    given = x if case in ("plain", "rows", "scaled") else rows_of(x)
    lens = torch.tensor([60, 21]) if case == "lengths" else None
    if case.startswith("lora"):
        attach_lora(getattr(attn, case[-1]), torch.randn(4, 192), torch.randn(192, 4) / 9)
    elif case == "norm":
        attn.norm_k = nn.Identity()
    elif case == "subclass":
        attn.norm_q = type("Other", (WanRMSNorm,), {})(192).to(BF16).requires_grad_(False)
    out = attn(given, table, lens)
    assert len(stepwise) == 1
    assert torch.equal(out, by_steps(attn, given, table, lens))


def test_a_table_for_too_many_tokens_is_named():
    attn, (x, table) = layer(ROWWISE), states()
    with pytest.raises(ValueError, match="table is for 60 tokens of head dimension 64, got 59 "):
        attn(rows_of(x[:, :59]), table)


def test_one_graph_for_several_lengths():
    attn = layer(ROWWISE)
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(
        lambda x, table: attn(rows_of(x), table), backend="contig_safe", fullgraph=True,
        dynamic=True, options={"inner": "aot_eager"},
    )
    for rows in (4, 6, 20):
        x, table = states(rows=rows)
        torch._dynamo.mark_static(x, 2)  # else no pitch is known to be a multiple of anything
        assert torch.equal(compiled(x, table), attn(rows_of(x), table))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    (report,) = contig_pass.last_reports()
    assert report.totals.fixes == 0


# -- the block ------------------------------------------------------------------------------------


def modes_of(module: nn.Module) -> dict[str, set[str]]:
    """Modes of self-attention, and of all other attention, in a model."""
    made = {"self_attn": set(), "others": set()}
    for name, part in module.named_modules():
        if isinstance(getattr(part, "mode", None), str):
            made["self_attn" if name.endswith("self_attn") else "others"].add(part.mode)
    return made


def test_the_mode_is_for_self_attention():
    assert WanBlock(TINY, mode="fp16").cross_attn.mode == "auto"
    assert modes_of(VaceBlock(TINY, "fp16")) == {"self_attn": {"fp16"}, "others": {"auto"}}
    model = WanModel(TINY, mode="fp16")
    for name in ("multitalk", "humo", "mtvcrafter", "fantasytalking", "fantasyportrait", "ovi"):
        addons.attach(model, name)
    assert modes_of(model) == {"self_attn": {"fp16"}, "others": {"auto"}}
    assert model.blocks[0].audio_cross_attn.mode == model.blocks[0].motion_attn.mode == "auto"


@pytest.mark.parametrize("recipe", [ROWWISE, FP4])
def test_a_block_is_near_that_of_sdpa(stepwise, recipe):
    made = []
    for mode in ("fp16", "sdpa"):
        torch.manual_seed(0)
        block = WanBlock(TINY, mode).to(BF16).eval().requires_grad_(False)
        quantize_(block, recipe)
        x, *others = block_inputs(TINY, (3, 4, 5), dtype=BF16)
        made.append(block(x, *others).double() - x.double())
    assert not stepwise
    assert relative_error(*made) < 0.03  # measured 0.021 and 0.018
