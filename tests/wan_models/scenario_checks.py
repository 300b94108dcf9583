"""What the scenarios' kernels receive and how near their values are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tests.wan_models.scenarios import Scenario, exact, quantised_layers, wide
from wan_models.attention import WanSelfAttention
from wan_models.quant import RECIPES, QuantizedLinear
from wan_models.quant.fp4 import Fp4Linear
from wan_models.quant.fp4_ops import FEW_ROWS
from wan_models.quant.nvfp4 import nvfp4_to_e4m3
from wan_models.quant.producers import all_take_rows
from wan_models.recorder import Received, digest

#: Relative difference of compiled code to eager mode: sums whose last bits depend on the order.
#: Inductor rounds where eager mode does if it is told to, on a CPU from torch 2.13 on; before,
#: values near the middle of two FP8 numbers fall to either side. Measured there: up to 0.016.
COMPILED = 1e-3 if torch.__version__ >= "2.13" else 0.03


def multiplied(layer: QuantizedLinear) -> torch.Tensor:
    """The (N, K) matrix that a fast recipe's product reads."""
    if isinstance(layer, Fp4Linear):
        return nvfp4_to_e4m3(layer.stored())[0]
    return layer.weight


def fast_layers(module: nn.Module, inputs: tuple | None = None) -> dict[str, str]:
    """Names of the layers that multiply by a scaled product, by their weights' digest.

    Layers of FP4 dequantise the weight inside the product for few rows, and use none then: give
    the module's ``inputs`` to leave these out.
    """
    rows: dict[str, int] = {}
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, name=name: rows.update({name: args[0].shape[:-1].numel()})
        )
        for name, layer in quantised_layers(module).items()
    ]
    if inputs is not None:
        with torch.no_grad():
            module(*inputs)
    for hook in hooks:
        hook.remove()

    def few(name: str, layer: QuantizedLinear) -> bool:
        return isinstance(layer, Fp4Linear) and rows.get(name, FEW_ROWS + 1) <= FEW_ROWS

    return {
        digest(multiplied(layer)): name
        for name, layer in quantised_layers(module).items()
        if layer.fast and not few(name, layer)
    }


def objections(received: Sequence[Received]) -> list[str]:
    """What an H100 would object to, by the measured demands: plain arithmetic on each operand."""
    found = []
    for one in received:
        if one.address:
            found.append(f"{one.operand} {one.shape} at {one.address} mod 16")
        if one.operand == "bias":
            if one.strides != (1,):
                found.append(f"bias with stride {one.strides}")
            continue
        pitch, unit = one.strides if one.operand == "a" else one.strides[::-1]
        columns = one.shape[1] if one.operand == "a" else one.shape[0]
        if unit != 1 or pitch < columns or pitch * one.itemsize % 16:
            found.append(f"{one.operand} {one.shape} with strides {one.strides}")
    return found


def expected_uses(scenario: Scenario, module: nn.Module) -> int:
    """Uses that a contract binds: the matrices, scales and biases of the products, and q, k, v."""
    products = [layer for layer in quantised_layers(module).values() if layer.fast]
    uses = 3 * scenario.attentions
    for layer in products:
        uses += layer.bias is not None
        if isinstance(layer, Fp4Linear):
            uses += 3  # one op: input, codes, block scales
        else:
            uses += 4 + layer.by_row  # and the input of the op that quantises rows
    for part in module.modules():
        if isinstance(part, WanSelfAttention) and all_take_rows([part.q, part.k]):
            uses += 6  # input, weight and table of the norm with rotary, twice
    return uses


def results(out: Any) -> tuple[torch.Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def tolerance(recipe: str) -> float:
    """Relative error that a recipe may have to its own dequantised weights, in float64.

    bf16 alone: measured 0.006. Activations in e4m3 as well: 0.05. Weights that a fast FP4 recipe
    rounds to e4m3 besides: 0.06.
    """
    if not RECIPES[recipe].fast:
        return 0.01
    return 0.08 if RECIPES[recipe].fp4 else 0.06


def assert_values(
    scenario: Scenario, module: nn.Module, inputs: tuple, got: tuple, recipe: str
) -> None:
    """Every result within the tolerance of the float64 reference."""
    with torch.no_grad():
        expected = scenario.expected(exact(module), wide(inputs), got)
    for one, other in zip(got, expected, strict=True):
        assert one.shape == other.shape
        assert error(one, other) < tolerance(recipe)


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, in the Euclidean norm."""
    return ((actual.double() - expected).norm() / expected.norm()).item()
