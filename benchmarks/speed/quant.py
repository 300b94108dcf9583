"""``python -m benchmarks quant``: passes that make an 8-bit operand, against a device copy.

Each producer stands there twice: as its formula compiled by plain Inductor, and as our op. The
rate counts the bytes that have to be moved, each tensor once, so that a pass that reads its input
again shows as a lower rate. Accuracy is that of the values times their scales against the formula
in fp32, without rounding. The operands of attention are in
:mod:`benchmarks.speed.quant_attention`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from benchmarks.speed import ours, quant_attention
from benchmarks.speed.accuracy import cosine, normal, some_rows
from benchmarks.speed.command import Command
from benchmarks.speed.gemm import by_row
from benchmarks.speed.measure import Settings
from benchmarks.speed.rows import Group, Prepared, Row, Shared, Task, Unavailable
from benchmarks.speed.sizes import SIZES, SMOKE, Size
from wan_models.layers import modulate
from wan_models.quant import RECIPES

_COPY = "device copy"
_CHECKED_ROWS = 512
INDUCTOR, OURS = "formula, Inductor", "ours"


class Inputs(NamedTuple):
    """What producers read: activations (1, L, C) and (1, L, F), modulation (1, 1, C) fp32."""

    x: torch.Tensor
    branch: torch.Tensor
    hidden: torch.Tensor
    shift: torch.Tensor
    scale: torch.Tensor
    gate: torch.Tensor


class Producer(NamedTuple):
    """One pass.

    Attributes:
        name: of the row.
        moved: bytes a token, given C and F.
        exact: the tensor that is quantised, in fp32.
        formula: (values, scale) in torch.
        op: name of our op, and its arguments.
    """

    name: str
    moved: Callable[[int, int], int]
    exact: Callable[[Inputs], torch.Tensor]
    formula: Callable[[Inputs], Sequence[torch.Tensor]]
    op: str
    arguments: Callable[[Inputs], tuple[Any, ...]]


def _normed(i: Inputs, x: torch.Tensor) -> torch.Tensor:
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=1e-6).to(x.dtype)
    return modulate(normed, i.shift, i.scale).to(x.dtype)


def _summed(i: Inputs) -> torch.Tensor:
    return (i.x.float() + i.branch.float() * i.gate).to(i.x.dtype)


def _exactly_normed(i: Inputs, x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x.float(), x.shape[-1:], eps=1e-6) * (1 + i.scale) + i.shift


def _sum_norm_quantise(i: Inputs) -> tuple[torch.Tensor, ...]:
    total = _summed(i)
    return total, *by_row(_normed(i, total))


PRODUCERS = (
    Producer(
        "quantise", lambda c, f: 3 * c, lambda i: i.x.float(), lambda i: by_row(i.x),
        "quantise_rows", lambda i: (i.x,),
    ),
    Producer(
        "norm, modulate, quantise", lambda c, f: 3 * c,
        lambda i: _exactly_normed(i, i.x), lambda i: by_row(_normed(i, i.x)),
        "norm_quantise", lambda i: (i.x, None, None, i.shift, i.scale, 1e-6),
    ),
    Producer(
        "residual, gate, norm, modulate, quantise", lambda c, f: 7 * c,
        lambda i: _exactly_normed(i, _summed(i)), _sum_norm_quantise,
        "add_norm_quantise",
        lambda i: (
            i.x, i.branch, i.gate, None, None, i.shift, i.scale, 1e-6,
        ),
    ),
    Producer(
        "GELU, quantise", lambda c, f: 3 * f,
        lambda i: F.gelu(i.hidden.float(), approximate="tanh"),
        lambda i: by_row(F.gelu(i.hidden, approximate="tanh")),
        "gelu_quantise", lambda i: (i.hidden[0], None, None, None),
    ),
)


def plan(settings: Settings, args: argparse.Namespace) -> list[Group]:
    """A group for each resolution."""
    return [
        _group((SMOKE if settings.smoke else SIZES)[name], settings)
        for name in settings.resolutions
    ]


def _group(size: Size, settings: Settings) -> Group:
    shared = Shared(lambda: _inputs(size, settings.device))
    dim, ffn = size.config.dim, size.config.ffn_dim

    def row(name: str, moved: int, *, required: bool = False, counts: str = "") -> Row:
        limits = dict(quant_attention.LEAST) if required else {}
        return Row(
            size.name, name, counts, required=required, moved=float(size.tokens * moved),
            limits=limits,
        )

    def copy() -> Prepared:
        x = shared().x
        target = torch.empty_like(x)
        return Prepared(lambda: target.copy_(x))

    tasks = [Task(row(_COPY, 4 * dim), copy)]
    for producer in PRODUCERS:
        moved = producer.moved(dim, ffn)
        tasks += [
            Task(row(producer.name, moved, counts=INDUCTOR), _formula(producer, shared, settings)),
            Task(row(producer.name, moved, counts=OURS, required=True), _op(producer, shared)),
        ]
    of_attention, projections = quant_attention.tasks(size, settings, INDUCTOR, OURS)
    weight = Row(
        size.name, "FP4 weight to e4m3", OURS, moved=dim * ffn * (0.5 + 1 / 16 + 1)
    )
    tasks += [*of_attention, Task(weight, _expansion(size, settings))]
    return Group(size.name, tasks, [shared, projections])


def _inputs(size: Size, device: str) -> Inputs:
    config = size.config

    def made(seed: int, width: int) -> torch.Tensor:
        return normal(1, size.tokens, width, device=device, seed=seed)

    def modulation(seed: int) -> torch.Tensor:
        return normal(1, 1, config.dim, device=device, seed=seed, std=0.3, dtype=torch.float32)

    return Inputs(
        made(0, config.dim), made(1, config.dim), made(2, config.ffn_dim),
        modulation(3), modulation(4), modulation(5),
    )


def _accuracy(
    producer: Producer, call: Callable[[], Sequence[torch.Tensor]], inputs: Inputs
) -> Callable[[], dict[str, float]]:
    def measured() -> dict[str, float]:
        values, scale = (t.reshape(-1, t.shape[-1]) for t in call()[-2:])
        rows = some_rows(values.shape[0], _CHECKED_ROWS, values.device.type)
        few = _few(inputs, rows)
        got = values[rows].float() * scale[rows]
        return {"cosine": cosine(got, producer.exact(few)[0])}

    return measured


def _few(inputs: Inputs, rows: torch.Tensor) -> Inputs:
    return inputs._replace(
        x=inputs.x[:, rows], branch=inputs.branch[:, rows], hidden=inputs.hidden[:, rows]
    )


def _formula(
    producer: Producer, shared: Shared[Inputs], settings: Settings
) -> Callable[[], Prepared]:
    def prepare() -> Prepared:
        inputs = shared()
        function = ours.inductor(producer.formula, settings)

        def call() -> Any:
            return function(inputs)

        return Prepared(call, _accuracy(producer, call, inputs))

    return prepare


def _op(producer: Producer, shared: Shared[Inputs]) -> Callable[[], Prepared]:
    def prepare() -> Prepared:
        op = ours.op(producer.op)
        inputs = shared()

        def call() -> Any:
            return op(*producer.arguments(inputs))

        return Prepared(call, _accuracy(producer, call, inputs))

    return prepare


def _expansion(size: Size, settings: Settings) -> Callable[[], Prepared]:
    """The pass over a weight that FP4 costs on a GPU without FP4 products."""

    def prepare() -> Prepared:
        op = ours.op("expand_fp4")
        if "fp4_scaled_fast" not in RECIPES:
            raise Unavailable("wan_models.quant has no recipe 'fp4_scaled_fast'")
        n, k = size.config.ffn_dim, size.config.dim
        generator = torch.Generator(settings.device).manual_seed(0)
        packed = torch.randint(
            0, 256, (n, k // 2), dtype=torch.uint8, device=settings.device, generator=generator
        )
        scales = torch.ones(n, k // 16, device=settings.device).to(torch.float8_e4m3fn)
        return Prepared(lambda: op(packed, scales))

    return prepare


def finish(rows: list[Row]) -> str:
    """Rates as a part of the copy's, which is what this machine's memory gives."""
    copy = next((row.tbs for row in rows if row.name == _COPY and row.tbs), None)
    if copy:
        for row in rows:
            if row.tbs:
                row.figures["% of copy"] = 100 * row.tbs / copy
    return ""


COMMAND = Command(
    "quant", "passes that make 8-bit operands, against a device copy", plan, finish=finish,
    columns=("% of copy", "prepare s"),
)
