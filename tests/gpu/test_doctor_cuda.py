"""On a GPU: the doctor finds what works, and the contracts of one family hold."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_row_wise_contracts_hold(tmp_path: Path) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("FP8 products need compute capability 8.9")
    path = tmp_path / "doctor.json"
    # In a process of its own: this one has used the GPU, and could not fork children for it.
    command = [sys.executable, "-m", "contig_pass.cli", "doctor", "--verify", "--jobs", "6"]
    done = subprocess.run(
        [*command, "--only", "_scaled_mm row-wise", "--json", str(path)],
        capture_output=True, text=True, timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(path.read_text())
    assert found["device"] == "cuda"
    assert found["self_test"] == ""
    major, minor = torch.cuda.get_device_capability()
    assert found["gpu"]["compute capability"] == f"{major}.{minor}"
    states = {kernel["name"]: kernel["state"] for kernel in found["attention"]}
    assert states["SDPA flash"] == states["SDPA math"] == "works"
    products = {kernel["name"]: kernel["state"] for kernel in found["quantised"]}
    assert products["FP8, row-wise scales"] == "works"
    rows = found["verification"]["rows"]
    assert found["verification"]["counts"]["NO"] == 0
    assert len(rows) > 40
    by_layout = {(row["operand"], row["layout"]): row for row in rows}
    assert by_layout["self", "pointer off by 16 B"]["outcome"] == "right value"
    assert by_layout["self", "pointer off by 1 B"]["outcome"] == "error at the call"
    assert by_layout["bias", "inner stride 2"]["outcome"] == "wrong value"
