"""The attention packages that are not ours: which is installed, and whether it fits this GPU.

Entry points and demands are those of the packages' public sources: flash-attn (module
``flash_attn``), FlashAttention 3 (``flash_attn_interface``, or ``fa3_fwd_interface`` of the
forward-only wheel), FlashAttention 4 (``flash_attn.cute``), SageAttention 2 (``sageattention``) and
SageAttention 3 (``sageattn3``).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

HALF = (torch.bfloat16, torch.float16)
WIDE = (*HALF, torch.float32)


@dataclass(frozen=True)
class Package:
    """One installable package.

    Attributes:
        distribution: its name for the installer.
        module: what to import.
        minimum: the oldest version that has the entry points used here.
        dtypes: of q, k and v.
    """

    distribution: str
    module: str
    minimum: str
    dtypes: tuple[torch.dtype, ...] = HALF


@dataclass(frozen=True)
class Demand:
    """What a mode needs beyond torch.

    Attributes:
        packages: any one of these.
        capabilities: text for a message, and the test of a compute capability.
        head_dims: text for a message, and the test of a head dimension.
    """

    packages: tuple[Package, ...]
    capabilities: tuple[str, Callable[[tuple[int, int]], bool]]
    head_dims: tuple[str, Callable[[int], bool]]


_FLASH_HEADS = ("a multiple of 8 up to 256", lambda size: size % 8 == 0 and size <= 256)
_SAGE_HEADS = ("64 or 128", lambda size: size in (64, 128))
_SAGE_3 = Demand(
    (Package("sageattn3", "sageattn3", "1.0"),),
    ("12.0 or 12.1", lambda sm: sm in ((12, 0), (12, 1))),
    _SAGE_HEADS,
)
DEMANDS = {
    "flash_attn_2": Demand(
        (Package("flash-attn", "flash_attn", "2.3"),),
        ("8.0 or later", lambda sm: sm >= (8, 0)),
        _FLASH_HEADS,
    ),
    "flash_attn_3": Demand(
        (
            Package("flash-attn-3", "flash_attn_interface", "3.0"),
            # The forward-only wheel is built without fp16 kernels.
            Package("fa3-fwd", "fa3_fwd_interface", "0.0.3", (torch.bfloat16,)),
        ),
        ("8.0 to 9.0", lambda sm: (8, 0) <= sm <= (9, 0)),
        _FLASH_HEADS,
    ),
    # The same packages; q, k and v are cast on the way. Only the kernels for Hopper take 8 bits.
    "flash_attn_3_fp8": Demand(
        (
            Package("flash-attn-3", "flash_attn_interface", "3.0", WIDE),
            Package("fa3-fwd", "fa3_fwd_interface", "0.0.3", WIDE),
        ),
        ("9.0", lambda sm: sm == (9, 0)),
        ("64, 96, 128, 192 or 256", lambda size: size in (64, 96, 128, 192, 256)),
    ),
    "flash_attn_4": Demand(
        (Package("flash-attn-4", "flash_attn.cute", "4.0"),),
        ("9.0 or later", lambda sm: sm >= (9, 0)),
        ("a multiple of 8 up to 128", lambda size: size % 8 == 0 and size <= 128),
    ),
    "sageattn": Demand(
        (Package("sageattention", "sageattention", "2.0"),),
        (
            "8.0, 8.6, 8.9, 9.0, 12.0 or 12.1",
            lambda sm: sm in ((8, 0), (8, 6), (8, 9), (9, 0), (12, 0), (12, 1)),
        ),
        _SAGE_HEADS,
    ),
    "sageattn_3": _SAGE_3,
    "sageattn_3_fp4": _SAGE_3,
    "sageattn_3_fp8": _SAGE_3,
}


def obstacle(mode: str, kind: str, index: int | None, dtype: torch.dtype | None) -> str:
    """What of the machine rules ``mode`` out, in a few words; ``""`` if nothing does.

    Args:
        mode: one of :data:`DEMANDS`.
        kind, index: of the device. On ``"meta"`` nothing is computed, so no package is needed.
        dtype: of q, k and v, if known.
    """
    demand = DEMANDS[mode]
    if kind == "meta":
        return ""
    found = installed(mode)
    wrong = [_package_problem(demand), _capability_problem(demand, kind, index)]
    if found is not None and dtype is not None and dtype not in found.dtypes:
        names = " or ".join(str(d).removeprefix("torch.") for d in found.dtypes)
        wrong.append(f"{found.distribution} takes {names}, got {str(dtype).removeprefix('torch.')}")
    return "; ".join(problem for problem in wrong if problem)


def installed(mode: str) -> Package | None:
    """The first package of ``mode`` that is installed, whatever its version."""
    return next((p for p in DEMANDS[mode].packages if present(p.module)), None)


def function(mode: str, name: str) -> Callable[..., object]:
    """The entry point ``name`` of the package behind ``mode``.

    Raises:
        ValueError: the package is not installed, or has no such function.
    """
    package = installed(mode)
    if package is None:
        raise ValueError(f"attention mode {mode!r}: {_package_problem(DEMANDS[mode])}")
    found = getattr(importlib.import_module(package.module), name, None)
    if found is None:
        raise ValueError(
            f"attention mode {mode!r}: {package.distribution} {version(package)} has no {name}; "
            f"{package.minimum} or later has"
        )
    return found


def version(package: Package) -> str:
    """The installed version by the package's metadata, else by its ``__version__``."""
    try:
        return importlib.metadata.version(package.distribution)
    except importlib.metadata.PackageNotFoundError:
        module = importlib.import_module(package.module)
        return str(getattr(module, "__version__", "of unknown version"))


def capability(kind: str, index: int | None) -> tuple[int, int] | None:
    """Compute capability of a device; ``None`` if it is no CUDA device that torch can see."""
    if kind != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(index)


def _package_problem(demand: Demand) -> str:
    wanted = " or ".join(f"{p.distribution} >= {p.minimum}" for p in demand.packages)
    package = next((p for p in demand.packages if present(p.module)), None)
    if package is None:
        return f"package {wanted} needed, not installed"
    try:
        importlib.import_module(package.module)
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        return f"{package.distribution} is installed but does not import: {reason}"
    found = version(package)
    if _numbers(found) < _numbers(package.minimum):
        return f"package {wanted} needed, found {package.distribution} {found}"
    return ""


def _capability_problem(demand: Demand, kind: str, index: int | None) -> str:
    words, fits = demand.capabilities
    sm = capability(kind, index)
    if sm is None:
        seen = "none is visible" if kind == "cuda" else f"got {kind}"
        return f"a CUDA device of compute capability {words} needed, {seen}"
    if not fits(sm):
        return f"compute capability {words} needed, found {sm[0]}.{sm[1]}"
    return ""


def present(module: str) -> bool:
    """Whether a module is there."""
    if module in sys.modules:
        return True
    parent = module.rpartition(".")[0]
    return (not parent or present(parent)) and _findable(module)


def _findable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # its parent is no package, or does not import
        return False


def _numbers(text: str) -> tuple[int, ...]:
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, match[0].split("."))) if match else ()
