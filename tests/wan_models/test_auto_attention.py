"""Modes that stand for others: the fastest is measured once, and is what runs afterwards."""

from __future__ import annotations

import pytest
import torch

import wan_models.attention as public
from tests.wan_models import attention_cases as cases
from tests.wan_models.attention_cases import exact, operands, relative_error
from wan_models.attention import auto, kernels, packages, sdpa
from wan_models.attention.kernels import attention, check_mode
from wan_models.attention.modes import AUTO, MODES

BF16 = torch.bfloat16
TIMES = {"sdpa": 3.0, "flash_attn_2": 5.0, "flash_attn_3": 2.0, "flash_attn_4": 4.0, "fp8": 1.5,
         "flash_attn_3_fp8": 1.25, "sageattn": 1.75}


@pytest.fixture(autouse=True)
def nothing_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "_measured", {})


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A machine that can time: a pretended Hopper with every package, whose kernels take the times
    of TIMES. What was timed, in order."""
    cases.install_all(monkeypatch)
    cases.pretend(monkeypatch, (9, 0))
    monkeypatch.setattr(sdpa, "choose", lambda *_, **__: sdpa.Choice("torch", "no GPU here"))
    monkeypatch.setattr(auto, "_can_time", lambda q: True)
    seen: list[str] = []
    kept = kernels._by_name

    def named(mode, *arguments):
        seen.append(mode)
        return kept(mode, *arguments)

    def milliseconds(call, device):
        call()
        return TIMES[seen[-1]]

    monkeypatch.setattr(kernels, "_by_name", named)
    monkeypatch.setattr(auto, "_milliseconds", milliseconds)
    return seen


@pytest.mark.parametrize(("mode", "best"), [("auto", "flash_attn_3"), ("auto_fp8", None)])
def test_the_fastest_is_measured_once_for_a_class_of_shapes(timed, mode, best):
    best = best or "flash_attn_3_fp8"
    q, k, v = operands(dtype=BF16)
    out = attention(q, k, v, mode=mode)
    assert timed == [*AUTO[mode], best]
    assert torch.equal(out, attention(q, k, v, mode=best))
    timed.clear()
    attention(q, k[:, :-1], v[:, :-1], mode=mode)  # 8 keys and not 9: another class
    assert len(timed) > 1
    timed.clear()
    attention(q[:, :-1], k, v, mode=mode)  # 6 queries and not 7: the same
    assert timed == [best]
    (first, made), *_ = public.choices().items()
    assert first == auto.Shape(mode, ("cpu", None), BF16, 64, 4, 8, 16, False)
    assert made.mode == best
    assert made.milliseconds == {name: TIMES[name] for name in AUTO[mode]}
    assert made.failed == {}
    assert public.choice(mode, q, k) == made
    assert public.choice(mode, q[:, :2], k).mode == best  # not measured: what a compile takes


def test_auto_never_changes_numbers_by_8_bits():
    assert not {"fp8", "flash_attn_3_fp8", "sageattn"} & set(AUTO["auto"])
    assert set(AUTO["auto"]) | set(AUTO["auto_fp8"]) <= set(MODES)


def test_what_cannot_run_is_left_out(timed, monkeypatch):
    """By its rules beforehand, or because it fails when it is tried; then its words are kept."""
    def broken(*_, **__):
        raise RuntimeError("no kernel image\nand more")

    monkeypatch.setattr(cases.sys.modules["flash_attn_interface"], "flash_attn_func", broken)
    monkeypatch.setitem(TIMES, "sdpa", 9.0)
    q, k, v = operands(dtype=BF16)
    attention(q, k, v, mode="auto")
    (made,) = public.choices().values()
    assert made.failed == {"flash_attn_3": "no kernel image"}
    assert made.mode == "flash_attn_4"
    q, k, v = operands(dtype=torch.float32)
    attention(q, k, v, mode="auto")
    assert list(public.choices().values())[-1].milliseconds.keys() == {"sdpa"}


def test_nothing_that_runs_is_one_line(timed, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(kernels, "_by_name", broken)
    q, k, v = operands(dtype=BF16)
    with pytest.raises(ValueError, match=r"none of its modes ran: 'fp8': out of luck; ") as raised:
        attention(q, k, v, mode="auto_fp8")
    assert "\n" not in str(raised.value)


def test_a_compile_takes_what_was_measured(timed, monkeypatch):
    q, k, v = operands(dtype=BF16)
    lens = torch.tensor([9, 4])

    def function(q, k, v):
        return attention(q, k, v, mode="auto", k_lens=lens)

    for name, expected in (("flash_attn_4", "flash_attn_4"), ("sdpa", "sdpa")):
        torch._dynamo.reset()
        auto._measured.clear()
        with monkeypatch.context() as patch:
            patch.setitem(TIMES, name, 0.5)
            made = public.measure("auto", 2, 7, 2, 64, keys=9, device="cpu", masked=True)
        assert made.mode == name
        timed.clear()
        compiled = torch.compile(
            function, backend="contig_safe", fullgraph=True, options={"inner": "aot_eager"}
        )
        assert torch.equal(compiled(q, k, v), attention(q, k, v, mode=expected, k_lens=lens))
        assert public.choice("auto", device="cpu", head_dim=64) == made


def test_unmeasured_it_goes_by_order(monkeypatch):
    """While tracing, and where nothing can be timed: what can run, in the order that is written."""
    cases.install_all(monkeypatch)
    q, k, v = operands(dtype=BF16)
    for sm, mode, expected in (
        ((9, 0), "auto", "flash_attn_3"), ((10, 0), "auto", "flash_attn_4"),
        (None, "auto", "sdpa"), (None, "auto_fp8", "fp8"),
    ):
        torch._dynamo.reset()
        cases.pretend(monkeypatch, sm)
        assert public.choice(mode, device="cpu", head_dim=64).mode == expected
        assert "nothing was measured" in public.choice(mode, device="cpu", head_dim=64).reason
        out = attention(q, k, v, mode=mode)
        assert torch.equal(out, attention(q, k, v, mode=expected))
        compiled = torch.compile(
            lambda q, k, v, mode=mode: attention(q, k, v, mode=mode),
            backend="aot_eager", fullgraph=True,
        )
        assert torch.equal(compiled(q, k, v), out)
    assert not public.choices()


def test_a_head_dimension_that_the_first_does_not_take(monkeypatch):
    cases.install_all(monkeypatch)
    cases.pretend(monkeypatch, (9, 0))
    monkeypatch.setattr(sdpa, "choose", lambda *_, **__: sdpa.Choice("torch", "no GPU here"))
    q, k, v = operands(size=36, dtype=BF16)
    assert relative_error(attention(q, k, v, mode="auto"), exact(q, k, v)) < 4e-3
    assert public.choice("auto", device="cpu", head_dim=36).mode == "sdpa"
    with pytest.raises(ValueError, match=r"none of its modes can run: 'fp8': head dim.* got 36; "):
        attention(q, k, v, mode="auto_fp8")


def test_refusals(monkeypatch):
    monkeypatch.setattr(packages, "present", lambda module: False)
    cases.pretend(monkeypatch, (8, 0))
    q, _, _ = operands(dtype=BF16)
    assert attention(q, q, q, mode="auto").shape == q.shape
    monkeypatch.setattr("wan_models.attention.fp8.obstacle", lambda *_: "capability 8.9 needed")
    message = r"'auto_fp8': none of its modes can run: 'fp8': capability 8.9 needed; 'flash_attn_3"
    with pytest.raises(ValueError, match=message) as raised:
        attention(q, q, q, mode="auto_fp8")
    assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="mode 'sdpa' stands for itself: use 'auto' or 'auto_fp8'"):
        public.choice("sdpa", device="cpu")
    with pytest.raises(ValueError, match="mode 'sdpa' stands for itself"):
        public.measure("sdpa", 1, 4, 2, 64, device="cpu")
    check_mode("auto_fp8", torch.device("meta"), dtype=BF16, head_dim=128)


def test_a_gpu_is_needed_to_time_and_no_graph_under_way():
    q = torch.zeros(1)
    assert not auto._can_time(q)
    with torch._subclasses.FakeTensorMode():
        assert not auto._can_time(torch.empty(1))
