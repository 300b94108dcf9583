"""Bytes behind tensors: packing a block's tensors into one slab, and moving slabs.

A slab is one flat run of bytes. Packing copies a tensor's whole span of memory, gaps between rows
included, to a place with the same address modulo 256, so size, strides and alignment stay what
they were. Every packed tensor gets a storage of its own: code that asks which of its inputs share
memory sees what it saw before.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

#: Places keep their address modulo this; kernels ask for 16 to 128.
ALIGNMENT = 256
#: Pinned memory comes in pieces of at least this size. PyTorch rounds a pinned allocation up to a
#: power of two, so pieces of exactly such sizes waste less than one of the smallest.
SMALLEST_PIECE = 1 << 20


class Place(NamedTuple):
    """Where a tensor lies in a slab: bytes from its start, bytes spanned, then its layout."""

    offset: int
    nbytes: int
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


def span(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last, gaps included."""
    if tensor.numel() == 0:
        return 0
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.itemsize


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes that ``tensor`` spans, as 1-D uint8 on the same memory."""
    start = tensor.storage_offset() * tensor.itemsize
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(
        tensor.untyped_storage(), start, (span(tensor),), (1,)
    )


def view(slab: torch.Tensor, place: Place) -> torch.Tensor:
    """The tensor at ``place`` of a slab (1-D uint8), with a storage of its own."""
    start = slab.storage_offset() + place.offset
    storage = slab.untyped_storage()[start : start + place.nbytes]
    return torch.empty(0, dtype=place.dtype, device=slab.device).set_(
        storage, 0, place.size, place.stride
    )


def empty_slab(nbytes: int, device: torch.device) -> torch.Tensor:
    """``nbytes`` of memory on ``device`` that start at a multiple of :data:`ALIGNMENT`."""
    if device.type == "cuda":  # whose allocator hands out multiples of 512
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    made = torch.empty(nbytes + ALIGNMENT, dtype=torch.uint8, device=device)
    start = -made.data_ptr() % ALIGNMENT
    return made[start : start + nbytes]


def packed(tensors: Iterable[torch.Tensor]) -> tuple[list[Place], int]:
    """Places for ``tensors`` in one slab, and its size in bytes.

    Tensors of one storage whose spans overlap (columns of a fused weight) are placed together,
    once, and overlap in the slab as they did before.
    """
    tensors = list(tensors)
    order = sorted(range(len(tensors)), key=lambda i: _sort_key(tensors[i]))
    places: dict[int, Place] = {}
    size, shift, end, storage = 0, 0, 0, None
    for i in order:
        tensor = tensors[i]
        address, nbytes = tensor.data_ptr(), span(tensor)
        room = tensor.untyped_storage().data_ptr()
        if room != storage or address >= end:  # not part of the run placed last
            size += (address - size) % ALIGNMENT
            shift, end, storage = size - address, address, room
        place = Place(
            address + shift, nbytes, tensor.shape, tuple(tensor.stride()), tensor.dtype
        )
        places[i] = place
        end = max(end, address + nbytes)
        size = max(size, place.offset + nbytes)
    return [places[i] for i in range(len(tensors))], size


def _sort_key(tensor: torch.Tensor) -> tuple[str, int, int]:
    return str(tensor.device), tensor.untyped_storage().data_ptr(), tensor.data_ptr()


class Host:
    """A slab in host memory: pinned, in a few pieces, or one piece of ordinary memory.

    Args:
        nbytes: its size.
        pin: whether a GPU will read it.
    """

    def __init__(self, nbytes: int, *, pin: bool) -> None:
        self.nbytes = nbytes
        self._starts: list[int] = []
        self._pieces: list[torch.Tensor] = []
        start = 0
        while start < nbytes:
            size = piece(nbytes - start) if pin else nbytes
            self._starts.append(start)
            self._pieces.append(pinned(size) if pin else empty_slab(size, torch.device("cpu")))
            start += size

    def _runs(self, offset: int, nbytes: int) -> Iterable[tuple[int, torch.Tensor]]:
        """The pieces' parts that make up a run of bytes, each with its start in the run."""
        for start, held in zip(self._starts, self._pieces, strict=True):
            first, last = max(offset, start), min(offset + nbytes, start + held.numel())
            if first < last:
                yield first - offset, held[first - start : last - start]

    def write(self, offset: int, source: torch.Tensor) -> None:
        """Copy ``source`` (1-D uint8, any device) to ``offset``; it is there on return."""
        for start, part in self._runs(offset, source.numel()):
            part.copy_(source[start : start + part.numel()])

    def read(self, place: Place) -> torch.Tensor:
        """The tensor at ``place``, on the CPU: this memory itself unless it lies in two pieces."""
        runs = list(self._runs(place.offset, place.nbytes))
        if len(runs) == 1:
            return view(runs[0][1], place._replace(offset=0))
        joined = torch.empty(place.nbytes, dtype=torch.uint8)
        for start, part in runs:
            joined[start : start + part.numel()].copy_(part)
        return view(joined, place._replace(offset=0))

    def copy_to(self, slab: torch.Tensor) -> None:
        """Copy everything to the start of ``slab``, on the current stream if that is a GPU's."""
        for start, part in self._runs(0, self.nbytes):
            slab[start : start + part.numel()].copy_(part, non_blocking=True)


def pinned(nbytes: int) -> torch.Tensor:
    """``nbytes`` of pinned memory, which starts on a page."""
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def piece(left: int) -> int:
    """Size of the next pinned piece when ``left`` bytes are still to be held."""
    if left <= SMALLEST_PIECE:
        return SMALLEST_PIECE
    return 1 << (left.bit_length() - 1)


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of ``tensor`` on ``device`` with the same strides and address modulo 256."""
    (place,), size = packed([tensor])
    slab = empty_slab(size, device)
    slab[place.offset : place.offset + place.nbytes].copy_(raw(tensor))
    return view(slab, place)
