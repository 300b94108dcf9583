"""Reports: text that fits, JSON that reads back, files all or nothing, explain, the trace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import contig_pass
from contig_pass.errors import ContigPassError, ReportError
from contig_pass.provenance import repeated
from contig_pass.report.json import from_file, from_json, to_file, to_json
from contig_pass.report.model import merge
from contig_pass.report.text import to_text
from tests import kernels


@pytest.fixture(autouse=True)
def kernel_contracts() -> Iterator[None]:
    with kernels.contracts():
        yield


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.flat = torch.nn.Parameter(torch.arange(600.0), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + kernels.rows(self.flat[1:513].view(32, 16))


class Stack(torch.nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(Layer() for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def report_of(depth: int = 1, **options: object) -> contig_pass.Report:
    model = Stack(depth)
    options.setdefault("inner", "aot_eager")
    torch.compile(model, backend="contig_safe", options=options)(torch.zeros(32, 16))
    return contig_pass.last_reports()[-1]


def test_rows_name_operand_place_price_and_source_line() -> None:
    (row,) = report_of().fixes
    assert row.op == "layout_tests::rows.default"
    assert row.operand == "x"
    assert row.before.strides == (16, 1)
    assert (row.before.offset, row.before.alignment) == (4, 4)
    assert (row.after.offset, row.after.alignment) == (0, 64)
    assert row.nbytes == 2 * 32 * 16 * 4
    assert row.microseconds == pytest.approx(row.nbytes / 3.02e12 * 1e6)
    assert row.module == "blocks.0"
    assert row.file == __file__
    assert "kernels.rows(self.flat[1:513]" in row.code
    assert row.rules == ("pointer aligned to 16 bytes",)
    assert row.source == "registered by the user"


def test_equal_blocks_read_as_one() -> None:
    report = report_of(40)
    assert report.totals.fixes == 40
    text = to_text(report)
    assert "blocks.* x40" in text
    assert text.count("test_report.py:") == 1
    assert text.count("@@") == 1
    assert max(map(len, text.splitlines())) <= 100
    assert "3.02 TB/s" in text


def test_repeated_names() -> None:
    assert repeated("blocks.12.attn.to_q") == "blocks.*.attn.to_q"
    assert repeated("0.proj") == "*.proj"
    assert repeated("fc1") == "fc1"


def test_the_graph_diff_shows_strides_and_byte_offsets() -> None:
    text = str(report_of())
    assert "float32[32, 16][16, 1]@4" in text
    copied = "+ contiguous_default: float32[32, 16][16, 1]@0 = contig_pass.contiguous.default("
    assert copied in text


def test_json_reads_back_as_it_was_written() -> None:
    report = report_of(2)
    content = json.loads(json.dumps(to_file([report])))
    assert content["schema"] == "contig_pass.report"
    assert content["version"] == 4
    assert from_file(content) == [report]
    with pytest.raises(ReportError, match="version 7"):
        from_file({**content, "version": 7})
    with pytest.raises(ReportError, match="not a report file"):
        from_file({"version": 1})
    broken = to_json(report)
    del broken["totals"]
    with pytest.raises(ReportError, match="totals"):
        from_json(broken)


def test_merged_reports_add_up() -> None:
    one, two = report_of(1), report_of(2)
    both = merge([one, two])
    assert both.totals.fixes == 3
    assert both.totals.nbytes == one.totals.nbytes + two.totals.nbytes
    assert len(both.rows) == 3


@pytest.mark.parametrize("suffix", [".json", ".txt"])
def test_a_path_receives_every_graph(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"report{suffix}"

    def function(b: torch.Tensor) -> torch.Tensor:
        first = kernels.rows(b[1:513].view(32, 16))
        torch._dynamo.graph_break()
        return first + kernels.rows(b[2:514].view(32, 16))

    options = {"report": str(path), "inner": "aot_eager"}
    torch.compile(function, backend="contig_safe", options=options)(torch.arange(600.0))
    content = path.read_text()
    if suffix == ".json":
        assert from_file(json.loads(content)) == contig_pass.last_reports()
    else:
        assert content.count("contig_pass report:") == 2
    assert list(tmp_path.iterdir()) == [path]


def test_a_callable_receives_the_report() -> None:
    received: list[contig_pass.Report] = []
    report = report_of(report=received.append)
    assert received == [report]

    def fails(report: contig_pass.Report) -> None:
        raise KeyError("disk")

    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"report callable .*fails raised KeyError"):
        report_of(report=fails)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_path_fails_before_anything_is_compiled(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("kept")
    path.chmod(0o444)
    with pytest.raises(Exception, match="read-only"):
        report_of(report=str(path))
    assert path.read_text() == "kept"
    assert contig_pass.last_reports() == []


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.json"
    path.write_text("kept")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("contig_pass.report.write.os.replace", full)
    with pytest.raises(Exception, match="No space left"):
        report_of(report=str(path))
    assert path.read_text() == "kept"
    assert list(tmp_path.iterdir()) == [path]


def test_explain_gives_the_report_of_a_real_compile() -> None:
    model, x = Stack(3), torch.zeros(32, 16)
    explained = contig_pass.explain(model, x)
    assert contig_pass.last_reports() == []
    torch._dynamo.reset()
    torch.compile(model, backend="contig_safe")(x)
    (real,) = contig_pass.last_reports()
    assert explained.totals == real.totals
    assert [(r.kind, r.operand, r.before, r.after, r.lineno) for r in explained.rows] == [
        (r.kind, r.operand, r.before, r.after, r.lineno) for r in real.rows
    ]


def test_explain_refuses_what_it_cannot_explain() -> None:
    with pytest.raises(ContigPassError, match=r"nothing of .* was traced"):
        contig_pass.explain(lambda: 3)
    with pytest.raises(ContigPassError, match="policy='denser'"):
        contig_pass.explain(lambda x: x + 1, torch.ones(2), policy="denser")


_TRACED = """
import torch, contig_pass
from tests import kernels
with kernels.contracts():
    f = lambda b: kernels.rows(b[1:513].view(32, 16))
    torch.compile(f, backend="contig_safe", options={"inner": "aot_eager"})(torch.arange(600.0))
"""


def test_the_structured_trace_holds_the_report(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "TORCH_TRACE": str(tmp_path), "PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", _TRACED], env=environment, check=True, cwd=root)
    trace = "".join(path.read_text() for path in tmp_path.iterdir())
    assert '"name": "contig_pass_report"' in trace
    assert '"name": "contig_pass_diff"' in trace
    assert "contig_pass.contiguous" in trace
