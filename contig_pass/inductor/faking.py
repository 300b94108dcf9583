"""Tensors that have a device, a shape and strides, and no memory.

A model of any size is built, traced and planned with them on any machine.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch._inductor import config
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
)
from torch.fx.experimental import proxy_tensor
from torch.utils import _pytree as pytree

#: Raised where a program reads values, which fake tensors have none of.
NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException)
_torch_logger = logging.getLogger("torch._subclasses.fake_tensor")
#: Where a module keeps what it registers.
_OWN = ("_parameters", "_buffers", "_modules")


class Faking:
    """One set of fake tensors.

    Args:
        device: type of the device that :meth:`place` and :meth:`placed` put tensors on; ``None``:
            what lies on the meta device goes to the CPU, and all else stays where it is.
    """

    def __init__(self, device: str | None = None) -> None:
        self._device = device
        # Tensors with memory may take part: constants of a module, or of the program's own.
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        # A tensor stands beside what was made of it: an id counts while its owner lives.
        self._made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Inside the block every new tensor is fake, and nothing is computed.

        What torch would log of an error that a fake op raises, the error itself tells.
        """
        level = _torch_logger.level
        _torch_logger.setLevel(logging.CRITICAL)
        try:
            with self._mode, self._without_values():
                yield
        finally:
            _torch_logger.setLevel(level)

    def place(self, module: nn.Module) -> None:
        """Put the tensors of ``module`` on the device, in place; ties and shared memory stay.

        Not by ``module.to``, which makes two parameters of one that has two names, and leaves
        tensors alone that are mere attributes.
        """
        for child in module.modules():
            for held in (child._parameters, child._buffers):
                for name, tensor in held.items():
                    if tensor is not None:
                        held[name] = self._on_device(tensor)
            for name, value in vars(child).items():
                if name not in _OWN and any(
                    isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value)
                ):
                    vars(child)[name] = self.placed(value)

    def placed(self, values: Any) -> Any:
        """``values`` with every tensor in its lists, tuples and dictionaries on the device."""
        return pytree.tree_map_only(torch.Tensor, self._on_device, values)

    def outputs_of(self, module: fx.GraphModule) -> list[Any]:
        """What a graph that Dynamo traced would return, in fresh fake memory.

        Sizes that are symbolic in the graph are those of the call that was traced.
        """
        values = module.graph.output_node().args[0]
        with self._mode:
            return [_fresh(_traced(value)) for value in values]

    @contextlib.contextmanager
    def _without_values(self) -> Iterator[None]:
        """Inside the block nothing that a trace knows the value of is computed on a GPU that is
        not there.

        torch keeps the values of numbers that are put on a device, for programs that read them
        again, and Inductor computes tensors whose elements are all equal. Neither changes what the
        other nodes are.
        """
        if self._device == "cpu" or torch.version.cuda is None or torch.cuda.is_available():
            yield
            return
        before = proxy_tensor.CONSTANT_NUMEL_LIMIT
        proxy_tensor.CONSTANT_NUMEL_LIMIT = 0
        try:
            with config.patch(joint_graph_constant_folding=False):
                yield
        finally:
            proxy_tensor.CONSTANT_NUMEL_LIMIT = before

    def _on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in self._made:
            self._made[id(tensor)] = (tensor, self._moved(tensor))
        return self._made[id(tensor)][1]

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        there = tensor.device.type
        wanted = self._device or ("cpu" if there == "meta" else there)
        if there == wanted:
            return tensor
        elem = tensor.detach()
        if there != "meta" and not isinstance(tensor, FakeTensor):
            elem = self._mode.from_tensor(elem)
        # A fake tensor is a meta tensor that names another device; views share its memory.
        with in_kernel_invocation_manager(self._mode):
            moved = FakeTensor(self._mode, elem, torch.device(wanted))
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(moved, tensor.requires_grad)
        return moved.requires_grad_(tensor.requires_grad)


def _traced(value: Any) -> Any:
    return value.meta["example_value"] if isinstance(value, fx.Node) else value


def _fresh(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        sizes, strides = map(_numbers, (value.shape, value.stride()))
        return torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)
    return _number(value)


def _numbers(values: Any) -> list[int]:
    return [_number(value) for value in values]


def _number(value: Any) -> Any:
    """A symbolic number as that of the traced call."""
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value.node.hint
    return value
