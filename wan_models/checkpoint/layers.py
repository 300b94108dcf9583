"""What a model wants from a checkpoint: its linears, and every other tensor."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from wan_models.checkpoint.naming import without_compiled
from wan_models.quant import QuantizedLinear
from wan_models.quant.linear import KeepsTypes
from wan_models.quant.lora import LoraStack


class Linear(NamedTuple):
    """A linear layer, plain or quantised: its name in the model, and what holds it."""

    module: nn.Linear | QuantizedLinear
    parent: nn.Module
    leaf: str


class Other(NamedTuple):
    """Any other parameter or persistent buffer, and what holds it."""

    tensor: torch.Tensor
    module: nn.Module
    leaf: str

    @property
    def kept_dtype(self) -> torch.dtype | None:
        """The type that the tensor keeps whatever a model is cast to, or None."""
        keeps = isinstance(self.module, KeepsTypes) and self.module.keeps(self.tensor)
        return self.tensor.dtype if keeps or not self.tensor.is_floating_point() else None


class Layers(NamedTuple):
    """A model's layers by official name.

    Attributes:
        linears: by path.
        others: by name.
        unloadable: buffers outside of ``state_dict`` that have no memory yet.
        loras: paths of linears with unmerged LoRAs, whose tensors are no part of a checkpoint.
    """

    linears: dict[str, Linear]
    others: dict[str, Other]
    unloadable: list[str]
    loras: list[str]


def layers_of(model: nn.Module) -> Layers:
    """Sort the tensors of ``model``. LoRAs are left out, parts of quantised linears belong to them.

    Raises:
        ValueError: ``model`` is itself a linear: nothing holds it, so nothing can replace it.
    """
    if isinstance(model, nn.Linear | QuantizedLinear):
        raise ValueError(f"{type(model).__name__} is a single layer: use a module that holds it")
    found = Layers({}, {}, [], [])
    inside = set()
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        path = without_compiled(name)
        if isinstance(module, nn.Linear | QuantizedLinear):
            parent, _, leaf = name.rpartition(".")
            found.linears[path] = Linear(module, model.get_submodule(parent), leaf)
            if isinstance(getattr(module, "lora", None), LoraStack):
                found.loras.append(path)
                inside |= {id(below) for below in module.lora.modules()}
            continue
        tensors = (
            *module.named_parameters(recurse=False), *module.named_buffers(recurse=False)
        )
        for leaf, tensor in tensors:
            full = f"{path}.{leaf}" if path else leaf
            if leaf not in module._non_persistent_buffers_set:
                found.others[full] = Other(tensor, module, leaf)
            elif tensor.is_meta:
                found.unloadable.append(full)
    return found
