"""Who made a view: the view ops seen so far, by the memory that they look at.

A record holds code objects and numbers and no tensor. Records of a storage go when it does: it is
held by a weak reference, which also keeps its identity from being given to another one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from contig_pass.inductor.storages import identity_of
from contig_pass.layout import ABSOLUTE, Layout
from contig_pass.sanitizer.lines import Spot

#: Views remembered of one storage, steps remembered of one view: the newest.
_VIEWS, _STEPS = 256, 32
#: Storages remembered before those that are gone are looked for.
_SWEEP = 1024

_Shown = tuple[int, tuple[int, ...], tuple[int, ...], torch.dtype]


class View(NamedTuple):
    """One call of a view op.

    Attributes:
        op: the op.
        spot: where the user called it.
        shown: storage offset in elements, sizes, strides and dtype of what it made.
        source: the same of what it was taken from.
        parent: the view that it was taken from, if that one was seen made.
        steps: how many views it was made by.
    """

    op: Any
    spot: Spot | None
    shown: _Shown
    source: _Shown
    parent: View | None
    steps: int


class Views:
    """The view ops of one sanitizer, of every thread."""

    def __init__(self) -> None:
        self._of_storage: dict[int, tuple[StorageWeakRef, dict[_Shown, View]]] = {}
        self._lock = threading.Lock()
        self._sweep_at = _SWEEP

    def remember(self, op: Any, source: Any, made: Any, spot: Spot | None) -> None:
        """Take down that ``op`` made ``made`` (a tensor or several) of ``source`` at ``spot``."""
        try:
            storage = source.untyped_storage()
            identity, before = identity_of(storage), _shown(source)
            shown = [
                _shown(tensor)
                for tensor in (made if isinstance(made, (list, tuple)) else (made,))
                if identity_of(tensor.untyped_storage()) == identity  # a view op may have copied
            ]
        except (AttributeError, RuntimeError, NotImplementedError):
            return  # sparse, nested or wrapped: it has no strides or no storage
        known = self._of_storage.get(identity)
        parent = None if known is None else known[1].get(before)
        if parent is not None and parent.steps >= _STEPS:
            parent = parent._replace(parent=None, steps=1)
        steps = 1 if parent is None else parent.steps + 1
        for one in shown:
            if one == before:
                continue  # an alias shows nothing new
            if known is None:
                known = self._storage(storage)
            records = known[1]
            records.pop(one, None)
            records[one] = View(op, spot, one, before, parent, steps)
            if len(records) > _VIEWS:
                del records[next(iter(records))]

    def _storage(self, storage: torch.UntypedStorage) -> tuple[StorageWeakRef, dict]:
        with self._lock:
            if len(self._of_storage) >= self._sweep_at:
                held = self._of_storage
                self._of_storage = {k: v for k, v in held.items() if not v[0].expired()}
                self._sweep_at = max(_SWEEP, 2 * len(self._of_storage))
            return self._of_storage.setdefault(
                identity_of(storage), (StorageWeakRef(storage), {})
            )

    def chain(self, tensor: torch.Tensor) -> Iterator[View]:
        """How ``tensor`` was made, view op by view op, the last one first."""
        known = self._of_storage.get(identity_of(tensor.untyped_storage()))
        view = None if known is None else known[1].get(_shown(tensor))
        while view is not None:
            yield view
            view = view.parent

    def culprit(self, tensor: torch.Tensor, breaks: Callable[[Layout], bool]) -> View | None:
        """The view op that made ``tensor`` break a rule, where it was seen.

        Args:
            tensor: an operand that breaks the rule.
            breaks: whether a layout does.
        """
        base = tensor.data_ptr() - tensor.storage_offset() * tensor.dtype.itemsize

        def broken(shown: _Shown) -> bool:
            offset, shape, strides, dtype = shown
            address = base + offset * dtype.itemsize
            return breaks(Layout(shape, strides, address, ABSOLUTE, dtype, tensor.device))

        return next((view for view in self.chain(tensor) if not broken(view.source)), None)


def _shown(tensor: torch.Tensor) -> _Shown:
    return tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
