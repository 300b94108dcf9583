"""``contig-pass doctor``: what it says of this machine, and how it is called."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from contig_pass import cli
from contig_pass.doctor import machine, privacy
from contig_pass.doctor.kernels import PACKAGES, WORKS, attention_kernels, quantised_products
from contig_pass.inductor import hooks
from contig_pass.inductor.examining import cache_directory

_FAMILY = "_scaled_dot_product_flash_attention_for_cpu"


@pytest.fixture(scope="module")
def verified(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, dict]:
    """Output, errors and JSON of one run on the CPU; it must end well."""
    path = tmp_path_factory.mktemp("doctor") / "doctor.json"
    command = [sys.executable, "-m", "contig_pass.cli", "doctor", "--verify", "--device", "cpu"]
    environment = {**os.environ, "HF_TOKEN": "hf_secret", "TORCHINDUCTOR_REDIS_URL": "redis://u:p@h"}
    done = subprocess.run(
        [*command, "--only", _FAMILY, "--json", str(path)],
        capture_output=True, text=True, env=environment, timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr, json.loads(path.read_text())


def test_the_text_names_everything(verified: tuple[str, str, dict]) -> None:
    out, err, _ = verified
    for title in (
        "versions", "GPU", "attention kernels on cpu", "quantised products on cpu",
        "private hooks of torch", "self-test passed", "compile caches",
    ):
        assert title in out
    assert f"torch          {torch.__version__}" in out
    for package in PACKAGES:
        assert package.distribution in out
    assert "unit-stride last dimension  inner two dimensions swapped  wrong value" in out
    assert out.splitlines()[-1].startswith("22 layouts tried on cpu in ")
    assert out.splitlines()[-1].endswith("0 disagree")
    assert "[22/22] layouts tried" in err


def test_the_json_holds_every_row(verified: tuple[str, str, dict]) -> None:
    _, _, found = verified
    assert (found["report"], found["schema"], found["fine"]) == ("contig-pass doctor", 1, True)
    assert set(found) == {
        "report", "schema", "device", "versions", "gpu", "attention", "quantised", "hooks",
        "self_test", "switches", "folders", "verification", "fine",
    }
    verification = found["verification"]
    stricter = 5 if torch.__version__ >= "2.14" else 0  # whose kernel takes more layouts
    assert verification["counts"] == {"yes": 22 - stricter, "stricter": stricter, "NO": 0}
    assert len(verification["rows"]) == 22
    for row in verification["rows"]:
        assert set(row) == {
            "op", "variant", "operand", "demanded", "layout", "broken", "outcome", "message",
            "compiled", "compiled_message", "agrees", "source",
        }
        wrong = row["broken"] and row["agrees"] != "stricter"
        assert row["outcome"] == ("wrong value" if wrong else "right value")
    assert {row["operand"] for row in verification["rows"]} == {"(all)", "query", "key", "value"}


def test_the_json_tells_nothing_private(verified: tuple[str, str, dict]) -> None:
    text = json.dumps(verified[2])
    for private in ("hf_secret", "redis", str(Path.home()), os.getcwd(), sys.prefix):
        assert private not in text


def test_places_and_names_are_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setattr(privacy.getpass, "getuser", lambda: "ada")
    monkeypatch.setattr(privacy.platform, "node", lambda: "engine1")
    given = {
        "a": "/home/ada/x.py", "b": ["/home/adam/x.py", "/var/torchinductor_ada"], "c": 3,
        "d": "on engine1", "e": f"{sys.prefix}/lib/x.so", "f": "adaptive engine12",
    }
    assert privacy.scrubbed(given) == {
        "a": "~/x.py", "b": ["/home/adam/x.py", "/var/torchinductor_<user>"], "c": 3,
        "d": "on <host>", "e": "<python>/lib/x.so", "f": "adaptive engine12",
    }


def test_kernels_that_do_not_work_say_why() -> None:
    attention = {k.name: k.state for k in attention_kernels("cpu", 2, 120)}
    assert attention["SDPA flash"] == attention["SDPA math"] == WORKS
    assert attention["SDPA cuDNN"] == attention["SDPA efficient"] == "needs a CUDA device"
    for package in PACKAGES:
        assert attention[package.distribution] in ("not installed", "needs a CUDA device")
    products = {k.name: k.state for k in quantised_products("cpu", 2, 120)}
    assert products["FP8, tensor-wise scales"] == products["int8"] == WORKS
    assert "Error" in products["NVFP4"]


def test_a_missing_hook_fails_the_self_test(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    states, told = machine.hook_states(120)
    assert told == ""
    assert {s.path for s in states} == {hook.path for hook in hooks.HOOKS}
    lost = hooks.Hook("torch._inductor.config", "no_such_hook", "nothing is repaired")
    monkeypatch.setattr(hooks, "HOOKS", (*hooks.HOOKS, lost))
    hooks.self_test.cache_clear()
    assert cli.main(["doctor", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "torch._inductor.config.no_such_hook: missing: nothing is repaired" in out
    assert "self-test FAILED" in out
    hooks.self_test.cache_clear()


def test_the_cache_is_measured_and_not_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    switches, folders = machine.caches()
    assert switches["FX graph cache"] is torch._inductor.config.fx_graph_cache
    assert not any(folder.exists for folder in folders)
    assert cache_directory() == tmp_path / "cache"
    assert not (tmp_path / "cache").exists()
    (tmp_path / "cache" / "fxgraph").mkdir(parents=True)
    (tmp_path / "cache" / "fxgraph" / "entry").write_bytes(b"12345")
    found = {f.name: (f.exists, f.files, f.nbytes) for f in machine.caches()[1]}
    assert found["FX graphs"] == found["all of Inductor"] == (True, 1, 5)
    assert found["Triton"] == (False, 0, 0)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--jobs", "0"], "--jobs 0: use at least 1"),
        (["--timeout", "0"], "--timeout 0: use a number of seconds above 0"),
        (["--only", "x"], "use it with --verify"),
        (["--json", "x.txt"], "use a path that ends in .json"),
        (["--json", "no/such/x.json"], "the folder 'no/such' does not exist"),
        (["--device", "cuda"], "torch sees no CUDA device; use --device cpu"),
    ],
)
def test_bad_input_is_told_in_one_line(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "cuda" in arguments and torch.cuda.device_count():
        pytest.skip("there is a GPU")
    assert cli.main(["doctor", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("contig-pass doctor: ")
    assert told in captured.err
    assert captured.err.count("\n") == 1
