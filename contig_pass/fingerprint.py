"""A hash of everything that a repaired graph depends on, for the compile caches' keys."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import torch

from contig_pass.contracts import REGISTRY
from contig_pass.options import Options


def fingerprint(options: Options) -> str:
    """Hash of the package's source, ``options``, the contract table, torch and the device."""
    parts = (
        _source_digest(),
        options.decisive(),
        REGISTRY.digest(),
        torch.__version__,
        _device(),
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@functools.cache
def _source_digest() -> str:
    """Hash of every source file of the package: pass, contracts and lowerings alike."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _device() -> str:
    if not torch.cuda.is_available():
        return "cpu"
    return repr(torch.cuda.get_device_capability())
