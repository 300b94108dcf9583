"""Before anything is read: what goes where and in what form, and everything that does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from wan_models.checkpoint import naming as names
from wan_models.checkpoint.contents import Contents
from wan_models.checkpoint.errors import Problem
from wan_models.checkpoint.layers import Layers, Linear
from wan_models.checkpoint.quantised import FLOATS, Form, Stored, bad_shape, stored_linear
from wan_models.checkpoint.reader import DTYPE_NAMES, Entry
from wan_models.quant import QuantizedLinear, fp4, fp8
from wan_models.quant.recipes import E4M3, E5M2, Recipe, recipe_named

#: ``quantization``: every linear as the file has it.
AS_STORED = "file"


@dataclass
class Step:
    """One linear to load: what the file has, and the recipe it is to have; None for full."""

    path: str
    linear: Linear
    stored: Stored
    recipe: Recipe | None


@dataclass
class Plan:
    """What :func:`wan_models.checkpoint.load` is going to do.

    Attributes:
        steps: linears.
        others: name, entry and new type of every other tensor.
        problems: why none of it will be done.
        used: official names of tensors that the model has a place for.
        unused: names in the file of tensors that it has no need of.
    """

    steps: list[Step]
    others: list[tuple[str, Entry, torch.dtype | None]]
    problems: list[Problem]
    used: set[str]
    unused: list[str]


def rename(found: Contents, known: set[str]) -> None:
    """Give add-on layers the names that the model has for them."""
    renamed = {}
    for name, entry in found.tensors.items():
        renamed[_known_as(name, known)] = entry
    found.tensors = renamed
    found.settings = {names.alias(path, known): said for path, said in found.settings.items()}
    found.recipes = {names.alias(path, known): recipe for path, recipe in found.recipes.items()}
    found.faulty = {_known_as(name, known) for name in found.faulty}


def _known_as(name: str, known: set[str]) -> str:
    """What the model calls a tensor, or the linear that the tensor is a part of."""
    whole = names.alias(name, known)
    if whole in known:
        return whole
    path, dot, part = name.rpartition(".")
    return names.alias(path, known) + dot + part


def planned(
    found: Contents, layers: Layers, dtype: torch.dtype | None, quantization: str | None
) -> Plan:
    """Compare what a checkpoint holds with what a model wants; arguments as for ``load``."""
    plan = Plan([], [], list(found.problems), set(), list(found.unused))
    for path, linear in layers.linears.items():
        plan.problems += _plan_linear(plan, found, path, linear, dtype, quantization)
    for name, other in layers.others.items():
        entry = found.tensors.get(name)
        if entry is None:
            plan.problems += _absent(found, name)
            continue
        plan.used.add(name)
        wanted = other.kept_dtype
        if entry.shape != tuple(other.tensor.shape):
            plan.problems.append(bad_shape(entry, tuple(other.tensor.shape)))
        elif wanted is not None and entry.dtype != wanted:
            plan.problems.append(_not(entry, DTYPE_NAMES.get(wanted, str(wanted))))
        elif wanted is None and entry.dtype not in FLOATS:
            if entry.dtype not in (E4M3, E5M2):
                plan.problems.append(_not(entry, "a float type"))
            elif dtype is None:
                plan.problems.append(_not(entry, "a wider type; give dtype= to widen it"))
        plan.others.append((name, entry, wanted or dtype))
    plan.problems += [
        Problem("missing", name, "a buffer outside of state_dict on the meta device")
        for name in layers.unloadable
    ]
    return plan


def _plan_linear(
    plan: Plan,
    found: Contents,
    path: str,
    linear: Linear,
    dtype: torch.dtype | None,
    quantization: str | None,
) -> Iterator[Problem]:
    module = linear.module
    shape = (module.out_features, module.in_features)
    wanted = ("weight",) if module.bias is None else ("weight", "bias")
    for part in wanted:
        if f"{path}.{part}" not in found.tensors:
            yield from _absent(found, f"{path}.{part}")
    here = {name for name in found.tensors if name.rpartition(".")[0] == path}
    stored, problems = stored_linear(found, path, shape)
    yield from problems
    if stored is None:
        plan.used |= here
        return
    plan.used |= {f"{path}.{part}" for part in stored.parts} & here
    if stored.form is not Form.FULL:
        plan.used.add(f"{path}.comfy_quant")
    if module.bias is None and "bias" in stored.parts:
        plan.used.discard(f"{path}.bias")
        parts = {part: entry for part, entry in stored.parts.items() if part != "bias"}
        stored = replace(stored, parts=parts)
    recipe = _target(stored, module, quantization)
    weight = stored.parts["weight"]
    if recipe is None:
        if stored.form is not Form.FULL and dtype is None:
            yield _not(weight, "in full precision; give dtype= to dequantise it")
    elif (
        quantization == AS_STORED
        and not isinstance(module, QuantizedLinear)
        and not stored.holds(recipe)
    ):
        yield Problem(
            "format",
            stored.parts["weight_scale"].name,
            f"one scale a row, layers of {recipe.name} hold one in all: give a recipe as "
            "quantization= to quantise anew, or None to dequantise",
        )
    else:
        obstacle = (fp4.unfit if recipe.fp4 else fp8.unfit)(module, recipe)
        if obstacle is not None:
            yield Problem("shape", weight.name, f"recipe {recipe.name}: {obstacle}")
    if "input_scale" in stored.parts and (recipe is None or not recipe.takes_input_scale):
        plan.unused.append(stored.parts["input_scale"].name)
    plan.steps.append(Step(path, linear, stored, recipe))


def _target(
    stored: Stored, module: nn.Linear | QuantizedLinear, quantization: str | None
) -> Recipe | None:
    if isinstance(module, QuantizedLinear):
        return recipe_named(module.recipe)
    if stored.form is Form.FULL or quantization is None:
        return None
    return recipe_named(stored.recipe if quantization == AS_STORED else quantization)


def _absent(found: Contents, name: str) -> list[Problem]:
    return [] if name in found.faulty else [Problem("missing", found.file_name(name))]


def _not(entry: Entry, wanted: str) -> Problem:
    return Problem("dtype", entry.name, f"is {DTYPE_NAMES[entry.dtype]}, wanted {wanted}")
