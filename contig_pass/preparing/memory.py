"""Which memory a model's parameters and buffers lie in, and who shares it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from contig_pass.layout import Layout

PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


@dataclass(eq=False)
class Group:
    """Parameters and buffers with exactly the same memory: relaid together or not at all.

    Attributes:
        members: tensors by dotted name, each object once.
        partner: what else holds a part of that memory, by name; ``None``: nothing known.
    """

    members: dict[str, torch.Tensor]
    partner: str | None = None

    @property
    def name(self) -> str:
        return next(iter(self.members))

    @property
    def tensor(self) -> torch.Tensor:
        return next(iter(self.members.values()))

    @property
    def plain(self) -> bool:
        return type(self.tensor) in PLAIN_TENSORS

    def layout(self) -> Layout | None:
        """Where it lies; ``None`` where that cannot be said, or there is nothing to say."""
        try:
            layout = Layout.of(self.tensor)
        except (TypeError, RuntimeError, ValueError):
            return None  # sparse, nested, uninitialised, without a pointer
        return None if layout.is_empty() else layout

    def obstacle(self) -> str | None:
        """Why it cannot be relaid; ``None``: it can."""
        tensor = self.tensor
        if not self.plain:
            return f"a {type(tensor).__name__}: only plain tensors are relaid"
        if tensor.layout is not torch.strided:
            return f"its layout is {tensor.layout}: it has no strides"
        if tensor.device.type == "meta":
            return "on the meta device: it has no memory yet"
        if tensor.is_quantized:
            return "a quantised tensor: only plain tensors are relaid"
        if self.partner is not None:
            return (
                f"{self.name} and {self.partner} share a part of their memory: relaying one would "
                "part them"
            )
        if tensor.device.type == "cpu" and tensor.is_shared():
            return "shared with other processes, which would keep the old memory"
        return None


def groups_of(model: torch.nn.Module, arguments: Any) -> list[Group]:
    """The model's tensors by memory, and what they share with each other and with ``arguments``."""
    named: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        named.setdefault(id(tensor), (name, tensor))
    groups: dict[Any, Group] = {}
    for name, tensor in named.values():
        key: Any = id(tensor)
        if has_memory(tensor):
            where = (tensor.device, tensor.data_ptr())
            key = (*where, tensor.dtype, tuple(tensor.shape), tensor.stride())
        groups.setdefault(key, Group({})).members[name] = tensor
    found = _unregistered(model, arguments)
    others = [(name, tensor) for name, tensor in found if id(tensor) not in named]
    _find_partners(list(groups.values()), others)
    return list(groups.values())


def _unregistered(model: torch.nn.Module, arguments: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors that may share the model's memory without being parameters or buffers."""
    leaves = torch.utils._pytree.tree_leaves
    yield from (("an argument", leaf) for leaf in leaves(arguments) if has_memory(leaf))
    registered = ("_parameters", "_buffers", "_modules")
    for path, module in model.named_modules():
        for name, held in vars(module).items():
            found = () if name in registered else leaves(held)
            dotted = f"{path}.{name}".strip(".")
            yield from ((dotted, leaf) for leaf in found if has_memory(leaf))


def has_memory(tensor: Any) -> bool:
    """Whether ``tensor`` is a plain strided tensor with elements and an address."""
    plain = type(tensor) in PLAIN_TENSORS and tensor.layout is torch.strided
    return plain and tensor.device.type != "meta" and tensor.numel() > 0


def _find_partners(groups: Sequence[Group], others: Sequence[tuple[str, torch.Tensor]]) -> None:
    """Fill in each group's ``partner``: a sweep over addresses."""
    spans: list[tuple[_Span, str, Group | None]] = [
        (_Span.of(group.tensor), group.name, group) for group in groups if has_memory(group.tensor)
    ]
    spans += [(_Span.of(tensor), name, None) for name, tensor in others]
    spans.sort(key=lambda entry: (entry[0].device, entry[0].start))
    for i, (span, name, group) in enumerate(spans):
        for later, later_name, later_group in spans[i + 1 :]:
            if later.device != span.device or later.start >= span.end:
                break
            if (group is None and later_group is None) or span.apart_from(later):
                continue
            if group is not None:
                group.partner = group.partner or later_name
            if later_group is not None:
                later_group.partner = later_group.partner or name


@dataclass(frozen=True)
class _Span:
    """The bytes that a tensor reaches over: runs of ``run`` bytes, ``steps`` bytes apart."""

    device: str
    start: int
    end: int
    run: int
    steps: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Span:
        size = tensor.element_size()
        dims = sorted(
            (s * size, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1
        )
        run, steps = size, []
        for step, n in dims:
            if not steps and step <= run:
                run += (n - 1) * step
            else:
                steps.append(step)
        start = tensor.data_ptr()
        end = start + size + sum((n - 1) * step for step, n in dims)
        return cls(str(tensor.device), start, end, run, tuple(steps))

    def apart_from(self, later: _Span) -> bool:
        """Whether no byte is in both, as is known of columns of one matrix: every run of either
        lies in its own part of one common pitch."""
        pitch = math.gcd(*self.steps, *later.steps)
        if not pitch:
            return False
        offset = (later.start - self.start) % pitch
        return self.run <= offset and offset + later.run <= pitch
