"""Calls in which inputs that share memory lie otherwise than when the graph was compiled.

Where a graph writes to one of several inputs that share a storage, AOTAutograd hands the graph the
storage, and bakes into it where the inputs lie there; nothing guards that (torch 2.11 to 2.14), so
that a later call with other views of one storage would read and write in the wrong places. Such a
call gets a graph compiled for its own inputs.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._guards import TracingContext

Compile = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]


def compile_for_placement(
    compile_: Compile, module: fx.GraphModule, example_inputs: Sequence[Any]
) -> Callable[..., Any]:
    """``compile_(module, example_inputs)``, compiled anew for calls whose aliased inputs lie
    elsewhere in the storage that they share.

    Args:
        compile_: may change the module that it is given.
        module: as Dynamo traced it.
        example_inputs: fake tensors.
    """
    aliased = _aliased(example_inputs)
    placed = _placement(example_inputs, aliased)
    if not aliased or not all(isinstance(offset, int) for offset in placed):
        return compile_(module, example_inputs)
    untouched = copy.deepcopy(module)
    compiled = compile_(module, example_inputs)
    if not _writes_to_inputs():
        return compiled
    others: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def run(*inputs: Any) -> Any:
        if _placement(inputs, aliased) == placed:
            return compiled(*inputs)
        key = tuple(_form(value) for value in inputs)
        if key not in others:
            others[key] = compile_(copy.deepcopy(untouched), inputs)
        return others[key](*inputs)

    return run


def _aliased(inputs: Sequence[Any]) -> tuple[int, ...]:
    """Positions of the tensors whose storage another one has as well."""
    storages = {
        position: value.untyped_storage()._cdata
        for position, value in enumerate(inputs)
        if isinstance(value, torch.Tensor) and value.layout is torch.strided
    }
    counts = Counter(storages.values())
    return tuple(position for position, storage in storages.items() if counts[storage] > 1)


def _placement(inputs: Sequence[Any], positions: Sequence[int]) -> tuple[Any, ...]:
    return tuple(inputs[position].storage_offset() for position in positions)


def _writes_to_inputs() -> bool:
    context = TracingContext.try_get()
    traced = context.fw_metadata if context is not None else None
    return traced is None or any(info.mutates_data for info in traced.input_info)


def _form(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.shape, value.stride(), value.storage_offset()
