"""One call of an op that a contract binds, which the doctor knows how to make."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from contig_pass.contracts.registry import Call, resolve_op
from contig_pass.contracts.target import CPU, Target, target_of
from contig_pass.layout import Layout

#: Arguments of an op by name in its schema. Tensors lie as every contract of theirs demands.
Arguments = dict[str, Any]

_SEED = 20240


@dataclass(frozen=True, eq=False)
class Program:
    """A call of an op with operands of known values.

    Attributes:
        op: overload, as ``namespace::name.overload``.
        variant: which of several calls of the op, such as a scaling recipe.
        build: makes the arguments on a device, for given sizes.
        sizes: by name.
        dims: the size that each dimension of an operand has, by operand; those not named here
            are of no size that may be changed.
        operands: the arguments that are tried in other layouts; ``None``: all that have a contract.
        kinds: device kinds that it can run on.
        tolerance: relative error, in the Euclidean norm, up to which two results are the same;
            0: every bit counts.
        outputs: how many of the op's results count, from the first on.
        around: what must hold during the call.
        expected: the first result in float64, computed apart from the op from its arguments.
    """

    op: str
    variant: str
    build: Callable[[torch.device, Mapping[str, int]], Arguments]
    sizes: Mapping[str, int] = field(default_factory=dict)
    dims: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    operands: tuple[str, ...] | None = None
    kinds: tuple[str, ...] = ("cuda",)
    tolerance: float = 0.0
    outputs: int = 1
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    expected: Callable[[Arguments], torch.Tensor] | None = None

    @property
    def name(self) -> str:
        """The op's short name and the variant."""
        short = self.op.removeprefix("aten::").removesuffix(".default")
        return f"{short} {self.variant}".strip()

    def arguments(self, device: torch.device, sizes: Mapping[str, int]) -> Arguments:
        """The same values on every call; ``sizes`` replace some of the program's own."""
        torch.manual_seed(_SEED)
        return self.build(device, {**self.sizes, **sizes})

    def run(self, arguments: Arguments) -> list[torch.Tensor]:
        """Call the op; the results that count."""
        with self.around():
            return self.counted(resolve_op(self.op)(**arguments))

    def counted(self, result: Any) -> list[torch.Tensor]:
        """Of what the op returned, the results that count."""
        results = [result] if isinstance(result, torch.Tensor) else list(result)
        return results[: self.outputs]

    def call(self, arguments: Arguments, changed: Mapping[str, Layout]) -> Call:
        """The call as contracts see it, with the layouts of some operands ``changed``."""
        layouts = {name: Layout.of(value) for name, value in tensors(arguments)}
        layouts.update(changed)
        device = next(iter(layouts.values())).device
        return Call(resolve_op(self.op), layouts, arguments, judged_by(device))


def judged_by(device: torch.device) -> Target:
    """The device itself: a CPU is judged as a CPU here, not as a rehearsal for a GPU."""
    return CPU if device.type == "cpu" else target_of(device)


def tensors(arguments: Arguments) -> Iterator[tuple[str, torch.Tensor]]:
    """Operands by name, those of list arguments as ``name[0]``, ``name[1]``."""
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, torch.Tensor):
                    yield f"{name}[{index}]", item


def replaced(arguments: Arguments, operand: str, tensor: torch.Tensor) -> Arguments:
    """``arguments`` with another tensor as ``operand``."""
    name, _, index = operand.rstrip("]").partition("[")
    if not index:
        return {**arguments, name: tensor}
    listed = list(arguments[name])
    listed[int(index)] = tensor
    return {**arguments, name: listed}
