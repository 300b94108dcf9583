"""``python -m benchmarks gemm``: the products of a Wan block, alone and with their quantisation.

Rows named "GEMM only" multiply operands that were quantised beforehand; rows named "quantisation
counted" start from bf16 activations, compiled. Weights are quantised beforehand in all rows.
Accuracy is that of 512 rows of the result against fp32, on Gaussian activations and on ones with
outlier channels; the worse of the two is what counts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.speed import ours
from benchmarks.speed.accuracy import (
    GAUSSIAN,
    OUTLIERS,
    cosine,
    normal,
    relative_l1,
    some_rows,
    with_outliers,
    worst,
)
from benchmarks.speed.bars import ACCURACY, COUNTED, GEMM_ONLY, OURS_GEMM
from benchmarks.speed.command import Command
from benchmarks.speed.measure import Settings
from benchmarks.speed.rows import Group, Prepared, Row, Shared, Task, Unavailable
from benchmarks.speed.sizes import SIZES, SMOKE, linear_shapes
from wan_models.quant import RECIPES, quantized
from wan_models.quant.fused import quantise_rows
from wan_models.quant.rows import Deferred, QuantizedRows
from wan_models.quant.rows_linear import deferred

E4M3 = torch.float8_e4m3fn
_LIMIT, _TINY = 448.0, 1e-12
_CHECKED_ROWS = 512
Product = Callable[[torch.Tensor], torch.Tensor]


class Operands(NamedTuple):
    """Activations by kind, (M, K) bf16; a linear K to N; the rows that are checked."""

    x: dict[str, torch.Tensor]
    linear: nn.Linear
    rows: torch.Tensor

    def wanted(self, kind: str) -> torch.Tensor:
        """The checked rows of the exact product."""
        x = self.x[kind][self.rows].float()
        return F.linear(x, self.linear.weight.float(), self.linear.bias.float())


def plan(settings: Settings, args: argparse.Namespace) -> list[Group]:
    """A group for each shape and resolution."""
    groups = []
    for resolution in settings.resolutions:
        size = (SMOKE if settings.smoke else SIZES)[resolution]
        shapes = linear_shapes(size.config)
        if settings.smoke:  # the same code runs for each
            shapes = {name: shapes[name] for name in ("projection", "feed-forward in")}
        for name, (k, n) in shapes.items():
            groups.append(_group(f"{resolution} {name}", size.tokens, k, n, settings))
    return groups


def _group(title: str, m: int, k: int, n: int, settings: Settings) -> Group:
    shared = Shared(lambda: _operands(m, k, n, settings.device))
    flops = 2.0 * m * k * n

    def task(
        name: str, counts: str, prepare: Callable[[Operands], Callable[[str], Product]], *,
        accuracy: str = "fp8 linear", peak: str = "fp8", required: bool = False,
    ) -> Task:
        of_x, of_weight = (2, 2) if peak == "bf16" else (1 if counts == GEMM_ONLY else 2, 1)
        row = Row(
            title, name, counts, required=required, flops=flops, peak=peak,
            moved=float(of_x * m * k + of_weight * k * n + 2 * m * n),
            limits=dict(ACCURACY[accuracy]) if required else {},
        )
        return Task(row, lambda: _prepared(shared(), prepare))

    def counted(formula: Callable[[torch.Tensor, Operands], Product]) -> Callable:
        """Compiled by plain Inductor once, for both kinds of activations."""

        def prepare(operands: Operands) -> Callable[[str], Product]:
            function = ours.inductor(formula(operands.linear.weight, operands), settings)
            return lambda kind: lambda: function(operands.x[kind])

        return prepare

    tasks = [
        task("bf16", "", lambda o: lambda kind: lambda: o.linear(o.x[kind]), peak="bf16"),
        task("tensor-wise", GEMM_ONLY, _tensor_wise_alone),
        task("row-wise", GEMM_ONLY, _row_wise_alone),
        task("static scale 1", COUNTED, counted(_static)),
        task("dynamic tensor-wise", COUNTED, counted(_tensor_wise)),
        task("row-wise", COUNTED, counted(_row_wise)),
    ]
    for name, recipe, accuracy, required in (
        (OURS_GEMM, "fp8_e4m3fn_rowwise_fast", "fp8 linear", True),
        ("ours, dynamic tensor-wise", "fp8_e4m3fn_dynamic_fast", "fp8 linear", False),
        ("ours, static scale 1", "fp8_e4m3fn_scaled_fast", "fp8 linear", False),
        ("ours, FP4 weights", "fp4_scaled_fast", "fp4 linear", False),
    ):
        tasks.append(
            task(name, COUNTED, _recipe(recipe, settings), accuracy=accuracy, required=required)
        )
    deferred = "ours, row-wise, scales left to the consumer"
    tasks += [task(deferred, GEMM_ONLY, _deferred_alone), task(deferred, COUNTED, _deferred)]
    return Group(title, tasks, [shared])


def _operands(m: int, k: int, n: int, device: str) -> Operands:
    x = normal(m, k, device=device, seed=0)
    with torch.device("meta"):
        linear = nn.Linear(k, n).bfloat16()
    return Operands(
        {GAUSSIAN: x, OUTLIERS: with_outliers(x)},
        ours.fill(linear, device, 1),
        some_rows(m, _CHECKED_ROWS, device),
    )


def _prepared(operands: Operands, prepare: Callable[[Operands], Callable]) -> Prepared:
    product = prepare(operands)

    def accuracy() -> dict[str, float]:
        results = {}
        for kind in operands.x:
            made, rows, want = product(kind)(), operands.rows, operands.wanted(kind)
            got = some(made, rows)
            results[kind] = {"cosine": cosine(got, want), "relative L1": relative_l1(got, want)}
        return worst(results)

    return Prepared(product(GAUSSIAN), accuracy)


def some(made: torch.Tensor | Deferred, rows: torch.Tensor) -> torch.Tensor:
    """Some rows of a product; of a deferred one, as its consumer sees them."""
    if isinstance(made, Deferred):
        return made._replace(sums=made.sums[rows], row_scale=made.row_scale[rows]).wide()
    return made[rows]


# -- formulas ------------------------------------------------------------------------------------


def by_tensor(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 values and one scale, amax / 448."""
    scale = x.abs().amax().float().clamp(min=_TINY) / _LIMIT
    return (x.float() / scale).clamp(-_LIMIT, _LIMIT).to(E4M3), scale


def by_row(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 values and a scale (M, 1) for each row."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=_TINY) / _LIMIT
    return (x.float() / scale).clamp(-_LIMIT, _LIMIT).to(E4M3), scale


def _product(
    values: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor,
    bias: torch.Tensor,
) -> torch.Tensor:
    return torch._scaled_mm(
        values, weight.t(), scale_a=scale, scale_b=weight_scale, bias=bias,
        out_dtype=torch.bfloat16,
    )


def _tensor_wise_alone(o: Operands) -> Callable[[str], Product]:
    weight, scale = by_tensor(o.linear.weight)

    def of(kind: str) -> Product:
        values, row_scale = by_tensor(o.x[kind])
        return lambda: _product(values, row_scale, weight, scale, o.linear.bias)

    return of


def _row_wise_alone(o: Operands) -> Callable[[str], Product]:
    weight, column_scale = _weight_by_row(o.linear.weight)

    def of(kind: str) -> Product:
        values, row_scale = by_row(o.x[kind])
        return lambda: _product(values, row_scale, weight, column_scale, o.linear.bias)

    return of


def _static(linear_weight: torch.Tensor, o: Operands) -> Product:
    weight, scale = by_tensor(linear_weight)
    one, bias = torch.ones_like(scale), o.linear.bias
    return lambda x: _product(x.clamp(-_LIMIT, _LIMIT).to(E4M3), one, weight, scale, bias)


def _tensor_wise(linear_weight: torch.Tensor, o: Operands) -> Product:
    weight, scale = by_tensor(linear_weight)
    return lambda x: _product(*by_tensor(x), weight, scale, o.linear.bias)


def _row_wise(linear_weight: torch.Tensor, o: Operands) -> Product:
    weight, column_scale = _weight_by_row(linear_weight)
    return lambda x: _product(*by_row(x), weight, column_scale, o.linear.bias)


def _weight_by_row(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values (N, K), and scales (1, N) as ``_scaled_mm`` wants those of its second operand."""
    if not weight.is_cuda and torch.__version__ < "2.12":
        raise Unavailable("row-wise _scaled_mm on a CPU needs torch 2.12 or later")
    values, scale = by_row(weight)
    return values, scale.t().contiguous()


def _recipe(name: str, settings: Settings) -> Callable[[Operands], Callable[[str], Product]]:
    """One of our layers under contig_safe."""

    def prepare(o: Operands) -> Callable[[str], Product]:
        if name not in RECIPES:
            raise Unavailable(f"wan_models.quant has no recipe {name!r}")
        function = ours.compiled(quantized(o.linear, name), settings)
        # A batch dimension, as the model has one.
        return lambda kind: lambda: function(o.x[kind][None])[0]

    return prepare


def _deferred_alone(o: Operands) -> Callable[[str], Any]:
    return _deferring(o, counted=False)


def _deferred(o: Operands) -> Callable[[str], Any]:
    return _deferring(o, counted=True)


def _deferring(o: Operands, *, counted: bool) -> Callable[[str], Any]:
    """The bare product as blocks take it, whose consumer applies the scales as it reads it."""
    weight, scale = by_row(o.linear.weight)
    column_scale = scale.flatten()

    def quantised(x: torch.Tensor) -> QuantizedRows:
        values, row_scale = quantise_rows(x[None])
        return QuantizedRows(values[0], row_scale[0], x.dtype)

    def of(kind: str) -> Any:
        made = None if counted else quantised(o.x[kind])
        return lambda: deferred(made or quantised(o.x[kind]), weight, column_scale, o.linear.bias)

    return of


COMMAND = Command(
    "gemm", "the linears' products, with and without quantisation", plan,
    columns=("prepare s",),
)
