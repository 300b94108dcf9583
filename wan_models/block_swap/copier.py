"""Copies into the device buffers, and their order among the kernels that read them."""

from __future__ import annotations

import torch

from wan_models.block_swap.memory import Host

#: Device buffers: one is computed from while the other fills.
BUFFERS = 2


class Copier:
    """Fills buffers on a side stream of a CUDA device, ordered by events; at once on a CPU.

    Of each buffer two events are kept: ``filled`` (the copy into it is done) and ``free`` (the
    kernels that read it are done). Copies wait for one, kernels for the other.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self.stream is not None:
            self.filled = [torch.cuda.Event() for _ in range(BUFFERS)]
            self.free = [torch.cuda.Event() for _ in range(BUFFERS)]

    def fill(self, buffer: int, host: Host, slab: torch.Tensor) -> None:
        """Copy ``host`` into the buffer once the kernels that read it have finished."""
        if self.stream is None:
            host.copy_to(slab)
            return
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(self.free[buffer])
            host.copy_to(slab)
            self.filled[buffer].record(self.stream)

    def acquire(self, buffer: int) -> None:
        """Kernels launched from now on wait for the copy into the buffer."""
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_event(self.filled[buffer])

    def release(self, buffer: int) -> None:
        """Kernels launched up to now are all that read the buffer's present contents."""
        if self.stream is not None:
            self.free[buffer].record(torch.cuda.current_stream(self.device))

    def finish(self) -> None:
        """Wait until no copy and no kernel is under way."""
        if self.stream is not None:
            torch.cuda.synchronize(self.device)
