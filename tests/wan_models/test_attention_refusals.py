"""What the dispatcher refuses, and how it says so: in one line, before any work, no fallback."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from tests.wan_models import attention_cases as cases
from tests.wan_models.attention_cases import exact, operands, pretend_for, relative_error
from wan_models.attention import fp8, packages
from wan_models.attention.kernels import MODES, attention, check_mode

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BF16 = torch.bfloat16
PACKAGE_MODES = tuple(cases.CAPABILITIES)
OPS = torch.ops.wan_models


@pytest.fixture
def gpu_packages(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    cases.install_all(monkeypatch)
    return monkeypatch


MISSING = {
    "flash_attn_2": r"package flash-attn >= 2\.3 needed, not installed",
    "flash_attn_3": r"package flash-attn-3 >= 3\.0 or fa3-fwd >= 0\.0\.3 needed, not installed",
    "flash_attn_3_fp8":
        r"package flash-attn-3 >= 3\.0 or fa3-fwd >= 0\.0\.3 needed, not installed",
    "flash_attn_4": r"package flash-attn-4 >= 4\.0 needed, not installed",
    "sageattn": r"package sageattention >= 2\.0 needed, not installed",
    "sageattn_3": r"package sageattn3 >= 1\.0 needed, not installed",
    "sageattn_3_fp4": r"package sageattn3 >= 1\.0 needed, not installed",
    "sageattn_3_fp8": r"package sageattn3 >= 1\.0 needed, not installed",
}


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No attention package installed, whatever this machine has."""
    monkeypatch.setattr(packages, "present", lambda module: False)
    return monkeypatch


@pytest.mark.parametrize("mode", PACKAGE_MODES)
def test_a_missing_package_is_named_and_replaced_by_nothing(bare, mode):
    pretend_for(bare, mode)
    q, k, v = operands(dtype=BF16)
    with pytest.raises(ValueError, match=MISSING[mode]) as raised:
        attention(q, k, v, mode=mode)
    assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match=MISSING[mode]):
        check_mode(mode, CPU)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r">= \d"):
        torch.compile(
            lambda q: attention(q, q, q, mode=mode), backend="aot_eager", fullgraph=True
        )(q)


@pytest.mark.parametrize(
    ("mode", "sm", "change", "message"),
    [
        ("sageattn", None, {}, r"compute capability 8\.0, .* needed, got cpu"),
        ("sageattn", (7, 5), {}, r"compute capability 8\.0, .* needed, found 7\.5"),
        ("flash_attn_2", (7, 5), {}, r"capability 8\.0 or later needed, found 7\.5"),
        ("flash_attn_3", (10, 0), {}, r"capability 8\.0 to 9\.0 needed, found 10\.0"),
        ("flash_attn_3_fp8", (8, 0), {}, r"capability 9\.0 needed, found 8\.0"),
        ("flash_attn_4", (8, 9), {}, r"capability 9\.0 or later needed, found 8\.9"),
        ("flash_attn_4", (9, 0), {"__version__": "3.9"}, r"found flash-attn-4 3\.9"),
        ("sageattn_3", (9, 0), {}, r"capability 12\.0 or 12\.1 needed, found 9\.0"),
        ("sageattn", (9, 0), {"__version__": "1.0.6"},
         r"sageattention >= 2\.0 needed, found sageattention 1\.0\.6"),
        ("flash_attn_2", (9, 0), {"__version__": "1.0.9"}, r"found flash-attn 1\.0\.9"),
        ("flash_attn_2", (9, 0), {"__version__": "local"}, r"found flash-attn local"),
    ],
)
def test_what_does_not_fit_is_named(gpu_packages, mode, sm, change, message):
    cases.pretend(gpu_packages, sm)
    module = sys.modules[packages.DEMANDS[mode].packages[0].module]
    for name, value in change.items():
        gpu_packages.setattr(module, name, value)
    with pytest.raises(ValueError, match=message) as raised:
        check_mode(mode, CPU, dtype=BF16, head_dim=128)
    assert "\n" not in str(raised.value)


def test_several_obstacles_come_in_one_line(bare):
    cases.pretend(bare, (9, 0))
    with pytest.raises(
        ValueError, match=r"sageattn3 >= 1\.0 needed, not installed; compute capability 12\.0 or "
        r"12\.1 needed, found 9\.0; head dimension 64 or 128 needed, got 80"
    ):
        check_mode("sageattn_3", CUDA, head_dim=80)


def test_a_package_that_does_not_import_says_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "sageattention", None)
    cases.pretend(monkeypatch, (9, 0))
    with pytest.raises(ValueError, match="sageattention is installed but does not import: "):
        check_mode("sageattn", CPU)


def test_a_package_without_the_entry_point_is_named(monkeypatch):
    module = types.ModuleType("flash_attn")
    module.__version__ = "4.0.0"
    cases.install(monkeypatch, module)
    q, k, v = operands()
    with pytest.raises(ValueError, match=r"flash-attn 4\.0\.0 has no flash_attn_func"):
        OPS.flash_attn_2(q, k, v)


def test_the_forward_only_wheel_stands_in_for_flash_3(monkeypatch):
    module = cases.flash_attn_interface(returns_tuple=False)
    module.__name__, module.__version__ = "fa3_fwd_interface", "0.0.3"
    present = packages.present
    monkeypatch.setattr(
        packages, "present", lambda name: name != "flash_attn_interface" and present(name)
    )
    cases.install(monkeypatch, module)
    cases.pretend(monkeypatch, (9, 0))
    q, k, v = operands(dtype=BF16)
    out = attention(q, k, v, mode="flash_attn_3", k_lens=torch.tensor([9, 4]))
    assert relative_error(out, exact(q, k, v, torch.tensor([9, 4]))) < 4e-3
    with pytest.raises(ValueError, match="fa3-fwd takes bfloat16, got float16"):
        attention(q.half(), k.half(), v.half(), mode="flash_attn_3")


def test_lengths_without_values_are_not_read():
    with torch._subclasses.FakeTensorMode():
        q = torch.empty(1, 4, 2, 64)
        assert attention(q, q, q, k_lens=torch.tensor([9])).shape == q.shape


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_needed_where_nothing_is_computed(bare, mode):
    check_mode(mode, torch.device("meta"), masked=True, dtype=BF16, head_dim=128)


@pytest.mark.parametrize("mode", [*PACKAGE_MODES, "fp8", "fp16", "sdpa"])
def test_full_size_on_the_meta_device(bare, mode):
    q = torch.empty(1, 75_600, 40, 128, dtype=BF16, device="meta")
    k = torch.empty(1, 512, 40, 128, dtype=BF16, device="meta")
    assert attention(q, k, k, mode=mode).shape == q.shape


def test_fp8_on_a_gpu_needs_8_9_and_triton():
    assert fp8.obstacle((8, 9), "cuda", True) == ""
    assert fp8.obstacle((8, 0), "cuda", True).endswith("needed, found 8.0")
    assert fp8.obstacle((9, 0), "cuda", False) == "package triton needed, not installed"
    assert fp8.obstacle(None, "cuda", True).endswith("no CUDA device is visible")
    assert fp8.obstacle(None, "mps", True).endswith("got mps")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q: attention(q, q, q, mode="sage"), r"mode 'sage': use one of 'sdpa', .*'fp8'"),
        (lambda q: attention(q, q.half(), q), "share a dtype, got torch.float32, torch.float16"),
        (lambda q: attention(q, q.to("meta"), q), "share a device, got cpu, meta"),
        (lambda q: attention(q[0], q[0], q[0], mode="fp8"), r"takes \(B, L, H, D\): got 3"),
        (lambda q: attention(q, q, q, k_lens=torch.tensor([4.0])), "dtype torch.float32"),
        (lambda q: attention(q, q, q, k_lens=torch.tensor([0])), "from 0 to 0: use lengths from 1"),
        (lambda q: attention(q, q, q, k_lens=torch.tensor([5])), "to the 4 keys"),
        (lambda q: attention(q, q, q, k_lens=torch.tensor([4, 4])), "one length for each of 1"),
        (lambda q: attention(q, q, q, mode="radial"), "'radial' needs radial=RadialPattern"),
        (lambda q: attention(q, q, q, radial=object()), "'sdpa' takes no radial pattern"),
        (lambda q: attention(q[..., :48], q[..., :48], q[..., :48], mode="fp8"), "got 48"),
        (lambda q: attention(*[cases.strided(q)] * 3, mode="fp8"), "q must be unit-stride"),
        (lambda q: attention(q, q, q, mode="fp16"), "'fp16': bfloat16 or float16 needed"),
        (lambda q: attention(*[cases.strided(q.half())] * 3, mode="fp16"), "q must be unit-stride"),
        (lambda q: check_mode("sdpa_efficient", CPU), "needs a CUDA device, got cpu"),
        (lambda q: check_mode("sdpa_flash", CUDA, dtype=torch.float32), "bfloat16 or float16"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message) as raised:
        call(torch.randn(1, 4, 2, 64))
    assert "\n" not in str(raised.value)
