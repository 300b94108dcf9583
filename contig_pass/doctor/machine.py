"""What this machine is: versions, GPU, private hooks of torch, compile caches."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from contig_pass.doctor import processes
from contig_pass.errors import InductorHookError
from contig_pass.inductor import hooks
from contig_pass.inductor.examining import cache_directory, cache_folders, cache_switches

FOUND, ABSENT, MISSING = "found", "not in this version, not needed", "missing"
#: Files of a cache that are counted before the doctor stops counting.
_MOST_FILES = 100_000


@dataclass(frozen=True)
class HookState:
    """One private name of torch.

    Attributes:
        path: where it is looked for.
        state: :data:`FOUND`, :data:`ABSENT` or :data:`MISSING`.
        consequence: what does not work without it; only where it is missing.
    """

    path: str
    state: str
    consequence: str = ""


@dataclass(frozen=True)
class Folder:
    """A folder of cached files.

    Attributes:
        name: what is cached.
        path: where; ``exists`` says whether it is there.
        files, nbytes: how many files and bytes, counted up to a limit.
    """

    name: str
    path: str
    exists: bool
    files: int
    nbytes: int


def default_device() -> str:
    """``"cuda"`` where torch counts a GPU, which it does without touching it."""
    return "cuda" if torch.cuda.device_count() else "cpu"


def versions() -> dict[str, str]:
    """Of everything that a bug may depend on."""
    found = {
        "contig-pass": _installed("contig-pass"),
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda or "none",
        "triton": _installed("triton"),
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "CPU cores": str(os.cpu_count()),
    }
    return found


def gpu(timeout: float) -> dict[str, str]:
    """The first GPU; without one, why there is none. Asked in a process of its own."""
    if torch.version.cuda is None:
        return {"GPU": f"none: torch {torch.__version__} is built without CUDA"}
    if not torch.cuda.device_count():
        return {"GPU": "none: CUDA sees no device"}
    end = processes.run_one(_gpu, timeout)
    return {"GPU": f"{end.problem}: {end.message}"} if end.problem else end.value


def _gpu() -> dict[str, str]:
    facts = torch.cuda.get_device_properties(0)
    return {
        "GPU": facts.name,
        "GPUs": str(torch.cuda.device_count()),
        "compute capability": f"{facts.major}.{facts.minor}",
        "GPU memory": f"{facts.total_memory / 2**30:.1f} GiB",
        "multiprocessors": str(facts.multi_processor_count),
        "cuDNN": str(torch.backends.cudnn.version()),
        "driver": _driver(),
    }


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return asked.stdout.strip().partition("\n")[0]


def hook_states(timeout: float) -> tuple[tuple[HookState, ...], str]:
    """Every private name that contig_pass relies on, and what their self-test says if it fails.

    Looked for in a process of its own: the modules that they are in may touch a GPU on import.
    """
    end = processes.run_one(_hook_states, timeout)
    return ((), f"{end.problem}: {end.message}") if end.problem else end.value


def _hook_states() -> tuple[tuple[HookState, ...], str]:
    return tuple(map(_hook_state, hooks.HOOKS)), _self_test()


def _hook_state(hook: hooks.Hook) -> HookState:
    if hook.exists():
        return HookState(hook.path, FOUND)
    if not hook.expected():
        return HookState(hook.path, ABSENT)
    return HookState(hook.path, MISSING, hook.consequence)


def _self_test() -> str:
    try:
        hooks.self_test()
    except InductorHookError as error:
        return str(error)
    return "; ".join(hook.told() for hook in hooks.missing())


def caches() -> tuple[dict[str, bool | None], tuple[Folder, ...]]:
    """Which compile caches are on, and Inductor's cache directory with what is in it."""
    directory = cache_directory()
    if directory is None:
        return cache_switches(), ()
    folders = {"all of Inductor": directory, **cache_folders(directory)}
    return cache_switches(), tuple(_folder(name, path) for name, path in folders.items())


def _folder(name: str, path: Path) -> Folder:
    files = nbytes = 0
    for folder, _, names in os.walk(path):
        for file in names:
            try:
                nbytes += os.lstat(os.path.join(folder, file)).st_size
            except OSError:  # another process may clear its cache meanwhile
                continue
            files += 1
        if files >= _MOST_FILES:
            break
    return Folder(name, str(path), path.is_dir(), files, nbytes)


def _installed(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
