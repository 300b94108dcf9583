"""The console script."""

from __future__ import annotations

import sys

import pytest

from contig_pass import cli


def test_demo_repairs_every_planted_fault(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo"]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    (bad,) = [line for line in lines if line.startswith("bad operands at the kernel")]
    assert bad == "bad operands at the kernel: 4 under plain Inductor, 0 under contig_safe"
    (difference,) = [line for line in lines if line.startswith("largest difference")]
    assert difference.startswith("largest difference of the outputs: 0.0 to plain Inductor")
    assert "graph diff" in printed
    assert "self_attn.q" in printed
    assert max(map(len, lines)) <= 100


def test_the_demo_says_what_it_needs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wan_models.demo", None)
    assert cli.main(["demo"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("contig-pass demo: the demo needs the package wan_models")
    assert error.count("\n") == 1


def test_unknown_commands_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["dmo"])
    assert exit_.value.code == 2
    assert "demo" in capsys.readouterr().err
