"""What a measurement was made on."""

from __future__ import annotations

import os
import platform

import torch


def machine() -> dict[str, object]:
    """Processor, GPU and versions, for the head of a table and for JSON."""
    facts: dict[str, object] = {
        "cpu": platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }
    try:
        import triton

        facts["triton"] = triton.__version__
    except ImportError:
        facts["triton"] = None
    if torch.cuda.device_count():
        facts["gpu"] = _gpu_name()
    return facts


def _gpu_name() -> str:
    import subprocess

    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
