"""``contig-pass diff``: targets, traces without a GPU, files, comparison, exit codes."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from contig_pass.differ import command
from contig_pass.differ.compare import Key, compare, render, violations
from contig_pass.errors import ContigPassError
from contig_pass.report.json import from_file
from contig_pass.report.model import SCHEMA_VERSION, Report

ROOT = Path(__file__).parents[2]

MODULE = '''
import torch


class Projections(torch.nn.Module):
    """Two FP8 projections whose biases share one buffer, the second from element START on."""

    def __init__(self, start, number):
        super().__init__()
        self.start = start
        weights = [torch.randn(384, 512).to(torch.float8_e4m3fn) for _ in range(number)]
        self.weights = torch.nn.ParameterList(torch.nn.Parameter(w, False) for w in weights)
        self.biases = torch.nn.Parameter(torch.randn(784).bfloat16(), False)
        self.register_buffer("one", torch.ones(()))

    def forward(self, x):
        bias = self.biases[self.start : self.start + 384]
        return [
            torch._scaled_mm(x, w.t(), self.one, self.one, bias, out_dtype=torch.bfloat16)
            for w in self.weights
        ]


def _program(start, number=1):
    x = torch.randn(256, 512).to(torch.float8_e4m3fn)
    return Projections(start, number), (x,), {}


def clean():
    return _program(384)


def faulty():
    return _program(385)


def faultier():
    return _program(385, 2)


def elsewhere():
    return _program(387)


def reads_values():
    if torch.ones(2).sum().item() != 2:
        raise ValueError("no values")
    return _program(385)


def on_meta():
    with torch.device("meta"):
        return _program(385)


class Makers:
    nested = staticmethod(faulty)


def breaks():
    def model(x, w, one):
        w = w.t()
        first = torch._scaled_mm(x, w, one, one, out_dtype=torch.float8_e4m3fn)
        torch._dynamo.graph_break()
        return torch._scaled_mm(first.t(), w, one, one, out_dtype=torch.bfloat16)

    x = torch.empty(512, 512, dtype=torch.float8_e4m3fn)
    return model, [x, x.clone(), torch.ones(())], {}


def by_name():
    model, (x,), _ = _program(385)
    return model, (), {"x": x}


def a_pair():
    return 1, 2


def no_model():
    return 1, (), {}


def no_args():
    return torch.sin, 1, {}


def no_kwargs():
    return torch.sin, (), [1]


def raises():
    raise KeyError("no checkpoint\\nhere")


def no_tensors():
    return (lambda: 1), (), {}


def fails():
    return torch.matmul, (torch.ones(2, 3), torch.ones(2, 3)), {}


def needs_values():
    def model(x):
        return x * 2 if x.sum() > 2 else x

    return model, (torch.ones(3),), {}


def vace():
    from dataclasses import replace

    from wan_models import CONFIGS, WanModel, inputs, quant

    config = replace(CONFIGS["vace-14b"].tiny(), num_layers=1, vace_layers=(0,))
    with torch.device("meta"):
        model = WanModel(config).bfloat16()
        quant.quantize_(model, "fp8_e4m3fn_scaled_fast", quant.high_precision(model))
    given = inputs.model_inputs(config, (3, 6, 8), dtype=torch.bfloat16, device="meta")
    return model, given, {}


number = 3
'''


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """The command in a folder with the module ``programs``: exit code, output, errors."""
    (tmp_path / "programs.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("programs", None)
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers(required=True))

    def run(*argv: str) -> tuple[int, str, str]:
        args = parser.parse_args(["diff", *argv])
        try:
            code, error = args.run(args), ""
        except ContigPassError as raised:  # as the CLI has it
            code, error = 2, str(raised)
        return code, capsys.readouterr().out, error

    yield run
    sys.modules.pop("programs", None)


def read(path: str) -> Report:
    (report,) = from_file(json.loads(Path(path).read_text()))
    return report


# -- module:callable -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["faulty", "reads_values", "on_meta", "Makers.nested", "by_name"]
)
def test_a_callable_of_the_users(run: Callable[..., tuple[int, str, str]], name: str) -> None:
    code, printed, error = run(f"programs:{name}", "--json", "r.json")
    assert (code, error) == (0, "")
    assert f"graph programs:{name}, policy dense, judged by sm90" in printed
    assert "1 fixed by 1 copy" in printed
    assert "peak memory" in printed.splitlines()[-1]
    report = read("r.json")
    (row,) = report.rows
    assert (row.operand, row.before.offset, row.after.offset) == ("bias", 770, 0)
    assert Path(row.file).name == "programs.py"
    assert row.code.startswith("torch._scaled_mm(x, w.t()")


def test_a_program_is_followed_over_a_graph_break(
    run: Callable[..., tuple[int, str, str]],
) -> None:
    code, _, error = run("programs:breaks", "--json", "r.json")
    assert (code, error) == (0, "")
    report = read("r.json")
    assert report.totals.uses == 8
    # The second graph reads the first one's result column by column.
    assert [(row.operand, row.before.strides) for row in report.rows] == [("self", (1, 512))]


def test_policies_reach_the_plan(run: Callable[..., tuple[int, str, str]]) -> None:
    code, printed, _ = run("programs:faulty", "--policy", "audit", "--check")
    assert code == 1
    assert "policy audit, judged by sm90" in printed
    assert "0 fixed by 0 copies, 1 left alone" in printed


def test_html(run: Callable[..., tuple[int, str, str]]) -> None:
    assert run("programs:faulty", "--html", "r.html")[0] == 0
    page = Path("r.html").read_text()
    assert page.lstrip().lower().startswith("<!doctype html>")
    assert "programs:faulty" in page


def test_the_file_of_two_runs_is_identical(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    argv = ["programs:vace", "--json"]
    run("programs:faulty")  # what was traced before leaves no mark
    assert run(*argv, "here.json")[::2] == (0, "")
    program = (
        "import argparse, sys; from contig_pass.differ.command import add_parser\n"
        "parser = argparse.ArgumentParser(); add_parser(parser.add_subparsers())\n"
        "args = parser.parse_args(sys.argv[1:]); sys.exit(args.run(args))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"}
    subprocess.run(
        [sys.executable, "-c", program, "diff", *argv, "there.json"],
        check=True, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL,
    )
    here, there = (Path(f"{name}.json").read_bytes() for name in ("here", "there"))
    assert here == there
    report = read("here.json")
    # What comes from patchifying lies column by column, and one FP8 linear reads it as it is.
    (row,) = report.fixes
    assert (row.module, row.operand) == ("vace_blocks.0.before_proj", "self")
    assert report.seconds == 0


# -- comparison ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "now", "code", "said"),
    [
        ("faulty", "faulty", 0, "0 new, 0 gone, 0 changed"),
        ("clean", "faulty", 1, "1 new, 0 gone, 0 changed"),
        ("faulty", "clean", 0, "0 new, 1 gone, 0 changed"),
        ("faulty", "faultier", 1, "0 new, 0 gone, 1 changed"),
        ("faultier", "faulty", 0, "0 new, 0 gone, 1 changed"),
        ("faulty", "elsewhere", 0, "0 new, 0 gone, 1 changed"),
    ],
)
def test_compare(
    run: Callable[..., tuple[int, str, str]], before: str, now: str, code: int, said: str
) -> None:
    assert run(f"programs:{before}", "--json", "old.json")[0] == 0
    found, printed, error = run(f"programs:{now}", "--compare", "old.json")
    assert (found, error) == (code, "")
    assert f"since the earlier report: {said}" in printed
    if now == "faultier":
        assert "bias, pointer aligned to 16 bytes (uses 1 -> 2" in printed
    if now == "elsewhere":
        assert "@770 -> bfloat16[384] (1) @774" in printed


@pytest.mark.parametrize(("name", "code"), [("clean", 0), ("faulty", 1)])
def test_check(run: Callable[..., tuple[int, str, str]], name: str, code: int) -> None:
    assert run(f"programs:{name}", "--check")[0] == code


def test_violations_are_known_by_module_op_operand_and_rule(
    run: Callable[..., tuple[int, str, str]],
) -> None:
    run("programs:faulty", "--json", "r.json")
    report = read("r.json")
    (row,) = report.rows
    rows = [
        dataclasses.replace(row, module=f"blocks.{number}.ffn.0", lineno=number, node=f"n{number}")
        for number in range(3)
    ]
    (key, violation), = violations(dataclasses.replace(report, rows=tuple(rows))).items()
    assert key == Key(
        "blocks.*.ffn.0", "aten::_scaled_mm.default", "bias", "pointer aligned to 16 bytes"
    )
    assert (violation.count, violation.fixed) == (3, 3)
    accepted = dataclasses.replace(row, kind="skip", rules=())
    assert violations(dataclasses.replace(report, rows=(accepted,))) == {}
    skipped = dataclasses.replace(row, kind="skip")
    changes = compare(
        report, dataclasses.replace(report, rows=(skipped,), policy="audit", targets=("sm100",))
    )
    assert not changes.worse
    text = render(changes)
    assert "fixed 1 -> 0" in text
    assert "note: the earlier report was made with policy 'dense', this one with 'audit'" in text
    assert "note: the earlier report was made with target 'sm90', this one with 'sm100'" in text


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["t2v-14b"], "TARGET 't2v-14b': use wan:NAME, such as wan:t2v-14b, or module:callable"),
        (["wan:t2v-15b"], "wan:t2v-15b: model 't2v-15b': use one of 't2v-1.3b'"),
        (["wan:t2v-14b", "--quantization", "fp8"], "quantization 'fp8': use one of"),
        (["wan:t2v-14b", "--attention", "fast"], "attention mode 'fast'"),
        (["wan:t2v-14b", "--attention", "flash_attn_3", "--target", "sm100"],
         "attention mode 'flash_attn_3': a CUDA device of compute capability 8.0 to 9.0 needed, "
         "--target is sm100"),
        (["wan:t2v-14b", "--resolution", "720p"], "--resolution '720p': use WIDTHxHEIGHT"),
        (["wan:ti2v-5b", "--resolution", "1280x720"], "height=720: use a multiple of 32"),
        (["wan:t2v-14b", "--frames", "80"], "frames=80: use 1 more than a multiple of 4"),
        (["wan:t2v-14b", "--batch", "0"], "--batch 0: use at least 1"),
        (["wan:t2v-14b", "--target", "h100"], "target='h100': use 'auto', 'cpu', or a CUDA"),
        (["wan:t2v-14b", "--target", "auto"], "--target 'auto': use cpu, or a CUDA architecture"),
        (["programs:clean", "--frames", "5"], "takes no --frames: that is for wan:NAME"),
        (["nowhere:clean"], "nowhere cannot be imported: ModuleNotFoundError: No module named"),
        (["programs:nothing"], "programs has no nothing"),
        (["programs:number"], "is a value of type int: name a callable"),
        (["programs:a_pair"], "programs:a_pair returned a tuple of 2: return (model, args, kwargs"),
        (["programs:no_model"], "returned a value of type int as its model"),
        (["programs:no_args"], "returned a value of type int as args: return a tuple"),
        (["programs:no_kwargs"], "returned a list of 1 as kwargs: return a dict"),
        (["programs:raises"], "programs:raises raised KeyError: 'no checkpoint"),
        (["programs:no_tensors"], "programs:no_tensors runs no tensor operation"),
        (["programs:fails"], "a and b must have same reduction dim"),
        (["programs:needs_values"], "programs:needs_values cannot be traced: it reads a tensor's"),
        (["programs:clean", "--json", "r.txt"], "--json 'r.txt': use a path that ends in .json"),
        (["programs:clean", "--json", "no/r.json"], "the folder 'no' does not exist"),
        (["programs:clean", "--compare", "absent.json"], "absent.json: No such file"),
        (["programs:clean", "--compare", "programs.py"], "programs.py is no report of contig-pass"),
        (["programs:clean", "--compare", "foreign.json"], "foreign.json: not a report file"),
        (["programs:clean", "--compare", "empty.json"], "empty.json holds no report"),
        (["programs:clean", "--compare", "odd.json"], "odd.json is no report of contig-pass"),
        (["programs:clean", "--compare", "old.json"], "old.json: report file of version 1"),
    ],
)
def test_bad_input_is_told_in_one_line(
    run: Callable[..., tuple[int, str, str]], argv: list[str], said: str
) -> None:
    report = {"schema": "contig_pass.report", "version": SCHEMA_VERSION, "reports": []}
    for name, content in {
        "foreign": {"a": 1}, "empty": report, "odd": report | {"reports": 3},
        "old": report | {"version": 1},
    }.items():
        Path(f"{name}.json").write_text(json.dumps(content))
    code, printed, error = run(*argv)
    assert said in error
    assert (code, printed, error.count("\n")) == (2, "", 0)


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_fake_cuda_tensors_need_a_cuda_build(run: Callable[..., tuple[int, str, str]]) -> None:
    code, _, error = run("programs:clean", "--device", "cuda")
    assert code == 2
    assert "is built without CUDA" in error


def test_help_tells_the_exit_codes(
    run: Callable[..., tuple[int, str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run("--help")
    assert "exit codes:" in capsys.readouterr().out
