"""What contig_safe costs: nothing on a clean block, little and linear time on large graphs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from benchmarks import clean, pass_scaling, prologue


def test_a_clean_wan_block_pays_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "clean.json"
    assert clean.run(argparse.Namespace(repeats=3, json=str(path))) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("ok")
    content = json.loads(path.read_text())
    assert content["fixes"] == 0
    assert content["uses"] > 40
    assert content["equal"] is True
    assert all(counts["inductor"] > 0 for what, counts in content["rows"].items()
               if what != "alignment checks")
    assert str(tmp_path) not in content["command"]


def test_counts_are_read_off_the_generated_code() -> None:
    code = """
def call(args):
    buf0 = empty_strided_cpu((4, 4), (4, 1), torch.float32)
    cpp_fused_add_0(arg0_1, buf0)
    buf1 = torch.ops.mylib.op.default(buf0)
    extern_kernels.mm(buf0, buf1, out=buf2)
def get_args():
    buf9 = empty_strided_cpu((4, 4), (4, 1), torch.float32)
"""
    assert clean.count_code(code) == {
        "allocations": 1, "fused kernels": 1, "extern kernels": 2, "alignment checks": 0,
    }


def test_the_pass_is_quick_and_finds_every_planted_fault() -> None:
    size, fixes, seconds = pass_scaling.time_pass(10_000, 3)
    layers = fixes / 2  # padded rows and a misaligned bias in each
    assert layers == int(layers) > 300
    assert seconds / size * 10_000 <= pass_scaling.SECONDS_PER_10K


def test_looking_at_a_thousand_inputs_is_quick() -> None:
    plain, checked = prologue.time_call("cpu", prologue.INPUTS, 500)
    # Three times what the benchmark allows: CI machines are shared.
    assert checked - plain <= 3 * prologue.MICROSECONDS
