"""torch.compiler's portable cache artifacts: what one process compiled, another one runs repaired.

Each process has an empty cache folder of its own, so that a hit comes from the artifacts alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

_PROGRAM = """
import json, sys, torch
from torch._dynamo.utils import counters
import contig_pass
from tests import kernels

# Precompiling headers costs more than it saves where the cache folder is new.
torch._inductor.config.cpp_cache_precompile_headers = False
torch._inductor.config.compile_threads = 1
step, file = sys.argv[1:]
if step == "warm":
    with open(file, "rb") as stored:
        torch.compiler.load_cache_artifacts(stored.read())

def function(x, b):
    return kernels.rows(x + 1) + kernels.rows(x) + kernels.rows(b[1:513].view(32, 16))

reports, calls = [], []
with kernels.contracts():
    compiled = torch.compile(
        function, backend="contig_safe", fullgraph=True, options={"report": reports.append}
    )
    memory, b = torch.arange(520.0), torch.arange(600.0)
    for start in (0, 1, 3):
        x = memory[start:start + 512].view(32, 16)
        kernels.received.clear()
        # Plain arithmetic, apart from the kernel: it doubles what it is given.
        right = torch.equal(compiled(x, b), 2 * (x + 1) + 2 * x + 2 * b[1:513].view(32, 16))
        calls.append([right, len(kernels.received), len(kernels.bad()), x.data_ptr() % 16])
if step == "cold":
    with open(file, "wb") as stored:
        stored.write(torch.compiler.save_cache_artifacts()[0])
print(json.dumps({
    "calls": calls,
    "graphs": counters["stats"]["unique_graphs"],
    "inductor": counters["inductor"],
    "autograd": counters["aot_autograd"],
    "reports": [[report.cached, report.totals.fixes] for report in reports],
}))
"""


def _run(step: str, file: Path, cache: Path) -> dict[str, Any]:
    root = Path(__file__).parents[2]
    environment = {
        **os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "PYTHONPATH": str(root),
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "0",
        # Trying out the processor's vector instructions takes most of a new folder's first compile.
        "TORCHINDUCTOR_VEC_ISA_OK": "0",
    }
    printed = subprocess.run(
        [sys.executable, "-c", _PROGRAM, step, str(file)],
        env=environment, cwd=root, check=True, capture_output=True, text=True,
    ).stdout
    return json.loads(printed)


def test_artifacts_carry_the_repair_the_report_and_the_realigning(tmp_path: Path) -> None:
    file = tmp_path / "artifacts"
    cold = _run("cold", file, tmp_path / "cold")
    warm = _run("warm", file, tmp_path / "warm")

    assert cold["inductor"].get("fxgraph_cache_hit", 0) == 0
    assert cold["inductor"]["fxgraph_cache_miss"] == 1
    assert cold["autograd"]["autograd_cache_miss"] == 1
    assert warm["autograd"]["autograd_cache_hit"] == 1
    assert warm["autograd"].get("autograd_cache_miss", 0) == 0
    assert warm["inductor"]["fxgraph_cache_hit"] == 1
    assert warm["inductor"].get("fxgraph_cache_miss", 0) == 0

    fixes = cold["reports"][0][1]
    assert fixes > 0
    assert cold["reports"] == [[False, fixes]]
    assert warm["reports"] == [[True, fixes]]
    for process in (cold, warm):
        assert process["graphs"] == 1  # the misaligned calls run the graph of the aligned one
        # Right values; three operands, none that its kernel would object to.
        assert process["calls"] == [[True, 3, 0, 0], [True, 3, 0, 4], [True, 3, 0, 12]]
