"""The five scenarios by every other recipe, and on a column-major stream, without a compiler."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import contig_pass
from tests.wan_models import scenario_checks as checks
from tests.wan_models.scenarios import SCENARIOS, TOKENS, ImageToVideo
from wan_models.quant import RECIPES
from wan_models.recorder import recording

OTHERS = [
    (name, recipe) for name in SCENARIOS for recipe in RECIPES
    if recipe != SCENARIOS[name].seed_recipe
]


def compiled(model: torch.nn.Module, **options: Any) -> Any:
    return torch.compile(
        model, backend="contig_safe", fullgraph=True, options={"inner": "aot_eager", **options}
    )


@pytest.mark.parametrize(("name", "recipe"), OTHERS)
def test_recipe(name: str, recipe: str) -> None:
    scenario = SCENARIOS[name]
    # For one sample and for two, so that either kind of a recipe meets both.
    batch = 1 + (list(RECIPES).index(recipe) + list(SCENARIOS).index(name)) % 2
    model, inputs = scenario.quantised(recipe), scenario.inputs(batch)
    # The CPU's own scaled product takes seconds here; the recorder's is a float product.
    with torch.no_grad(), recording() as received:
        eager = checks.results(model(*inputs))
        out = checks.results(compiled(model)(*inputs))
    for one, other in zip(out, eager, strict=True):
        assert torch.equal(one, other)
    checks.assert_values(scenario, model, inputs, out, recipe)
    assert {one.weight for one in received} == set(checks.fast_layers(model, inputs))
    assert checks.objections(received) == []
    (report,) = contig_pass.last_reports()
    assert report.totals.uses == checks.expected_uses(scenario, model)
    assert report.clean


@pytest.mark.parametrize("batch", [1, 2])
def test_an_image_in_front_of_the_text(batch: int) -> None:
    """The other form of the same inputs: slices of one context, which for two samples are not
    dense."""
    scenario = SCENARIOS["image cross-attention"]
    scenario = scenario._replace(module=lambda: ImageToVideo(concatenated=True))
    model, inputs = scenario.quantised("fp4_scaled_fast"), scenario.inputs(batch)
    with torch.no_grad(), recording() as received:
        out = checks.results(compiled(model)(*inputs))
    checks.assert_values(scenario, model, inputs, out, "fp4_scaled_fast")
    assert {one.weight for one in received} == set(checks.fast_layers(model, inputs))
    assert checks.objections(received) == []
    (report,) = contig_pass.last_reports()
    assert report.totals.uses == checks.expected_uses(scenario, model)
    assert report.clean


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_column_major_stream(name: str, batch: int) -> None:
    """Video tokens as patchify's ``flatten(2).transpose(1, 2)`` leaves them, without a norm."""
    scenario = SCENARIOS[name]
    model = scenario.quantised(scenario.seed_recipe)
    x, *others = scenario.inputs(batch)
    stream = x.transpose(1, 2).contiguous().transpose(1, 2)
    with torch.no_grad(), recording() as received:
        expected = checks.results(model(x, *others))
        assert checks.objections(received) == []
        received.clear()
        eager = checks.results(model(stream, *others))
        # Rows of several samples do not merge, so they are copied, and that makes them dense.
        readers = {"MultiTalk": 3, "self-attention": 3}.get(name, 1) if batch == 1 else 0
        # An op of FP4 quantises rows whatever their layout, and multiplies what it made.
        within = scenario.seed_recipe == "fp4_scaled_fast"
        said = f"a ({TOKENS}, 256) with strides (1, {TOKENS})"
        assert checks.objections(received) == [said] * (0 if within else readers)
        received.clear()
        out = checks.results(compiled(model)(stream, *others))
        assert checks.objections(received) == []
    for got in (eager, out):
        for one, other in zip(got, expected, strict=True):
            assert torch.equal(one, other)
    (report,) = contig_pass.last_reports()
    assert report.totals.fixed_uses == readers
    assert report.skips == ()
    for row in report.fixes:
        used = ("wan_models::fp4_weight_linear", "x") if within else ("aten::_scaled_mm", "self")
        assert (row.op.removesuffix(".default"), row.operand) == used
        assert (row.before.strides, row.after.strides) == ((1, TOKENS), (256, 1))
        assert ("last dimension" if within else "row-major") in row.reason
