"""The five scenarios under real Inductor, one graph each, and eagerly, against float64."""

from __future__ import annotations

import pytest
import torch

import contig_pass
from tests.wan_models import scenario_checks as checks
from tests.wan_models import scenarios
from tests.wan_models.scenarios import SCENARIOS
from wan_models.recorder import Received, recording


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", SCENARIOS)
def test_compiled_and_eager(name: str, batch: int) -> None:
    scenario = SCENARIOS[name]
    recipe = scenario.seed_recipe
    model, inputs = scenario.quantised(recipe), scenario.inputs(batch)
    layers = checks.fast_layers(model)
    compiled = torch.compile(model, backend="contig_safe", fullgraph=True)
    runs = {}
    for run in (model, compiled):
        with torch.no_grad(), recording() as received:
            runs[run] = checks.results(run(*inputs))
        assert {one.weight for one in received} == set(layers)
        assert checks.objections(received) == []
        checks.assert_values(scenario, model, inputs, runs[run], recipe)
    for one, other in zip(runs[compiled], runs[model], strict=True):
        assert checks.error(one, other.double()) < checks.COMPILED
    (report,) = contig_pass.last_reports()
    assert report.totals.uses == checks.expected_uses(scenario, model)
    assert report.clean
    # What an opaque op returns can only be checked when the graph runs: here what norms turn.
    totals = report.totals
    assert (totals.clean + totals.checks, totals.fixes) == (totals.uses, 0)
    assert totals.checks in (0, 2)


@pytest.mark.parametrize(
    ("operand", "strides", "address", "words"),
    [
        ("a", (1, 32), 0, "strides"),
        ("a", (72, 1), 0, "strides"),
        ("a", (48, 1), 0, "strides"),
        ("a", (64, 1), 8, "mod 16"),
        ("b", (32, 1), 0, "strides"),
        ("b", (1, 72), 0, "strides"),
        ("b", (1, 64), 1, "mod 16"),
        ("bias", (2,), 0, "stride"),
        ("bias", (1,), 2, "mod 16"),
    ],
)
def test_what_counts_as_illegal(
    operand: str, strides: tuple[int, ...], address: int, words: str
) -> None:
    shape = {"a": (32, 64), "b": (64, 32), "bias": (32,)}[operand]
    itemsize = 2 if operand == "bias" else 1
    (said,) = checks.objections([Received("", operand, shape, strides, address, itemsize)])
    assert words in said
    legal = {"a": (80, 1), "b": (1, 80), "bias": (1,)}[operand]
    assert checks.objections([Received("", operand, shape, legal, 0, itemsize)]) == []


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_input_and_every_layer_is_felt(name: str) -> None:
    """By more than the largest tolerance, so that the values above test each of them."""
    scenario = SCENARIOS[name]
    model, inputs = scenario.quantised("fp8_e4m3fn_scaled"), scenarios.wide(scenario.inputs(2))
    with torch.no_grad():
        got = checks.results(model(*scenario.inputs(2)))
        right, *_ = scenario.expected(scenarios.exact(model), inputs, got)
        leaves, spec = torch.utils._pytree.tree_flatten(inputs)
        for index, leaf in enumerate(leaves):
            if not torch.is_tensor(leaf) or leaf.dtype != torch.float64:
                continue
            changed = [*leaves[:index], leaf.flip(-1), *leaves[index + 1 :]]
            changed = torch.utils._pytree.tree_unflatten(changed, spec)
            out, *_ = scenario.expected(scenarios.exact(model), changed, got)
            assert checks.error(out, right) > 0.1, index
        for layer_name in scenarios.quantised_layers(model):
            twin = scenarios.exact(model)
            twin.get_submodule(layer_name).weight.mul_(-1)
            out, *_ = scenario.expected(twin, inputs, got)
            assert checks.error(out, right) > 0.1, layer_name
