"""Loading: everything is checked against the headers first, then every tensor is placed once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from wan_models.checkpoint.contents import Contents, contents
from wan_models.checkpoint.errors import CheckpointError, Problem
from wan_models.checkpoint.layers import Layers, layers_of
from wan_models.checkpoint.naming import check_naming
from wan_models.checkpoint.plan import AS_STORED, Plan, Step, planned, rename
from wan_models.checkpoint.quantised import FLOATS, Form
from wan_models.checkpoint.reader import Placer, open_checkpoint
from wan_models.config import WanConfig
from wan_models.quant import QuantizedLinear, quantized
from wan_models.quant.linear import compute_type
from wan_models.quant.recipes import recipe_named


@dataclass(frozen=True)
class LoadReport:
    """What was loaded, and every place where that is not the file's bytes as they are.

    Attributes:
        model: the model.
        naming, prefix: how the checkpoint is named.
        tensors: parameters and linears' parts that were read.
        nbytes: bytes read.
        repaired: tensors copied because the file has them at an address that kernels refuse.
        transposed: weights that the file has as (K, N).
        replaced: plain linears that became quantised ones, as the file stores them.
        quantised: weights that the file has in full precision and the model quantised.
        requantised: weights that the file stores in another form than the model; dequantised and
            quantised anew.
        dequantised: quantised weights of the file that the model has in full precision.
        unused: tensors of the file that nothing needs: input scales of recipes that cast no
            activations, fused projections beside unfused ones.
        missing, extra: what does not fit, of a load that is not strict.
    """

    model: nn.Module
    naming: str
    prefix: str
    tensors: int
    nbytes: int
    repaired: tuple[str, ...]
    transposed: tuple[str, ...]
    replaced: tuple[str, ...]
    quantised: tuple[str, ...]
    requantised: tuple[str, ...]
    dequantised: tuple[str, ...]
    unused: tuple[str, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]


@torch.inference_mode(False)
@torch.no_grad()
def load(
    model_or_config: nn.Module | WanConfig,
    path: str | Path,
    *,
    device: torch.device | str | Callable[[str], torch.device | str],
    dtype: torch.dtype | None = None,
    naming: str | None = None,
    strict: bool = True,
    prefix: str | None = None,
    quantization: str | None = AS_STORED,
) -> LoadReport:
    """Load a checkpoint. A model built on the meta device takes no memory before.

    Every tensor goes straight from the mapped file to its device and type. On the CPU, in the
    file's type, it stays the mapped file itself. Linears that the file has quantised become
    quantised ones; linears that the model has quantised and the file not are quantised one by
    one. Nothing is assigned before everything has been read, so a model that had values keeps
    them, in memory as well, until then. Unmerged LoRAs stay as they are.

    Args:
        model_or_config: a model, or the configuration of one to build.
        path: a safetensors file, the index of several, or a folder with one of these.
        device: where tensors go: one device, or a function of the official name, such as
            ``BlockSwap.device_of``.
        dtype: of everything but quantised weights, scales and whole numbers; None keeps the
            file's.
        naming: one of :data:`NAMINGS`; None finds it out.
        strict: whether missing and extra tensors are errors or only reported.
        prefix: in front of every name; None finds it out.
        quantization: ``"file"`` leaves plain linears of the model as the file stores them, a
            recipe quantises anew what the file stores otherwise quantised, and None dequantises
            it. Linears that are quantised in the model keep their recipe.

    Returns:
        What was done. A missing tensor of a load that is not strict stays as it was.

    Raises:
        CheckpointError: tensors that are missing, extra, of a wrong shape or type, in an unknown
            format, truncated or twice there; all of them in one list, and nothing is loaded.
        FileNotFoundError: there is no such file.
        ValueError: an unknown naming or recipe, a type that is no float type of 2 bytes or more,
            or a device without memory or without the products that a recipe needs.
    """
    if quantization not in (None, AS_STORED):
        recipe_named(quantization)
    if naming is not None:
        check_naming(naming)
    if dtype not in (None, *FLOATS):
        raise ValueError(f"dtype={dtype}: use one of {', '.join(map(str, FLOATS))}")
    where = _placement(device)
    model = _built(model_or_config)
    found = contents(open_checkpoint(path), naming, prefix)
    layers = layers_of(model)
    known = {*layers.others, *layers.linears}
    rename(found, known)
    plan = planned(found, layers, dtype, quantization)
    missing = [p.name for p in plan.problems if p.kind == "missing"]
    extra = [entry.name for name, entry in found.tensors.items() if name not in plan.used]
    if strict:
        plan.problems += [Problem("extra", name) for name in extra]
    else:
        plan.problems = [p for p in plan.problems if p.kind != "missing" or p.detail]
    if plan.problems:
        raise CheckpointError(found.source.path, plan.problems)
    _check_products(plan, where)
    return _carried_out(plan, found, layers, model, where, dtype, missing, extra)


def _built(model_or_config: nn.Module | WanConfig) -> nn.Module:
    if not isinstance(model_or_config, WanConfig):
        return model_or_config
    from wan_models.model import WanModel

    with torch.device("meta"):
        return WanModel(model_or_config)


def _placement(
    device: torch.device | str | Callable[[str], torch.device | str],
) -> Callable[[str], torch.device]:
    given = device if callable(device) else lambda _: device
    if not callable(device) and torch.device(device).type == "meta":
        raise ValueError("device='meta' holds no values: use the CPU or a GPU")
    return lambda name: torch.device(given(name))


def _check_products(plan: Plan, where: Callable[[str], torch.device]) -> None:
    """Let a recipe refuse a GPU before anything is read."""
    pairs = {
        (step.recipe.name, where(f"{step.path}.weight"))
        for step in plan.steps
        if step.recipe is not None
    }
    for recipe, device in pairs:
        if device.type == "cuda":
            quantized(nn.Linear(16, 16, device=device), recipe)


def _carried_out(
    plan: Plan,
    found: Contents,
    layers: Layers,
    model: nn.Module,
    where: Callable[[str], torch.device],
    dtype: torch.dtype | None,
    missing: list[str],
    extra: list[str],
) -> LoadReport:
    place = Placer(found.source, where)
    rows: dict[str, list[str]] = {
        "replaced": [], "quantised": [], "requantised": [], "dequantised": []
    }
    made = [(step, _layer(step, place, dtype, rows)) for step in plan.steps]
    tensors = [
        (layers.others[name], place(entry, name, wanted)) for name, entry, wanted in plan.others
    ]
    for step, layer in made:
        if isinstance(layer, QuantizedLinear):
            setattr(step.linear.parent, step.linear.leaf, layer)
        else:
            weight, bias = layer
            _assign(step.linear.module, "weight", weight)
            if bias is not None:
                _assign(step.linear.module, "bias", bias)
    for other, tensor in tensors:
        _assign(other.module, other.leaf, tensor)
    return LoadReport(
        model=model,
        naming=found.naming,
        prefix=found.prefix,
        tensors=len(plan.others) + sum(len(step.stored.parts) for step in plan.steps),
        nbytes=place.nbytes,
        repaired=tuple(place.repaired),
        transposed=tuple(place.transposed),
        unused=tuple(plan.unused),
        missing=tuple(missing),
        extra=tuple(extra),
        **{key: tuple(value) for key, value in rows.items()},
    )


def _layer(
    step: Step, place: Placer, dtype: torch.dtype | None, rows: dict[str, list[str]]
) -> QuantizedLinear | tuple[torch.Tensor, torch.Tensor | None]:
    """The new quantised linear, or weight and bias of a plain one."""
    stored, recipe, module = step.stored, step.recipe, step.linear.module
    if recipe is None:
        bias = stored.bias(place, dtype)
        if stored.form is Form.FULL:
            return stored.weight(place, dtype), bias
        rows["dequantised"].append(step.path)
        return stored.dequantised(place).to(dtype), bias
    if isinstance(module, nn.Linear):
        rows["replaced"].append(step.path)
    bias = _kept_bias(step, place, dtype)
    if stored.holds(recipe):
        layer = stored.module(recipe, place, bias)
    else:
        full = stored.form is Form.FULL
        rows["quantised" if full else "requantised"].append(step.path)
        weight = (
            place.moved(stored.parts["weight"], f"{step.path}.weight")
            if full
            else stored.dequantised(place)
        )
        layer = quantized(_linear(weight, bias), recipe.name)
    layer.lora = getattr(module, "lora", None)
    return layer.train(module.training)


def _kept_bias(step: Step, place: Placer, dtype: torch.dtype | None) -> torch.Tensor | None:
    """The bias in the type that a quantised linear adds it in; one that is missing stays."""
    entry = step.stored.parts.get("bias")
    if entry is not None:
        return step.stored.bias(place, compute_type(dtype or entry.dtype))
    old = step.linear.module.bias
    return None if old is None else old.detach().to(dtype=compute_type(dtype or old.dtype))


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """A linear with these tensors."""
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def _assign(module: nn.Module, leaf: str, tensor: torch.Tensor) -> None:
    old = getattr(module, leaf)
    if isinstance(old, nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=old.requires_grad)
    setattr(module, leaf, tensor)
