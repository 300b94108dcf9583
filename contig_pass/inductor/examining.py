"""Inductor looked at from outside: its caches, and one function compiled by it alone."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

#: Settings of the compile caches by what they are called in a report: module and attribute.
_SWITCHES = {
    "FX graph cache": ("torch._inductor.config", "fx_graph_cache"),
    "AOTAutograd cache": ("torch._functorch.config", "enable_autograd_cache"),
    "all caches disabled": ("torch._inductor.config", "force_disable_caches"),
}

#: Folders in Inductor's cache directory.
_FOLDERS = {
    "FX graphs": "fxgraph",
    "AOTAutograd": "aotautograd",
    "Triton": "triton",
    "contig_pass": "contig_pass",
}


def cache_switches() -> dict[str, bool | None]:
    """Which compile caches are on; ``None`` where this torch has no such setting."""
    found: dict[str, bool | None] = {}
    for name, (module, attribute) in _SWITCHES.items():
        value = getattr(importlib.import_module(module), attribute, None)
        found[name] = None if value is None else bool(value)
    return found


def cache_directory() -> Path | None:
    """Where Inductor caches, whether or not it is there yet; ``None`` if it does not say."""
    named = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if named:
        return Path(named)
    try:
        from torch._inductor.runtime.cache_dir_utils import default_cache_dir
    except ImportError:
        return None
    return Path(default_cache_dir())


def cache_folders(directory: Path) -> dict[str, Path]:
    """The folders of single caches in Inductor's cache directory."""
    folders = {name: directory / folder for name, folder in _FOLDERS.items()}
    triton = os.environ.get("TRITON_CACHE_DIR")
    if triton:
        folders["Triton"] = Path(triton)
    return folders


def import_compiler() -> None:
    """Import Inductor, which takes seconds, for the processes that are forked afterwards."""
    importlib.import_module("torch._inductor.compile_fx")


def compile_alone(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` compiled by plain Inductor, with no cache and in this process."""
    compiled = torch.compile(function, backend="inductor", dynamic=False)

    def run(*args: Any) -> Any:
        config = importlib.import_module("torch._inductor.config")
        with config.patch(force_disable_caches=True, compile_threads=1):
            return compiled(*args)

    return run
