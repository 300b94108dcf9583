"""Compile caches: plain Inductor, each policy and each contract table keep artifacts apart.

Where a hit must be a real one, each step runs in a process of its own on one shared cache folder;
what the key covers is tried in this process, on a folder of its own and after torch._dynamo.reset.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

import contig_pass
import contig_pass.fingerprint as fingerprint_module
from contig_pass.fingerprint import fingerprint
from contig_pass.options import Options, parse_options
from tests import kernels

_PROGRAM = """
import sys, torch
from torch._dynamo.utils import counters
import contig_pass
from tests import kernels
torch._inductor.config.compile_threads = 1
backend, policy, alignment = sys.argv[1:]
options = {} if backend == "inductor" else {"policy": policy}
with kernels.contracts():
    if alignment != "16":
        contig_pass.unregister_contract("layout_tests::rows", "x")
        rules = [contig_pass.UnitStrideLast(), contig_pass.AlignedPointer(int(alignment))]
        contig_pass.register_contract("layout_tests::rows", "x", rules)
    def function(b):
        return kernels.rows(b[4:516].view(32, 16)), kernels.rows(b[1:513].view(32, 16))
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
        # Trying out the processor's vector instructions takes most of a new folder's first compile.
        "TORCHINDUCTOR_VEC_ISA_OK": "0",
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


@pytest.fixture
def empty_cache(tmp_path: Path) -> Iterator[None]:
    """Inductor's caches, on and empty."""
    settings = {"force_disable_caches": False}
    configured = torch._inductor.config.patch(settings)
    with kernels.contracts(), fresh_cache(dir=str(tmp_path)), configured:
        yield


def _misaligned_rows(b: torch.Tensor) -> torch.Tensor:
    return kernels.rows(b[1:513].view(32, 16))


def _compile(backend: str = "contig_safe", **options: Any) -> dict[str, int]:
    """Hits and misses of compiling anew; checks the values, the kernel's operand and the report."""
    torch._dynamo.reset()
    contig_pass.forget_reports()
    counters.clear()
    kernels.received.clear()
    b = torch.arange(600.0)
    out = torch.compile(_misaligned_rows, backend=backend, options=options)(b)
    assert torch.equal(out, 2 * b[1:513].view(32, 16))
    repaired = backend == "contig_safe" and options.get("policy") != "audit"
    assert [seen.address % 16 for seen in kernels.received] == [0 if repaired else 4]
    inductor, autograd = counters["inductor"], counters["aot_autograd"]
    assert autograd["autograd_cache_bypass"] == inductor["fxgraph_cache_bypass"] == 0
    if backend == "contig_safe":
        [report] = contig_pass.last_reports()
        assert report.cached == (inductor["fxgraph_cache_hit"] == 1)
        assert report.totals.fixes == repaired
    return {
        "fx hits": inductor["fxgraph_cache_hit"], "fx misses": inductor["fxgraph_cache_miss"],
        "aot hits": autograd["autograd_cache_hit"], "aot misses": autograd["autograd_cache_miss"],
    }


HIT = {"fx hits": 1, "fx misses": 0, "aot hits": 1, "aot misses": 0}
MISS = {"fx hits": 0, "fx misses": 1, "aot hits": 0, "aot misses": 1}


def _other_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    # Of an op that the graph does not call: the whole table counts.
    contig_pass.register_contract("aten::mm", "self", [contig_pass.AlignedPointer(64)])


def _other_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint_module, "_source_digest", lambda: "another version")


def _other_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    # For contig_pass alone: Inductor has a key of its own for torch's version.
    other = SimpleNamespace(__version__="99.0.0", cuda=torch.cuda)
    monkeypatch.setattr(fingerprint_module, "torch", other)


@pytest.mark.usefixtures("empty_cache")
@pytest.mark.parametrize("change", [_other_contract, _other_source, _other_torch])
def test_a_cached_graph_serves_until_what_made_it_changes(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[pytest.MonkeyPatch], None]
) -> None:
    assert _compile() == MISS
    assert _compile() == HIT
    change(monkeypatch)
    assert _compile() == MISS
    assert _compile() == HIT


@pytest.mark.usefixtures("empty_cache")
def test_each_policy_has_its_own_graphs() -> None:
    policies = ("dense", "contract", "audit", "strict")
    assert [_compile(policy=policy) for policy in policies] == [MISS] * 4
    assert [_compile(policy=policy) for policy in policies] == [HIT] * 4


@pytest.mark.usefixtures("empty_cache")
@pytest.mark.parametrize("order", [("inductor", "contig_safe"), ("contig_safe", "inductor")])
def test_the_other_backend_is_a_miss(order: tuple[str, str]) -> None:
    assert [_compile(backend) for backend in order] == [MISS, MISS]
    assert [_compile(backend) for backend in order] == [HIT, HIT]
