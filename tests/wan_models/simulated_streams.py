"""Two streams of a device that runs nothing until it is drained, in either of two worst orders.

What is launched on a stream waits in a queue, as on a GPU. Draining runs the queues as far as
events allow, always preferring one stream: copies as early as possible, or kernels as early as
possible. What is right in both orders is right because of the events.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from wan_models.block_swap import copier, memory, swap

COPIES, KERNELS = "copies first", "kernels first"


class Stream:
    """A queue of what was launched, in order."""

    def __init__(self) -> None:
        self.queue: deque[Callable[[], bool]] = deque()

    def launch(self, run: Callable[[], None]) -> None:
        self.queue.append(lambda: run() is None)

    def wait_event(self, event: Event) -> None:
        """What follows waits for the latest recording of ``event``; there may be none."""
        mark = event.mark
        if mark is not None:
            self.queue.append(lambda: mark["reached"])

    def step(self) -> bool:
        """Run what is next; whether it could run."""
        done = bool(self.queue) and self.queue[0]()
        if done:
            self.queue.popleft()
        return done


class Event:
    """A place in a stream that others wait for."""

    def __init__(self) -> None:
        self.mark: dict[str, bool] | None = None

    def record(self, stream: Stream) -> None:
        self.mark = mark = {"reached": False}
        stream.launch(lambda: mark.update(reached=True))


class Device:
    """The stream of the kernels and that of the copies.

    Args:
        first: which to prefer, :data:`COPIES` or :data:`KERNELS`.
    """

    def __init__(self, first: str) -> None:
        self.main, self.side = Stream(), Stream()
        self.current = self.main
        self.order = (self.side, self.main) if first == COPIES else (self.main, self.side)

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def drain(self, *_: object) -> None:
        while any(stream.step() for stream in self.order):
            pass
        assert not self.main.queue, "the kernels wait for each other's events"
        assert not self.side.queue, "the copies wait for each other's events"

    def install(self, patch: pytest.MonkeyPatch, kind: type[copier.Copier]) -> None:
        """Let BlockSwap copy by ``kind``, on this device."""
        device, copy_to = self, memory.Host.copy_to

        class Simulated(kind):
            def __init__(self, place: torch.device) -> None:
                super().__init__(place)
                self.stream = device.side
                self.filled = [Event() for _ in range(copier.BUFFERS)]
                self.free = [Event() for _ in range(copier.BUFFERS)]

        patch.setattr(swap, "Copier", Simulated)
        patch.setattr(
            memory.Host, "copy_to",
            lambda host, slab: device.current.launch(lambda: copy_to(host, slab)),
        )
        patch.setattr(torch.cuda, "stream", self.stream)
        patch.setattr(torch.cuda, "current_stream", lambda *_: self.current)
        patch.setattr(torch.cuda, "synchronize", self.drain)


class Launched(nn.Module):
    """A block whose forward launches it: the value is there when the device is drained."""

    def __init__(self, block: nn.Module, device: Device) -> None:
        super().__init__()
        self.block = block
        self.device_of_kernels = device

    def forward(self, x: list[torch.Tensor], *others: Any) -> list[torch.Tensor]:
        out: list[torch.Tensor] = []
        self.device_of_kernels.main.launch(lambda: out.append(self.block(x[0], *others)))
        return out
