"""The coverage table and the accuracy table: what they cover, and that they see what is wrong."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import wan_models.attention
from benchmarks import accuracy
from benchmarks.coverage import command, plan
from benchmarks.coverage.blocks import BlockConditions, blocks, told_who_speaks, update
from benchmarks.coverage.cases import (
    BLOCK,
    CLASS,
    FP8,
    ONCE,
    PLAIN,
    QUANTISATIONS,
    Case,
    Entry,
    catalogue,
    unique_models,
)
from benchmarks.coverage.hand_fix import hand_fix
from benchmarks.coverage.measure import AOT_EAGER, INDUCTOR, Row, is_bad, measure, one_line
from benchmarks.coverage.sizes import FULL, TINY, Draw
from benchmarks.coverage.table import table
from benchmarks.coverage.variants import classes
from wan_models import zoo
from wan_models.quant import RECIPES
from wan_models.recorder import Received

ENTRIES = {(entry.owner, entry.name): entry for entry in catalogue()}


def arguments(parse: types.ModuleType, *given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parse.add_parser(parser.add_subparsers())
    return parser.parse_args([parse.__name__.split(".")[1], *given])


# -- what is covered -----------------------------------------------------------------------------


def test_every_attention_class_recipe_and_model_is_covered() -> None:
    assert len(ENTRIES) == len(catalogue())
    exported = {
        name for name in wan_models.attention.__all__
        if isinstance(getattr(wan_models.attention, name), type)
        and issubclass(getattr(wan_models.attention, name), nn.Module)
    }
    assert exported == {e.owner for e in ENTRIES.values() if e.kind == CLASS}
    assert {name for names in unique_models() for name in names} == set(zoo.NAMES)
    assert set(QUANTISATIONS) == {PLAIN, *RECIPES}
    for entry in ENTRIES.values():
        if entry.kind in (CLASS, BLOCK):
            rows = {(row.quantisation, row.batch) for row in plan.full_rows(entry)}
            assert rows == set(itertools.product(QUANTISATIONS, (1, 2)))
            assert {row.inner for row in plan.full_rows(entry)} == {INDUCTOR}


def test_a_quick_run_leaves_out_no_variant_no_recipe_and_not_inductor() -> None:
    rows = [row for entry in ENTRIES.values() for row in plan.quick_rows(entry)]
    once = {key for key, entry in ENTRIES.items() if entry.kind == ONCE}
    assert {(row.owner, row.variant) for row in rows} | once == set(ENTRIES)
    assert {row.quantisation for row in rows} == set(QUANTISATIONS)
    assert {row.batch for row in rows} == {1, 2}
    assert {row.inner for row in rows} == {AOT_EAGER, INDUCTOR}
    names = [row.name for row in rows]
    assert len(names) == len(set(names))


def test_the_table_is_narrow() -> None:
    entries = ENTRIES.values()
    rows = [row for entry in entries for row in plan.full_rows(entry)]
    for row in rows:
        row.uses, row.fix_bytes, row.difference = 300, 131072, 0.0123
    assert max(map(len, table(rows).splitlines())) <= 120


def test_inputs_are_those_of_the_size() -> None:
    for size in (TINY, FULL):
        assert size.head_dim == 128
        assert size.grid[0] % 2  # so that a split into two groups is uneven
        assert size.tokens == size.grid[0] * size.frame
    one, same, other = (Draw(TINY, 2, seed).video() for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert one.shape == (2, TINY.tokens, TINY.dim)
    assert Draw(TINY, 1, 0).people().sum(0).tolist() == [1.0] * TINY.frame
    # Full-size inputs and modules are made where a GPU is; their shapes can be had anywhere.
    with torch.device("meta"):
        for variant in classes():
            assert all(p.is_meta for p in variant.make(FULL).parameters())


# -- a run ---------------------------------------------------------------------------------------


def test_a_run_writes_every_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "coverage.json"
    args = arguments(
        command, "--quick", "--only", "WanHuMoCrossAttention", "--jobs", "1", "--json", str(path)
    )
    assert args.run(args) == 0
    out, err = capsys.readouterr()
    last = out.splitlines()[-1]
    assert last.startswith("coverage: 5 of 5 rows ok, ")
    assert "15 of 15 calls of the hand fix do nothing" in last
    assert err.count(": ok\n") == 5
    content = json.loads(path.read_text())
    assert content["benchmark"] == "coverage"
    assert str(tmp_path) not in path.read_text()
    assert [(r["quantisation"], r["batch"]) for r in content["rows"]] == [
        ("bf16", 1), ("bf16", 2), (FP8, 1), (FP8, 2), ("fp4_scaled_fast", 2),
    ]
    for row in content["rows"]:
        assert row["ok"] is True
        assert row["graphs"] == row["graphs_allowed"] == 1
        assert row["calls"] == 2
        assert row["difference"] == 0
        assert row["hand_calls"] == row["hand_no_ops"] == 3
        assert row["hand_sites"][-1] == "WanHuMoCrossAttention.forward"
        assert row["bad_operands"] == row["fixes"] == row["fix_bytes"] == 0
        # a, b and bias of four linears, in each of two calls; FP4 adds its bias afterwards
        operands = {"bf16": 0, FP8: 24, "fp4_scaled_fast": 16}
        assert row["operands"] == operands[row["quantisation"]]
        # q, k and v of the kernel; besides a, b, bias and two scales of each product, or x, the
        # packed weight, its scales and the bias
        uses = {"bf16": 3, FP8: 23, "fp4_scaled_fast": 19}
        assert row["uses"] == uses[row["quantisation"]]


def test_nothing_chosen_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    for benchmark in (command, accuracy):
        args = arguments(benchmark, "--only", "no such row")
        assert args.run(args) == 1
        assert "no row's name contains 'no such row'" in capsys.readouterr().out


def test_a_control_needs_its_fix() -> None:
    entry = ENTRIES["planted faults", "weight at an odd byte"]
    (row,) = plan.quick_rows(entry)
    row = measure(entry, row)
    assert row.ok
    assert (row.fixes, row.fix_bytes) == (1, 2 * TINY.dim**2)
    assert row.fixed == ["aten::_scaled_mm.default mat2 (1, 256): not pointer aligned to 16 bytes"]
    assert (row.bad_operands, row.bad_in_eager) == (0, 2)  # one in each call
    assert replace(row, fixes=0).failure() == "0 fixes, at least 1 wanted: a fault was missed"


def test_equal_blocks_share_a_graph() -> None:
    entry = ENTRIES["compiled once", "40 equal blocks"]
    row = measure(entry, Row(ONCE, entry.owner, entry.name, PLAIN, 1, AOT_EAGER))
    assert row.failure() is None
    assert (row.graphs, row.graphs_allowed, row.hand_calls) == (1, 1, 80)
    assert row.tolerance == 0.0


# -- planted failures ----------------------------------------------------------------------------


class Planted(nn.Module):
    """A linear, and something that goes wrong."""

    def __init__(self, fault: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32).bfloat16()
        self.fault = fault

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fault(self.linear(x))


def breaks(x: torch.Tensor) -> torch.Tensor:
    torch._dynamo.graph_break()
    return x


def differs(x: torch.Tensor) -> torch.Tensor:
    return x + 0.01 if torch.compiler.is_compiling() else x


def returns_nan(x: torch.Tensor) -> torch.Tensor:
    return x * torch.nan


def compiled_nan(x: torch.Tensor) -> torch.Tensor:
    return x * torch.nan if torch.compiler.is_compiling() else x


def returns_another_type(x: torch.Tensor) -> torch.Tensor:
    return x.float() if torch.compiler.is_compiling() else x


def ignores(x: torch.Tensor) -> torch.Tensor:
    return x * 0


def dies(x: torch.Tensor) -> torch.Tensor:
    os._exit(3)


def planted(
    fault: Callable[[torch.Tensor], torch.Tensor], tokens: tuple[int, int] = (4, 4)
) -> Entry:
    def build(quantisation: str, batch: int) -> Case:
        torch.manual_seed(0)
        module = Planted(fault).requires_grad_(False)
        calls = [(torch.randn(batch, n, 32).bfloat16(),) for n in tokens]
        return Case(module, calls, lambda **options: torch.compile(module, **options))

    return Entry(CLASS, "Planted", fault.__name__, build)


def filled(entry: Entry, inner: str = AOT_EAGER) -> Row:
    return measure(entry, Row(entry.kind, entry.owner, entry.name, PLAIN, 2, inner))


def test_the_planted_module_is_otherwise_right() -> None:
    row = filled(planted(lambda x: x + 1))
    assert row.failure() is None


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (planted(breaks), "Unsupported: "),
        (planted(differs), "from eager mode, 0.0 allowed"),
        (planted(compiled_nan), "differs by inf from eager mode"),
        (planted(returns_another_type), "differs by inf from eager mode"),
        (planted(returns_nan), "ValueError: eager mode returns values that are not finite"),
        (planted(ignores), "ValueError: two calls with different arguments return the same"),
        (planted(torch.sin, (4, 7)), "2 graphs for 2 calls, 1 wanted"),
        (replace(planted(torch.cos), fixes=1), "0 fixes, at least 1 wanted"),
    ],
    ids=lambda value: value.name if isinstance(value, Entry) else "",
)
def test_a_planted_failure_fails_its_row(entry: Entry, message: str) -> None:
    row = filled(entry)
    assert not row.ok
    assert message in row.failure()
    assert "\n" not in row.failure()


def test_inductor_must_be_near_as_well() -> None:
    row = replace(filled(planted(torch.sin)), inner=INDUCTOR, tolerance=0.03, difference=0.02)
    assert row.ok
    assert not replace(row, difference=0.04).ok
    assert not replace(row, difference=float("nan")).ok
    assert not replace(row, bad_operands=1).ok


def test_a_failing_row_and_a_dying_process_fail_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = [planted(breaks), planted(dies), planted(torch.sin)]
    monkeypatch.setattr(command, "catalogue", lambda: entries)
    path = tmp_path / "coverage.json"
    args = arguments(command, "--quick", "--only", "bf16", "--json", str(path))
    assert args.run(args) == 1
    out = capsys.readouterr().out
    assert out.splitlines()[-1].startswith("coverage: 2 of 6 rows ok, ")
    assert out.count("FAILED Planted: breaks, bf16, B=") == 2
    rows = json.loads(path.read_text())["rows"]
    assert [row["ok"] for row in rows] == [False] * 4 + [True] * 2
    assert rows[2]["failure"] == rows[3]["failure"] == "the process ended with exit code 3"


@pytest.mark.parametrize(
    ("operand", "strides", "address", "bad"),
    [
        ("a", (32, 1), 0, False), ("a", (32, 1), 8, True), ("a", (1, 32), 0, True),
        ("a", (36, 1), 0, True), ("a", (48, 1), 0, False), ("b", (1, 32), 0, False),
        ("b", (32, 1), 0, True), ("b", (1, 35), 0, True), ("bias", (1,), 0, False),
        ("bias", (2,), 0, True), ("bias", (1,), 2, True),
    ],
)
def test_which_operands_a_hopper_kernel_takes(
    operand: str, strides: tuple[int, ...], address: int, bad: bool
) -> None:
    shape = (32,) * len(strides)
    assert is_bad(Received("", operand, shape, strides, address, 1)) is bad


def test_errors_take_one_line() -> None:
    assert one_line(ValueError("\n  first\nsecond")) == "ValueError: first"
    assert one_line(KeyError()) == "KeyError: "


# -- the hand fix --------------------------------------------------------------------------------

#: How many calls its list names, by class and variant.
LISTED = {
    "WanSelfAttention": {
        "forward": 1, "forward_ip, first step": 1, "forward_radial": 1, "forward_multitalk": 1,
        "forward_split": 1, "guidance (NAG)": 2,
    },
    "WanCrossAttention": {
        "text": 1, "audio 4-D": 2, "audio 3-D": 2, "adapter 4-D": 2, "adapter 3-D": 2,
        "fusion target": 2,
    },
    "WanI2VCrossAttention": {
        "text": 1, "image separate": 2, "image, audio 4-D": 3, "image, audio 3-D": 3,
        "image, adapter 4-D": 3, "image, adapter 3-D": 3,
    },
    "MTVCrafterMotionAttention": {"forward": 1},
    "WanHuMoCrossAttention": {"forward": 3},
}


@pytest.mark.parametrize("batch", [1, 2])
def test_the_hand_fix_is_put_where_its_list_says(batch: int) -> None:
    variants = {(v.owner, v.name): v for v in classes()}
    for owner, counts in LISTED.items():
        for name, count in counts.items():
            variant = variants[owner, name]
            module, inputs = variant.module(TINY), variant.inputs(Draw(TINY, batch, 0))
            with torch.no_grad():
                expected = variant.call(module)(*inputs)
                with hand_fix() as calls:
                    out = variant.call(module)(*inputs)
                variant.call(module)(*inputs)  # no more calls are made
            assert len(calls) == count, (owner, name)
            for got, want in zip(
                torch.utils._pytree.tree_leaves(out), torch.utils._pytree.tree_leaves(expected),
                strict=True,
            ):
                assert torch.equal(got, want)


def test_a_call_that_copies_is_no_no_op() -> None:
    x = torch.randn(2, 9, 4, 8)
    with hand_fix() as calls:
        out = x[:, :6].flatten(2)
        x.flatten(2)
        x.flatten(1)  # merges no heads
        x.transpose(1, 2).flatten(2)  # which copies by itself
    assert [call.no_op for call in calls] == [False, True, True]
    assert calls[0].strides == (288, 32, 1)
    assert calls[0].site == "test_a_call_that_copies_is_no_no_op"
    assert out.is_contiguous()
    assert not x[:, :6].flatten(2).is_contiguous()


# -- accuracy ------------------------------------------------------------------------------------


def accuracy_args(*given: str) -> argparse.Namespace:
    return arguments(accuracy, "--device", "cpu", *given)


def test_accuracy_names_variants_that_exist() -> None:
    rows = [row for _, group in accuracy.planned(["tiny", "full"], [PLAIN], None, None)
            for row in group if row.what == accuracy.LINEARS]
    owners = {row.owner for row in rows if row.size == "tiny"}
    assert {variant.owner for variant in classes()} <= owners
    full = [row.variant for row in rows if row.size == "full"]
    assert len(full) == len(accuracy.BLOCKS)
    assert {row.inner for row in rows if row.size == "full"} == {INDUCTOR}


def test_accuracy_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "accuracy.json"
    args = accuracy_args("--only", "WanSelfAttention: forward, ", "--json", str(path))
    assert args.run(args) == 0
    out, err = capsys.readouterr()
    last = out.splitlines()[-1]
    rows = {row["setting"]: row for row in json.loads(path.read_text())["rows"]}
    missing = [row for row in rows.values() if row["unavailable"]]
    assert f"{len(rows) - len(missing)} of {len(rows) - len(missing)} rows ok" in last
    assert f"{len(missing)} modes not on this machine" in last
    assert err.count("\n") >= len(rows)
    assert "not here: sageattn: attention mode 'sageattn': package" in out
    assert rows["bf16"]["error"] < rows[FP8]["error"] < rows["fp4_scaled_fast"]["error"]
    assert rows["sdpa"]["error"] == rows["bf16"]["error"] < rows["fp8"]["error"]
    assert rows[FP8]["uses"] == 23
    assert str(tmp_path) not in path.read_text()


def test_accuracy_goes_on_after_an_error_and_sees_a_wrong_value(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = accuracy.quantize_

    def broken(module: nn.Module, recipe: str, *rest: Any) -> None:
        if recipe == FP8:
            raise RuntimeError("no such kernel\nand a second line")
        plain(module, recipe, *rest)
        module.proj.weight.zero_()

    monkeypatch.setattr(accuracy, "quantize_", broken)
    args = accuracy_args("--only", "SingleStreamAttention", "--recipes", FP8, "bf16", "fp4_scaled")
    assert args.run(args) == 1
    out = capsys.readouterr().out
    name = "tiny SingleStreamAttention: last frame cut, linears"
    assert f"FAILED {name} {FP8}: RuntimeError: no such kernel\n" in out
    assert f"FAILED {name} fp4_scaled: " in out
    assert out.splitlines()[-1].startswith("accuracy on cpu: 1 of 3 rows ok, 0 modes")


def test_a_spent_budget_fails_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    args = accuracy_args("--only", "WanHuMo", "--budget", "-1")
    assert args.run(args) == 1
    assert "not run: the budget is spent" in capsys.readouterr().out


def test_of_a_block_its_update_is_compared() -> None:
    made = {variant.name: variant for variant in blocks()}
    x, out = torch.ones(1, 2, 3).bfloat16(), torch.full((1, 2, 3), 1.5).bfloat16()
    assert torch.equal(update(made["text"], (x,), out), torch.full((1, 2, 3), 0.5))
    assert update(made["first"], (x,), (out, out)) == (out, out)
    conditions = told_who_speaks().inputs(Draw(TINY, 1, 0))[-1]
    assert isinstance(conditions, BlockConditions)
    assert conditions.multitalk_masks is None
    assert conditions.multitalk_maps.shape == (1, 3, TINY.tokens)
