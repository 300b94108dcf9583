"""``python -m contig_pass.sanitizer``: the script runs as it would alone, and exit codes say what
was found."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from contig_pass.sanitizer.__main__ import main

FAULT = """\
import sys, threading
import torch

def product(bias):
    a, w, one = torch.ones(32, 64), torch.ones(48, 64), torch.ones(())
    a, w = a.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)
    return torch._scaled_mm(a, w.t(), one, one, bias, out_dtype=torch.bfloat16)

def fault():
    buffer = torch.ones(97).bfloat16()
    product(buffer[49:])

"""
CALL, VIEW = 7, 11


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write a script that ends in given lines; what running it changes is put back."""
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    monkeypatch.chdir(tmp_path)

    def written(end: str) -> str:
        (tmp_path / "script.py").write_text(FAULT + end + "\n")
        return "script.py"

    return written


def test_a_violation_ends_it_with_the_script_s_own_traceback(write, capsys) -> None:
    assert main([write("fault()\nprint('after')")]) == 1
    out, err = capsys.readouterr()
    assert "after" not in out
    lines = [line.split(", in ")[0] for line in err.splitlines() if line.startswith('  File "')]
    assert [line.rpartition(" ")[2] for line in lines] == ["13", str(VIEW), str(CALL)]
    assert all("script.py" in line for line in lines)
    assert f"aten::_scaled_mm bias at script.py:{CALL}" in err
    assert f"aten::slice at script.py:{VIEW}" in err


def test_an_error_of_the_script_keeps_its_traceback(write, capsys) -> None:
    assert main([write("import json; json.loads('{')")]) == 1
    err = capsys.readouterr().err
    assert "contig_pass" not in err
    assert "json/decoder.py" in err.replace("\\", "/")


@pytest.mark.parametrize(
    ("end", "mode", "code"),
    [("fault()", "warn", 0), ("fault()", "fix", 0), ("fault(); sys.exit(7)", "warn", 7),
     ("sys.exit(7)", "raise", 7), ("sys.exit('no')", "raise", 1), ("sys.exit()", "raise", 0),
     ("sys.exit(True)", "raise", 1), ("1 / 0", "warn", 1),
     ("try: fault()\nexcept RuntimeError: pass", "raise", 1)],
)
def test_exit_codes(write, end: str, mode: str, code: int) -> None:
    assert main(["--mode", mode, write(end)]) == code


def test_the_script_is_main_with_its_own_arguments(write, capsys) -> None:
    end = "import __main__\nprint(__name__, __file__, sys.argv, sys.path[0], __main__.product)"
    assert main([write(end), "--mode", "x", "-v"]) == 0
    name, file, rest = capsys.readouterr().out.split(" ", 2)
    assert name == "__main__"
    assert Path(file) == Path("script.py").resolve()
    assert rest.startswith("['script.py', '--mode', 'x', '-v'] " + str(Path.cwd()))


def test_threads_of_the_script_are_watched(write) -> None:
    end = "thread = threading.Thread(target=fault)\nthread.start()\nthread.join()"
    earlier = sys.modules["threading"].excepthook
    sys.modules["threading"].excepthook = lambda *args: None
    try:
        assert main([write(end)]) == 1
    finally:
        sys.modules["threading"].excepthook = earlier


def test_bad_command_lines(write, capsys) -> None:
    assert main(["missing.py"]) == 2
    assert main([write("def")]) == 2
    assert main(["--target", "gpu", write("")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3
    assert all(line.startswith("python -m contig_pass.sanitizer: ") for line in errors)
    with pytest.raises(SystemExit) as stopped:
        main(["--mode", "loud", "script.py"])
    assert stopped.value.code == 2


def test_as_a_command(write) -> None:
    write("if __name__ == '__main__': fault()")
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "contig_pass.sanitizer", "-m", "script"]
    env = {"PYTHONPATH": f"{root}", "PATH": "", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert ran.returncode == 1, ran.stderr
    assert ran.stderr.startswith("Traceback")
    assert "runpy" not in ran.stderr
    assert f"aten::slice at script.py:{VIEW} (product(buffer[49:])) made it so" in ran.stderr
    assert ran.stderr.splitlines()[-1] == "sanitizer, mode raise: 1 finding at 1 line"
