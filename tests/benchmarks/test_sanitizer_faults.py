"""The fault table under the sanitizer; ``python -m benchmarks sanitizer --faults`` runs all."""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext

import pytest

from benchmarks import sanitizer_overhead
from benchmarks.faults.catalogue import catalogue
from benchmarks.faults.matmul import K
from benchmarks.faults.sanitized import Verdict, _emulated, _quiet, verdict_on
from benchmarks.faults.worker import RIGHT
from contig_pass.sanitizer import sanitize

#: Every seventh program, and more of the groups that are few.
SAMPLE = [p for i, p in enumerate(catalogue()) if "cpu" in p.devices and i % 7 == 0]
MEASURED = {p.name: p for p in catalogue() if p.group == "_scaled_mm, row-wise"}
OPERANDS = {"a": "self", "b": "mat2"}


@pytest.fixture(scope="module", autouse=True)
def _kernels():
    with _quiet(), _emulated():
        yield


@pytest.mark.parametrize("program", SAMPLE, ids=lambda program: f"{program.group}: {program.name}")
def test_a_program_of_the_table(program) -> None:
    verdict = verdict_on(program)
    assert verdict.problem() == ""


@pytest.mark.parametrize("name", [n for n in MEASURED if n.endswith("view")])
def test_the_right_operand_and_the_right_view(name: str) -> None:
    verdict = verdict_on(MEASURED[name])
    if verdict.eager == RIGHT:
        return
    (finding,) = verdict.findings
    word = name.split()[0]
    assert finding.operand == OPERANDS.get(word, word)
    assert finding.line.code.startswith("return torch._scaled_mm(")
    if name != "b row-major, view":  # whose last view is the call's own transposition
        assert finding.made.file.endswith("program.py")
        assert f"{K}" in finding.memory or word not in "ab"


def test_the_benchmark_counts_and_exits(capsys, tmp_path) -> None:
    parser = argparse.ArgumentParser()
    sanitizer_overhead.add_parser(parser.add_subparsers())
    file = tmp_path / "found.json"
    args = parser.parse_args(["sanitizer", "--faults", "--every", "60", "--json", str(file)])
    assert args.run(args) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(", 0 failed")
    assert len(json.loads(file.read_text())["results"]) == 6


def test_modes_are_timed_in_turn() -> None:
    calls = []
    modes = {"plain": nullcontext, "sanitize": sanitize}
    took = sanitizer_overhead.time_modes(lambda: calls.append(1), modes, "cpu", 40, batch=4)
    assert list(took) == ["plain", "sanitize"]
    assert min(took.values()) > 0
    assert len(calls) == 2 * 4 * (20 + 10)


def test_what_counts_as_a_problem() -> None:
    def verdict(**fields: object) -> Verdict:
        given = {"illegal": False, "eager": RIGHT, "findings": (), "raised": False,
                 "fixed": RIGHT, "message": ""}
        return Verdict("g", "p", **{**given, **fields})

    assert verdict().problem() == ""
    assert "nothing was found" in verdict(eager="WRONG VALUE").problem()
    assert "disagree" in verdict(raised=True).problem()
    assert "not repaired" in verdict(fixed="WRONG VALUE").problem()
    assert "no error" in verdict(illegal=True).problem()
