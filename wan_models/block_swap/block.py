"""One swapped block: its tensors, their bytes in host memory, and what may not happen to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from wan_models.block_swap.memory import Host, Place, empty_slab, packed, raw, view


class Item(NamedTuple):
    """One swapped tensor: its names in the block, itself, where it lies, its version counter."""

    names: tuple[str, ...]
    tensor: torch.Tensor
    place: Place
    version: int


class SwappedBlock:
    """One swapped block: its tensors, their bytes in host memory, the device they came from."""

    def __init__(self, name: str, block: nn.Module, home: torch.device) -> None:
        self.name = name
        self.block = block
        self.home = home
        self.items: list[Item] = []
        self.known: set[str] = set()
        self.host: Host | None = None

    def pack(self, *, pin: bool) -> None:
        """Copy the block's tensors to host memory: known ones from there, new ones as they are."""
        known = {id(item.tensor): item for item in self.items}
        old = self.host
        tensors = tensors_of(self.block)
        found = [(names, tensor) for names, tensor in tensors if tensor.numel() > 1]
        values = [
            old.read(known[id(tensor)].place) if id(tensor) in known else tensor.detach()
            for _, tensor in found
        ]
        places, nbytes = packed(values)
        host = Host(nbytes, pin=pin)
        for place, value in zip(places, values, strict=True):
            host.write(place.offset, raw(value))
        self.host = host
        self.known = {name for names, _ in tensors for name in names}
        self.items = [
            Item(names, tensor, place, tensor._version)
            for (names, tensor), place in zip(found, places, strict=True)
        ]

    def nbytes(self) -> int:
        """Bytes that packing will take."""
        return packed(tensor for _, tensor in tensors_of(self.block) if tensor.numel() > 1)[1]

    def give_back(self) -> None:
        """Let the tensors have memory of their own again, on the device they came from."""
        if self.host is not None:
            slab = empty_slab(self.host.nbytes, self.home)
            self.host.copy_to(slab)
            self.point_to(slab)
            self.host = None

    def point_to(self, slab: torch.Tensor) -> None:
        """Let the block's tensors be views of ``slab``. They stay the objects they are."""
        for item in self.items:
            item.tensor.data = view(slab, item.place)

    def unknown(self, slab: torch.Tensor) -> set[str]:
        """Names of tensors that were attached since packing.

        Raises:
            RuntimeError: a swapped tensor was replaced, moved, cast or written to. Its memory is
                shared with other blocks, so what was read or written there is lost.
        """
        found = {name: tensor for names, tensor in tensors_of(self.block) for name in names}
        for item in self.items:
            name = item.names[0]
            if found.get(name) is not item.tensor:
                raise self._changed(name, "replaced or removed")
            if item.tensor.data_ptr() != slab.data_ptr() + item.place.offset:
                raise self._changed(name, "moved or cast")
            if item.tensor._version != item.version:
                raise self._changed(name, "written to")
        return found.keys() - self.known

    def _changed(self, name: str, how: str) -> RuntimeError:
        return RuntimeError(
            f"{self.name}.{name} was {how} while its block was swapped: detach() before changing "
            "tensors, then attach() again"
        )


def tensors_of(module: nn.Module) -> list[tuple[tuple[str, ...], torch.Tensor]]:
    """Parameters and buffers of ``module`` and below, each once, with all its names."""
    found: dict[int, tuple[list[str], torch.Tensor]] = {}
    for prefix, child in module.named_modules(remove_duplicate=False):
        for name, tensor in own_tensors(child):
            found.setdefault(id(tensor), ([], tensor))[0].append(f"{prefix}.{name}".lstrip("."))
    return [(tuple(names), tensor) for names, tensor in found.values()]


def own_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters and buffers that ``module`` itself holds, by name."""
    return [
        *module.named_parameters(recurse=False, remove_duplicate=False),
        *module.named_buffers(recurse=False, remove_duplicate=False),
    ]


def check_tensor(name: str, tensor: torch.Tensor) -> None:
    """Raises ValueError if the tensor called ``name`` has no bytes of its own to move."""
    if type(tensor.data) is not torch.Tensor:
        raise ValueError(
            f"{name} is a {type(tensor.data).__name__}: only plain tensors can be swapped"
        )
    if tensor.device.type == "meta":
        raise ValueError(f"{name} is on the meta device and has no values: load the model first")


def values_hook(swapped: SwappedBlock) -> Callable[..., None]:
    """A hook by which ``state_dict()`` gives values from host memory."""

    def hook(_: nn.Module, state: dict[str, torch.Tensor], prefix: str, __: object) -> None:
        for item in swapped.items:
            for name in item.names:
                if prefix + name in state:
                    state[prefix + name] = swapped.host.read(item.place)

    return hook


def loading_hook(swapped: SwappedBlock) -> Callable[..., None]:
    """A hook by which ``load_state_dict()`` refuses to write where values would be lost."""

    def hook(*_: object) -> None:
        raise RuntimeError(
            f"{swapped.name} is swapped and its tensors hold other blocks' values: detach() before "
            "loading"
        )

    return hook
