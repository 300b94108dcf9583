"""What a row runs: a module, its calls, how it is compiled and how many graphs that may make."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

import contig_pass
from benchmarks.coverage.blocks import blocks
from benchmarks.coverage.sizes import TINY, Draw
from benchmarks.coverage.variants import Variant, classes
from wan_models import WanModel, model_inputs, zoo
from wan_models.demo import FAULTS
from wan_models.quant import (
    RECIPES,
    QuantizedLinear,
    SlabLinear,
    attach_lora,
    high_precision,
    quantize_,
    set_lora_strength,
)

#: Kinds of entries, in the order of the table.
CLASS, BLOCK, MODEL, ONCE, CONTROL = "class", "block", "model", "compiles once", "control"
PLAIN = "bf16"
QUANTISATIONS = (PLAIN, *RECIPES)
#: One recipe of each kind of scaled product; also those that the controls are stored in.
FP8, FP4 = "fp8_e4m3fn_scaled_fast", "fp4_scaled_fast"

_GRID = TINY.grid
#: No two sizes of the first are equal, nor equal to B or to a count of speakers or channels: Dynamo
#: takes sizes that are equal in the first call for one, and a call where they differ recompiles.
_GRIDS = ((5, 4, 7), (6, 5, 4), (4, 7, 6))
_LAYERS = 40
_STRENGTHS = (1.0, 0.5, -2.0)
_LORA_RANK = 4


@dataclass
class Case:
    """One module, ready to run.

    Attributes:
        run: it, as it runs eagerly.
        calls: arguments of each call; no two calls have the same result.
        compiled: what is called instead under these options of ``torch.compile``.
        graphs: how many may be compiled for all calls together.
        before: called with the number of each call before it.
        depth: blocks that a value goes through.
    """

    run: Callable[..., Any]
    calls: Sequence[tuple[Any, ...]]
    compiled: Callable[..., Callable[..., Any]]
    graphs: int = 1
    before: Callable[[int], None] = lambda number: None
    depth: int = 1


@dataclass(frozen=True)
class Entry:
    """What is tried with every quantisation and for B = 1 and 2.

    Attributes:
        kind: one of the kinds above.
        owner: the class, or what stands for it.
        name: the variant.
        build: the case for a quantisation and B.
        quantisations: those that make sense.
        fixes: the least number of fixes that the pass must find.
    """

    kind: str
    owner: str
    name: str
    build: Callable[[str, int], Case]
    quantisations: tuple[str, ...] = QUANTISATIONS
    fixes: int = 0


def catalogue() -> list[Entry]:
    """Everything there is to try."""
    entries = [
        Entry(kind, variant.owner, variant.name, _of_variant(variant))
        for kind, variants in ((CLASS, classes()), (BLOCK, blocks()))
        for variant in variants
    ]
    models = unique_models()
    entries += [Entry(MODEL, "WanModel", ", ".join(names), _whole(names[0])) for names in models]
    once = {f"{_LAYERS} equal blocks": _many_blocks, "three LoRA strengths": _lora}
    once |= {f"three resolutions: {names[0]}": _sizes(names[0]) for names in models}
    entries += [
        Entry(ONCE, "compiled once", name, build, (PLAIN, FP8, FP4))
        for name, build in once.items()
    ]
    entries += [
        Entry(CONTROL, "planted faults", what, _planted(layer, layout), (FP8,), fixes=1)
        for layer, (what, layout) in FAULTS.items()
    ]
    return entries


def unique_models() -> list[list[str]]:
    """Names of the zoo, those together that are the same at the tiny size."""
    found: dict[zoo.Variant, list[str]] = {}
    for name in zoo.NAMES:
        found.setdefault(zoo.variant(name, "tiny"), []).append(name)
    return list(found.values())


# -- classes and blocks --------------------------------------------------------------------------


def _of_variant(variant: Variant) -> Callable[[str, int], Case]:
    def build(quantisation: str, batch: int) -> Case:
        module = variant.module(TINY)
        _quantise(module, quantisation)
        run = variant.call(module)
        calls = [variant.inputs(Draw(TINY, batch, seed)) for seed in (0, 1)]
        return Case(run, calls, lambda **options: torch.compile(run, **options))

    return build


def _planted(layer: str, layout: dict[str, int]) -> Callable[[str, int], Case]:
    """The plain block with one linear whose memory breaks a demand of the kernel."""
    variant = blocks()[0]

    def build(quantisation: str, batch: int) -> Case:
        module = variant.module(TINY)
        parent, _, leaf = layer.rpartition(".")
        slab = SlabLinear.from_linear(module.get_submodule(layer), quantisation, **layout)
        setattr(module.get_submodule(parent), leaf, slab)
        _quantise(module, quantisation)
        calls = [variant.inputs(Draw(TINY, batch, seed)) for seed in (0, 1)]
        return Case(module, calls, lambda **options: torch.compile(module, **options))

    return build


# -- models --------------------------------------------------------------------------------------


def _whole(name: str) -> Callable[[str, int], Case]:
    """A model of the zoo in one graph."""

    def build(quantisation: str, batch: int) -> Case:
        model = _zoo_model(name, quantisation)
        calls = [_zoo_inputs(name, _GRID, batch, seed) for seed in (0, 1)]
        return Case(
            model, calls, lambda **options: torch.compile(model, **options), depth=_depth(model)
        )

    return build


def _sizes(name: str) -> Callable[[str, int], Case]:
    """A model whose blocks are compiled one by one with dynamic shapes."""

    def build(quantisation: str, batch: int) -> Case:
        model = _zoo_model(name, quantisation)
        calls = [_zoo_inputs(name, grid, batch, 0) for grid in _GRIDS]
        return Case(
            model, calls, _by_blocks(model, dynamic=True), graphs=_kinds_of_blocks(model),
            depth=_depth(model),
        )

    return build


def _many_blocks(quantisation: str, batch: int) -> Case:
    model = _model(quantisation, _LAYERS)
    calls = [_zoo_inputs("t2v-14b", _GRID, batch, seed) for seed in (0, 1)]
    return Case(model, calls, _by_blocks(model), depth=_depth(model))


def _lora(quantisation: str, batch: int) -> Case:
    """A LoRA on every linear of the blocks, which all calls see at another strength."""
    model = _model(quantisation, 2)
    generator = torch.Generator().manual_seed(2)
    linears = [m for m in model.blocks.modules() if isinstance(m, nn.Linear | QuantizedLinear)]
    for linear in linears:
        down = torch.randn(_LORA_RANK, linear.in_features, generator=generator)
        up = torch.randn(linear.out_features, _LORA_RANK, generator=generator)
        attach_lora(linear, down / linear.in_features**0.5, up / _LORA_RANK**0.5)
    inputs = _zoo_inputs("t2v-14b", _GRID, batch, 0)

    def before(number: int) -> None:
        set_lora_strength(model, _STRENGTHS[number])

    calls = [inputs] * len(_STRENGTHS)
    return Case(model, calls, _by_blocks(model), before=before, depth=_depth(model))


def _model(quantisation: str, layers: int) -> WanModel:
    config = replace(zoo.variant("t2v-14b", "tiny").config, num_layers=layers)
    torch.manual_seed(0)
    model = WanModel(config).bfloat16().eval().requires_grad_(False)
    _quantise(model, quantisation)
    return model


def _zoo_model(name: str, quantisation: str) -> WanModel:
    torch.manual_seed(0)
    return zoo.build(name, "tiny", None if quantisation == PLAIN else quantisation)


def _zoo_inputs(
    name: str, grid: tuple[int, int, int], batch: int, seed: int
) -> tuple[Any, ...]:
    variant = zoo.variant(name, "tiny")
    return model_inputs(
        variant.config, grid, batch=batch, dtype=torch.bfloat16, seed=seed, addons=variant.addons
    )


def _by_blocks(model: WanModel, **more: Any) -> Callable[..., WanModel]:
    def compiled(**options: Any) -> WanModel:
        model.compile_blocks(**options, **more)
        return model

    return compiled


def _depth(model: WanModel) -> int:
    return model.config.num_layers + len(model.config.vace_layers)


def _kinds_of_blocks(model: WanModel) -> int:
    """How many of the blocks, main and VACE, have different layers."""
    stacks = [model.blocks, getattr(model, "vace_blocks", [])]
    return len({(type(block), *block.state_dict()) for stack in stacks for block in stack})


def _quantise(module: nn.Module, quantisation: str) -> None:
    if quantisation != PLAIN:
        quantize_(module, quantisation, high_precision(module))


def backend_options(inner: str, report: Callable[[contig_pass.Report], None]) -> dict[str, Any]:
    """Options of ``torch.compile`` for every row."""
    return {
        "backend": contig_pass.contig_safe,
        "fullgraph": True,
        "options": {"inner": inner, "report": report},
    }
