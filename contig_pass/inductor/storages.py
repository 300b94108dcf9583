"""Which tensors share memory, by the identity of their storages, fake ones included."""

from __future__ import annotations

import torch


def identity_of(storage: torch.UntypedStorage) -> int:
    """A number that no other storage has while this one lives."""
    return storage._cdata


def share_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether both are views of one storage; ``False`` where either has none."""
    try:
        return identity_of(one.untyped_storage()) == identity_of(other.untyped_storage())
    except (RuntimeError, NotImplementedError):
        return False
