"""The speed benchmarks: every command from end to end at tiny sizes, and that they see misses."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from benchmarks.speed import (
    clock,
    commands,
    compiling,
    plots,
    profile,
    worker,
)
from benchmarks.speed.bars import BARS, COMPOSITION, OURS_8, TORCHAO_ROW, judge
from benchmarks.speed.command import chosen, conclude
from benchmarks.speed.measure import Settings, run_groups, within
from benchmarks.speed.rows import (
    FAILED,
    NOT_RUN,
    OK,
    UNAVAILABLE,
    Group,
    Prepared,
    Row,
    Shared,
    Task,
    Unavailable,
)

NAMES = [command.name for command in commands.COMMANDS]


def parsed(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    commands.add_parser(parser.add_subparsers())
    return parser.parse_args(given)


@pytest.fixture(autouse=True)
def _settings_restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    config = torch._dynamo.config
    kept = {
        name: getattr(config, name) for name in ("recompile_limit", "accumulated_recompile_limit")
    }
    with config.patch(**kept):
        yield
    torch.set_num_threads(threads)


def settings(**given: object) -> Settings:
    return Settings(device="cpu", smoke=True, rounds=2, **given)


def run_worker(
    given: Sequence[str], *others: object, original: Callable[..., Any] = compiling.run_worker
) -> dict[str, Any]:
    """A block gets a process of its own, as all do outside of tests; models need no second one to
    import torch in."""
    if given[0] == "block":
        return original(given, *others)
    torch._dynamo.reset()
    counters.clear()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert worker.main(given) == 0
    return json.loads(printed.getvalue().splitlines()[-1])


# -- the commands --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_command_runs_from_end_to_end(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "run_worker", run_worker)
    file = tmp_path / "result.json"
    args = parsed(name, "--smoke", "--json", str(file))
    assert args.run(args) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1].startswith(f"{name}: ")
    assert out.splitlines()[-1].endswith(": ok")
    written = json.loads(file.read_text())
    assert written["benchmark"] == name
    assert written["smoke"] is True
    rows = [Row.from_dict(row) for row in written["rows"]]
    for row in rows:
        assert row.status == OK or (row.status == UNAVAILABLE and row.reason), row
        assert not row.required or row.status == OK
        assert row.label in out
    # What was written can be shown and drawn again, without measuring.
    args = parsed(name, "--redraw", str(file))
    assert args.run(args) == 0
    assert rows[0].label in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", NAMES)
def test_without_a_gpu_one_line_says_so(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    args = parsed(name)
    assert args.run(args) == 2
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert "needs an NVIDIA GPU" in out


def test_the_weights_of_the_full_model_need_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    args = parsed("memory", "--meta")
    assert args.run(args) == 0
    assert "2 bars reached, 0 missed" in capsys.readouterr().out


def test_a_text_that_names_no_row_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    args = parsed("gemm", "--smoke", "--rows", "nothing is called this")
    assert args.run(args) == 1
    assert "no row's name contains" in capsys.readouterr().out


def test_a_spent_budget_fails_the_required_rows(capsys: pytest.CaptureFixture[str]) -> None:
    args = parsed("quant", "--smoke", "--budget", "0")
    assert args.run(args) == 1
    out = capsys.readouterr().out
    assert "NOT RUN (required)" in out
    assert out.rstrip().endswith("FAILED")


@pytest.mark.skipif(bool(plots.missing()), reason="matplotlib is not installed")
def test_plots_are_png_files(tmp_path: Path) -> None:
    parts = {f"{part} ms": 1.0 for part in profile.PARTS}
    rows = [
        Row("480p", "peer", flops=1e12, moved=1e9, ms=3.0, status=OK),
        Row("480p", "ours", flops=1e12, moved=1e9, ms=2.0, status=OK, figures=parts),
    ]
    written = plots.draw("block", rows, str(tmp_path / "new"))
    assert [path.name for path in written] == [
        "block-480p-times.png", "block-480p-parts.png", "block-480p-roofline.png"
    ]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in written)


# -- bars ----------------------------------------------------------------------------------------


def test_every_bar_is_of_a_row_that_its_command_makes() -> None:
    planned = {}
    for command in commands.COMMANDS:
        given = Settings(device="cuda", resolutions=("480p", "720p"))
        groups = command.plan(given, parsed(command.name))
        planned[command.name] = {
            (t.row.group, t.row.name, t.row.counts): t.row for g in groups for t in g.tasks
        }
    for bar in BARS:
        rows = planned[bar.command]
        assert (bar.group, bar.row, bar.counts) in rows, bar
        assert rows[bar.group, bar.row, bar.counts].required, bar
        assert bar.ratio_to is None or (bar.group, bar.ratio_to, "") in rows, bar


def block_rows(ours: float, composition: float | None, **fields: object) -> list[Row]:
    rows = [
        Row("480p", OURS_8, ms=ours, figures={"activation GiB": 1.3}, status=OK, reason=""),
        Row("480p", COMPOSITION, ms=composition, status=OK, reason=""),
    ]
    for name, value in fields.items():
        setattr(rows[0], name, value)
    return rows


def verdicts(rows: list[Row]) -> dict[str, str]:
    return {v.bar.text: v.verdict for v in judge("block", rows)}


def test_bars_are_reached_and_missed_by_time_and_by_ratio() -> None:
    time_bar, ratio = "480p: ours, FP8 + FP8 attention: ms <= 44", "<= 0.84"
    fast = verdicts(block_rows(43.0, 52.0))
    assert fast[time_bar] == "ok"
    assert next(v for text, v in fast.items() if ratio in text) == "ok"
    slow = verdicts(block_rows(44.5, 52.0))
    assert slow[time_bar] == "MISSED"
    assert next(v for text, v in slow.items() if ratio in text) == "MISSED"
    missing = verdicts(block_rows(43.0, None))
    assert next(v for text, v in missing.items() if ratio in text) == "not checked"
    assert next(v for text, v in fast.items() if TORCHAO_ROW in text) == "not checked"


@pytest.mark.parametrize("status", [FAILED, NOT_RUN, UNAVAILABLE])
def test_a_fast_row_that_is_not_ok_reaches_no_bar(status: str) -> None:
    rows = block_rows(10.0, 52.0, status=status, reason="accuracy cosine = 0.9")
    assert set(verdicts(rows).values()) == {"MISSED"}
    assert conclude("block", rows, judge("block", rows), 0.0) == 1


def test_bars_of_rows_that_were_not_asked_for_are_left_out() -> None:
    assert judge("block", block_rows(43.0, 52.0)[1:]) == []


# -- measuring -----------------------------------------------------------------------------------


def task(row: Row, call: object = None, **given: object) -> Task:
    return Task(row, lambda: Prepared(call or (lambda: None), **given))


def test_groups_say_what_went_wrong_row_by_row() -> None:
    def broken() -> None:
        raise ValueError("broken kernel")

    calls: list[int] = []

    def breaks_later() -> None:
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("later")

    def absent() -> Prepared:
        raise Unavailable("no such package")

    limits = {"cosine": (">=", 0.999)}
    tasks = [
        task(Row("g", "fine", limits=limits), accuracy=lambda: {"cosine": 1.0}),
        task(Row("g", "inaccurate", limits=limits), accuracy=lambda: {"cosine": 0.9}),
        task(Row("g", "nan", limits=limits), accuracy=lambda: {"cosine": math.nan}),
        task(Row("g", "unmeasured", limits=limits)),
        task(Row("g", "broken"), broken),
        task(Row("g", "breaks later"), breaks_later),
        Task(Row("g", "absent"), absent),
    ]
    seen: list[int] = []
    rows = run_groups([Group("g", tasks)], settings(), lambda r, _: seen.append(len(r)))
    found = {row.name: (row.status, row.reason) for row in rows}
    assert seen == [7]
    assert found["fine"] == (OK, "")
    assert found["inaccurate"] == (FAILED, "accuracy cosine = 0.90000, required >= 0.999")
    assert found["nan"][0] == FAILED
    assert found["unmeasured"][0] == FAILED
    assert "broken kernel" in found["broken"][1]
    assert found["breaks later"][0] == FAILED
    assert "later" in found["breaks later"][1]
    assert found["absent"] == (UNAVAILABLE, "no such package")
    assert rows[0].rounds == 2
    assert rows[1].ms is not None, "an inaccurate row is timed, it only does not count"


def test_rows_are_timed_in_turn_and_an_error_ends_only_its_own() -> None:
    order: list[str] = []

    def second() -> None:
        order.append("b")
        if order.count("b") == 2:
            raise RuntimeError("stop")

    first, broken = clock.interleaved(
        [lambda: order.append("a"), second], 3, "cpu", time.perf_counter() + 60
    )
    assert "".join(order) == "ababaa"
    assert len(first.milliseconds) == 3
    assert str(broken.error) == "stop"


def test_a_deadline_leaves_the_least_rounds() -> None:
    samples = clock.interleaved([lambda: None], 50, "cpu", deadline=0.0)
    assert len(samples[0].milliseconds) == clock.LEAST_ROUNDS


def test_a_row_is_timed_after_calls_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    log = []

    class Event:
        def __init__(self, **_: object) -> None: ...

        def record(self) -> None:
            log.append("|")

        def elapsed_time(self, _: object) -> float:
            return 1.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    calls = [lambda: log.append("a"), lambda: log.append("b")]
    samples = [clock.Samples(), clock.Samples()]
    assert clock._timed_on_gpu(calls, samples, torch.empty(1), 2) == [1.5, 1.5]
    assert "".join(log) == "aa|a|bb|b|"



def test_preparing_ends_in_time() -> None:
    with pytest.raises(TimeoutError, match="not ready"), within(0.05):
        time.sleep(5)
    time.sleep(0.1)  # no alarm is left behind


def test_shared_things_are_made_once_and_fail_once() -> None:
    made: list[int] = []

    def make() -> int:
        made.append(1)
        if len(made) == 2:
            raise ValueError("the second time")
        return 7

    shared = Shared(make)
    assert (shared(), shared(), len(made)) == (7, 7, 1)
    shared.drop()
    for _ in range(2):
        with pytest.raises(ValueError, match="the second time"):
            shared()
    assert len(made) == 2


def test_clock_samples_of_nvidia_smi() -> None:
    lines = "1980, 610.5, 61\n1755, 690.0, 63\n[N/A], 1, 2\n1700, 700.0, 64\n17"
    assert clock._summary(lines) == {
        "before": 1980, "median": 1755, "lowest": 1700, "after": 1700, "power W": 690.0,
        "temperature C": 64,
    }
    assert clock._summary("") == {}


def test_chosen_rows_keep_their_order_and_empty_groups_go() -> None:
    groups = [
        Group("480p", [task(Row("480p", "ours, FP8")), task(Row("480p", "peer"))]),
        Group("720p", [task(Row("720p", "peer"))]),
    ]
    kept = chosen(groups, settings(wanted=["OURS"]))
    assert [(g.title, [t.row.name for t in g.tasks]) for g in kept] == [("480p", ["ours, FP8"])]


def test_a_failed_process_gives_its_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_WORKER", "json.tool")
    with pytest.raises(RuntimeError, match=r"exit code 2: .*no such thing"):
        compiling.run_worker(["no such thing"], None, 60)


def test_a_slow_process_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compiling, "_ROOT", tmp_path)
    monkeypatch.setattr(compiling, "_WORKER", "sleeps")
    (tmp_path / "sleeps.py").write_text("import time; time.sleep(60)")
    with pytest.raises(TimeoutError, match="ended after 1 s: block"):
        compiling.run_worker(["block"], None, 1)
