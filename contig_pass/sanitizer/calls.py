"""One call of an op in eager mode: its operands by name, and what can be done about them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from contig_pass.callsite import argument_names, mutated_arguments, operand_name
from contig_pass.contracts.registry import Call
from contig_pass.contracts.target import Target, target_of
from contig_pass.layout import Layout

#: Calls an op with arguments and keyword arguments.
Launch = Callable[[torch._ops.OpOverload, tuple, Mapping[str, Any]], Any]

#: Addresses are told apart up to this many bytes, far above what any kernel asks for.
_PAGE = 4096


@dataclass(frozen=True, eq=False)
class Tensor:
    """One tensor argument of one call.

    Attributes:
        argument: name in the op's schema.
        index: position in a list argument, else ``None``.
        value: the tensor.
    """

    argument: str
    index: int | None
    value: torch.Tensor

    @property
    def name(self) -> str:
        """``bias``, ``scale_a[0]``, ..."""
        return operand_name(self.argument, self.index)


class EagerCall:
    """A call that is about to be made.

    Attributes:
        op: the overload.
        given: every argument by name; what is left to defaults is absent.
        tensors: operands by name, strided ones only.
    """

    def __init__(self, op: torch._ops.OpOverload, args: tuple, kwargs: Mapping[str, Any]) -> None:
        self.op = op
        self.given = {**dict(zip(argument_names(op), args, strict=False)), **kwargs}
        self.tensors = {tensor.name: tensor for tensor in _tensors(self.given)}

    def registry_call(self, target: Target | None) -> Call | None:
        """The call as contracts see it; ``None`` if it has no operand that lies in memory.

        Args:
            target: whose demands count; ``None``: the first operand's device's.
        """
        layouts = {name: Layout.of(tensor.value) for name, tensor in self.tensors.items()}
        if not layouts:
            return None
        device = next(iter(layouts.values())).device
        return Call(self.op, layouts, self.given, target or target_of(device))

    @property
    def written(self) -> frozenset[str]:
        """Names of the arguments that the op declares to write to."""
        return mutated_arguments(self.op)

    def run(self, replaced: Mapping[str, torch.Tensor], launch: Launch) -> Any:
        """Have ``launch`` call the op with ``replaced`` operands, by name, for those given."""
        given = dict(self.given)
        for name, value in replaced.items():
            tensor = self.tensors[name]
            if tensor.index is None:
                given[tensor.argument] = value
            else:
                listed = list(given[tensor.argument])
                listed[tensor.index] = value
                given[tensor.argument] = listed
        arguments = self.op._schema.arguments
        positional = []
        for argument in arguments:
            if argument.kwarg_only or argument.name not in given:
                break
            positional.append(given.pop(argument.name))
        return launch(self.op, tuple(positional), given)


def _tensors(given: Mapping[str, Any]) -> Iterator[Tensor]:
    for name, value in given.items():
        if lies_in_memory(value):
            yield Tensor(name, None, value)
        elif isinstance(value, (list, tuple)):
            for index, item in enumerate(value):
                if lies_in_memory(item):
                    yield Tensor(name, index, item)


def lies_in_memory(value: object) -> bool:
    """Whether ``value`` is a tensor with strides and an address."""
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        return False
    if value.device.type == "meta" or value.is_nested:
        return False
    try:
        value.data_ptr()
    except (RuntimeError, NotImplementedError):  # a wrapper, as under torch.func.vmap
        return False
    return True


def signature(op: Any, args: tuple, kwargs: Mapping[str, Any]) -> tuple | None:
    """What a call's verdict depends on, to be looked up by; ``None`` if it cannot be."""
    try:
        return (op, *map(_part, args), *((name, _part(value)) for name, value in kwargs.items()))
    except TypeError:
        return None


def _part(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        if not lies_in_memory(value):
            return None
        where = value.data_ptr() % _PAGE
        return value.shape, value.stride(), value.dtype, value.device, where
    if isinstance(value, (list, tuple)):
        return tuple(map(_part, value))
    if not isinstance(value, _VALUES):
        raise TypeError
    return type(value), value  # as a key, 1 == 1.0 == True


_VALUES = (
    *(int, float, complex, str, type(None)),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)
