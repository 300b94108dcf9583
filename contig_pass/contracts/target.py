"""The device whose demands count: a kind of device and, on CUDA, a compute capability."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from contig_pass.errors import OptionError

AUTO = "auto"


@dataclass(frozen=True)
class Target:
    """A device kind (``"cuda"``, ``"cpu"``) and its CUDA compute capability."""

    kind: str
    capability: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """``sm90``, ``cpu``, ..."""
        if self.capability is None:
            return self.kind
        return f"sm{self.capability[0]}{self.capability[1]}"

    def is_sm(self, major: int) -> bool:
        """Whether this is a CUDA device of compute capability ``major``.x."""
        return self.capability is not None and self.capability[0] == major


CPU = Target("cpu")
#: CPU tensors are judged as a rehearsal for this device: quantised kernels run on GPUs.
REHEARSAL = Target("cuda", (9, 0))


def parse_target(text: str) -> Target | None:
    """``"auto"`` (None: judge each operand by its own device), ``"cpu"`` or ``"sm90"``.

    Raises:
        OptionError: anything else.
    """
    if text == AUTO:
        return None
    if text == "cpu":
        return CPU
    match = re.fullmatch(r"sm_?(\d+)(\d)a?", str(text))
    if match is None:
        raise OptionError(
            f"target={text!r}: use 'auto', 'cpu', or a CUDA architecture such as 'sm90', 'sm100'"
        )
    return Target("cuda", (int(match[1]), int(match[2])))


def target_of(device: torch.device) -> Target:
    """The target that an operand on ``device`` is judged by under ``target="auto"``.

    A CUDA device is itself. A CPU or meta tensor is a rehearsal for :data:`REHEARSAL`, since the
    demands in question are those of GPU kernels and a legal layout costs nothing on a CPU.
    """
    if device.type == "cuda" and torch.cuda.is_available():
        return Target("cuda", torch.cuda.get_device_capability(device))
    if device.type in ("cuda", "cpu", "meta"):
        return REHEARSAL
    return Target(device.type)
