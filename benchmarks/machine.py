"""What a measurement was made on, and results as JSON."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping

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


def write_json(path: str, benchmark: str, content: Mapping[str, object]) -> None:
    """Write ``content`` behind the benchmark's name, the command and the machine."""
    command = " ".join(sys.argv[1:]).replace(f"--json {path}", "").strip()
    head = {
        "benchmark": benchmark,
        "command": f"python -m benchmarks {command}",
        "machine": machine(),
    }
    with open(path, "w", encoding="utf-8") as file:
        json.dump({**head, **content}, file, indent=1)
        file.write("\n")


def _gpu_name() -> str:
    import subprocess

    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
