"""Follow a program into the threads that it starts.

Modes of torch belong to a thread. A new thread's first event is where it can be given its own:
``threading.setprofile`` names a function to be called there.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

_entering: list[Callable[[], object]] = []
_earlier: Any = None
_lock = threading.Lock()


@contextlib.contextmanager
def following(enter: Callable[[], object]) -> Iterator[None]:
    """Call ``enter`` in every thread that is started through ``threading`` inside the block."""
    global _earlier
    with _lock:
        if not _entering:
            _earlier = threading.getprofile()
            threading.setprofile(_begin)
        _entering.append(enter)
    try:
        yield
    finally:
        with _lock:
            _entering.remove(enter)
            if not _entering:
                threading.setprofile(_earlier)


def _begin(*event: Any) -> None:
    del event
    sys.setprofile(_earlier)
    for enter in tuple(_entering):
        enter()
