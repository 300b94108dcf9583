"""Everything that the doctor finds, as one object and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from contig_pass.doctor import machine
from contig_pass.doctor.kernels import Kernel, attention_kernels, quantised_products
from contig_pass.doctor.machine import Folder, HookState
from contig_pass.doctor.privacy import scrubbed
from contig_pass.doctor.verify import AGREES, DISAGREES, STRICTER, Verification

#: Raised whenever a field of the JSON changes its meaning or goes away.
SCHEMA = 1


@dataclass(frozen=True)
class Examination:
    """What works on this machine.

    Attributes:
        device: kind of the device examined.
        versions, gpu: facts by name.
        attention, quantised: kernels, and why some do not work.
        hooks: private names of torch.
        self_test: of the hooks; ``""`` if it passed.
        switches: compile caches, whether on.
        folders: of the caches.
        verification: of ``--verify``.
    """

    device: str
    versions: dict[str, str]
    gpu: dict[str, str]
    attention: tuple[Kernel, ...]
    quantised: tuple[Kernel, ...]
    hooks: tuple[HookState, ...]
    self_test: str
    switches: dict[str, bool | None]
    folders: tuple[Folder, ...]
    verification: Verification | None = None

    @property
    def fine(self) -> bool:
        """No contract was refuted and no hook is missing; if asked for, something was verified."""
        if self.self_test:
            return False
        verified = self.verification
        return verified is None or bool(verified.rows and not verified.count(DISAGREES))


def examine(device: str, jobs: int, timeout: float) -> Examination:
    """Look at everything but the contracts.

    Raises:
        DoctorError: this process cannot fork children.
    """
    switches, folders = machine.caches()
    hooks, self_test = machine.hook_states(timeout)
    return Examination(
        device=device,
        versions=machine.versions(),
        gpu=machine.gpu(timeout),
        attention=attention_kernels(device, jobs, timeout),
        quantised=quantised_products(device, jobs, timeout),
        hooks=hooks,
        self_test=self_test,
        switches=switches,
        folders=folders,
    )


def to_json(found: Examination) -> dict[str, Any]:
    """The examination as JSON that can be sent to strangers; fields as in the classes' own words.

    ``verification`` is null without ``--verify``. Its ``counts`` are of the rows' ``agrees``:
    ``"yes"``, ``"stricter"`` (a broken layout that this machine takes, which the contract says may
    happen) and ``"NO"``. Nothing of the environment is in it; paths lose what says whose they are.
    """
    content = scrubbed({"report": "contig-pass doctor", "schema": SCHEMA, **asdict(found)})
    verified = found.verification
    if verified is not None:
        content["verification"]["counts"] = {
            agrees: verified.count(agrees) for agrees in (AGREES, STRICTER, DISAGREES)
        }
    return {**content, "fine": found.fine}
