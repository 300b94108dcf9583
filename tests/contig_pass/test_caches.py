"""Compile caches: plain Inductor, each policy and each contract table keep artifacts apart.

Each step runs in a process of its own on one shared cache folder, so that a hit is a real one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from contig_pass.fingerprint import fingerprint
from contig_pass.options import Options, parse_options

_PROGRAM = """
import sys, torch
from torch._dynamo.utils import counters
import contig_pass
from tests import kernels
backend, policy, alignment = sys.argv[1:]
options = {} if backend == "inductor" else {"policy": policy}
with kernels.contracts():
    if alignment != "16":
        contig_pass.unregister_contract("layout_tests::rows", "x")
        rules = [contig_pass.UnitStrideLast(), contig_pass.AlignedPointer(int(alignment))]
        contig_pass.register_contract("layout_tests::rows", "x", rules)
    def function(b):
        return kernels.rows(b[4:516].view(32, 16)) + kernels.rows(b[1:513].view(32, 16))
    b = torch.zeros(600)
    torch.compile(function, backend=backend, options=options)(b)
addresses = [seen.address % 64 for seen in kernels.received]
hits = counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]
print(hits, *[a % 16 for a in addresses], *[a % 32 for a in addresses])
"""


def _run(cache: Path, backend: str, policy: str = "dense", alignment: int = 16) -> list[int]:
    root = Path(__file__).parents[2]
    environment = {
        **os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "PYTHONPATH": str(root),
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "0",
    }
    command = [sys.executable, "-c", _PROGRAM, backend, policy, str(alignment)]
    printed = subprocess.run(
        command, env=environment, cwd=root, check=True, capture_output=True, text=True
    ).stdout
    return [int(word) for word in printed.split()]


@pytest.mark.parametrize("order", [("inductor", "contig_safe"), ("contig_safe", "inductor")])
def test_plain_inductor_and_contig_safe_do_not_share_artifacts(
    tmp_path: Path, order: tuple[str, str]
) -> None:
    outcomes = {backend: _run(tmp_path, backend) for backend in order}
    # The kernel's operands modulo 16: plain Inductor hands over the second view as it is.
    assert outcomes["inductor"][1:3] == [0, 4]
    assert outcomes["contig_safe"][1:3] == [0, 0]
    again = _run(tmp_path, "contig_safe")
    assert again[0] > 0  # a hit, and the repair comes with it
    assert again[1:3] == [0, 0]


def test_another_contract_or_policy_is_another_artifact(tmp_path: Path) -> None:
    assert _run(tmp_path, "contig_safe")[1:3] == [0, 0]
    stricter = _run(tmp_path, "contig_safe", alignment=32)
    assert stricter[0] == 0
    assert stricter[3:] == [0, 0]
    audited = _run(tmp_path, "contig_safe", policy="audit")
    assert audited[0] == 0
    assert audited[1:3] == [0, 4]


def test_the_fingerprint_covers_what_changes_a_graph() -> None:
    variants = [
        Options(), parse_options(None, {"policy": "contract"}),
        parse_options(None, {"target": "sm100"}), parse_options(None, {"target": "cpu"}),
    ]
    assert len({fingerprint(options) for options in variants}) == len(variants)
    assert fingerprint(Options()) == fingerprint(Options(report="elsewhere.json"))
