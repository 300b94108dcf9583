"""What a copy costs: bytes moved, and microseconds at a stated bandwidth."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from contig_pass.contracts.target import Target

#: Device copy rates in bytes per second, counting bytes read plus bytes written.
#: sm90: 3.02 TB/s measured on an H100 80GB HBM3 (torch 2.11.0+cu130).
_MEASURED = {(9, 0): 3.02e12}
#: One thread's copy rate on a current x86 server, as a round figure: order of magnitude only.
_CPU = 10e9


@dataclass(frozen=True)
class Bandwidth:
    """Bytes per second of a copy, and where the figure comes from."""

    bytes_per_second: float
    source: str

    def microseconds(self, nbytes: float) -> float:
        """Modelled time in microseconds to move ``nbytes`` (read plus written)."""
        return nbytes / self.bytes_per_second * 1e6

    def describe(self) -> str:
        """The rate and its source in a few words."""
        return f"{self.bytes_per_second / 1e12:.2f} TB/s ({self.source})"


@functools.cache
def bandwidth_of(target: Target) -> Bandwidth:
    """The copy bandwidth that prices are modelled with on ``target``."""
    if target.kind != "cuda":
        return Bandwidth(_CPU, "assumed for one CPU thread")
    measured = _MEASURED.get(target.capability or (0, 0))
    if measured is not None:
        return Bandwidth(measured, f"device copy measured on {target.name}")
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        clock = getattr(properties, "memory_clock_rate", 0)  # kHz, two transfers a cycle
        width = getattr(properties, "memory_bus_width", 0)  # bits
        if clock and width:
            peak = 2 * clock * 1e3 * width / 8
            return Bandwidth(0.9 * peak, f"90% of the theoretical peak of {properties.name}")
    return Bandwidth(_MEASURED[9, 0], f"rate of sm90, none known for {target.name}")
