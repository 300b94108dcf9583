"""``python -m benchmarks attention``: our modes and other kernels at the lengths of Wan.

Batch 1, non-causal, inputs (1, L, H, D) bf16 that lie as the model makes them. A row "quantisation
counted" is the whole call, compiled where it is of ours; a row "attention only" is the mean time
of the longest kernel in it by the profiler. Accuracy is by head, on 1,024 query rows against fp64:
the mean and the worst head's cosine, on Gaussian inputs and on ones with outlier channels, of
which the worse counts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import wan_models.attention
from benchmarks.speed import ours, peers
from benchmarks.speed.accuracy import (
    GAUSSIAN,
    OUTLIERS,
    head_cosines,
    normal,
    some_rows,
    with_outliers,
    worst,
)
from benchmarks.speed.bars import (
    ACCURACY,
    ATTENTION_ONLY,
    CHOSEN_ATTENTION,
    COUNTED,
    OWN_ATTENTION,
)
from benchmarks.speed.command import Command
from benchmarks.speed.measure import Settings
from benchmarks.speed.profile import longest
from benchmarks.speed.rows import Group, Prepared, Row, Shared, Task, Unavailable
from benchmarks.speed.sizes import SIZES, SMOKE, Size, attention_flops
from wan_models.attention import attention

_CHECKED_ROWS = 1024
_SIXTEEN = {"mean cosine": (">=", 0.9999), "worst head": (">=", 0.9999)}
Qkv = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Inputs(NamedTuple):
    """q, k and v by kind, the query rows that are checked, and what they should give by kind."""

    qkv: dict[str, Qkv]
    rows: torch.Tensor
    wanted: dict[str, torch.Tensor]


def plan(settings: Settings, args: argparse.Namespace) -> list[Group]:
    """A group for each resolution."""
    return [
        _group((SMOKE if settings.smoke else SIZES)[name], settings)
        for name in settings.resolutions
    ]


def _group(size: Size, settings: Settings) -> Group:
    shared = Shared(lambda: _inputs(size, settings.device))
    flops = attention_flops(size.tokens, size.tokens, size.config)
    moved = 4.0 * 2 * size.tokens * size.config.dim  # q, k, v and the result in 16 bits
    tasks: list[Task] = []

    def add(
        name: str, find: Callable[[], Callable[..., torch.Tensor]], *, eight: bool,
        required: bool = False,
    ) -> None:
        """``find`` gives the function of q, k and v, or raises."""
        limits: dict[str, tuple[str, float]] = {}
        if required:
            limits = dict(ACCURACY["fp8 attention"] if eight else _SIXTEEN)
        peak = "fp8" if eight else "bf16"
        made = Shared(find)
        held.append(made)
        row = Row(
            size.name, name, COUNTED if eight else "", required=required, flops=flops, moved=moved,
            peak=peak, limits=limits,
        )
        tasks.append(Task(row, lambda: _prepared(made(), shared(), name)))
        if eight:
            alone = Row(size.name, name, ATTENTION_ONLY, flops=flops, moved=moved, peak=peak)
            tasks.append(Task(alone, lambda: _alone(made(), shared(), alone)))

    held: list[Shared[Any]] = [shared]

    def of(kind: str | None = None, mode: str | None = None) -> Callable[[], Callable]:
        def find() -> Callable[..., torch.Tensor]:
            name = mode or ours.mode(kind or "", size.config, settings.device)
            problem = ours.mode_problem(name, size.config, settings.device)
            if problem:
                raise Unavailable(problem)
            return _mode(name, settings)

        return find

    for name, mode in (
        ("SDPA flash, bf16", "sdpa_flash"), ("SDPA cuDNN, bf16", "sdpa_cudnn"),
        ("FA3, bf16", "flash_attn_3"), ("FA4, bf16", "flash_attn_4"),
    ):
        add(name, of(mode=mode), eight=False)
    add("FA3, FP8, plain cast", _fa3_plain_cast, eight=True)
    add("FA3, FP8, smoothed", of(mode="flash_attn_3_fp8"), eight=True)
    add("SageAttention 2", of(mode="sageattn"), eight=True)
    add("ours, chosen 16-bit kernel", of("16-bit, fp32 scores"), eight=False, required=True)
    add("ours, own 16-bit kernel", of(mode="fp16"), eight=False, required=True)
    add(OWN_ATTENTION, of("own 8-bit"), eight=True, required=True)
    add(CHOSEN_ATTENTION, of("8-bit"), eight=True, required=True)
    return Group(size.name, tasks, held)


def _mode(name: str, settings: Settings) -> Callable[..., torch.Tensor]:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention(q, k, v, mode=name)

    # Modes that choose by measuring do so outside of tracing.
    def measured_first(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if not warm:
            attend(q, k, v)
            warm.append(True)
        return function(q, k, v)

    warm: list[bool] = []
    # torch's own kernels gain nothing from a compiler around them.
    function = attend if name.startswith("sdpa_") else ours.compiled(attend, settings)
    return measured_first if name.startswith("auto") else function


def _fa3_plain_cast() -> Callable[..., torch.Tensor]:
    function = peers.fa3()
    e4m3 = torch.float8_e4m3fn

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return peers.first(function(q.to(e4m3), k.to(e4m3), v.to(e4m3)))

    return attend


def _inputs(size: Size, device: str) -> Inputs:
    heads, width = size.config.num_heads, size.config.head_dim
    shape = (1, size.tokens, heads, width)
    plain = tuple(normal(*shape, device=device, seed=seed) for seed in range(3))
    # v keeps its spread: its channels have scales of their own in every kernel. q is smaller where
    # k has its outliers, so that scores keep a usual spread and no softmax becomes one-hot.
    keys = with_outliers(plain[1]) + _channel_means(plain[1])
    qkv = {GAUSSIAN: plain, OUTLIERS: (_shrunk(plain[0]), keys, plain[2])}
    rows = some_rows(size.tokens, _CHECKED_ROWS, device)
    return Inputs(qkv, rows, {kind: reference(*x, rows) for kind, x in qkv.items()})


def _channel_means(k: torch.Tensor) -> torch.Tensor:
    """A constant for each channel, as keys of real models have."""
    return normal(*k.shape[2:], device=k.device.type, seed=7, std=4.0, dtype=k.dtype)


def _shrunk(q: torch.Tensor) -> torch.Tensor:
    """q with the channels where k has outliers smaller, so that scores keep a usual spread."""
    grown = with_outliers(torch.ones_like(q[0, :1]))
    return (q / grown).to(q.dtype)


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v in fp64 for some query rows, one head at a time.

    Args:
        q, k, v: (1, L, H, D).
        rows: numbers of query rows.

    Returns:
        (rows, H, D) fp64.
    """
    out = []
    for head in range(q.shape[2]):
        one = q[0, rows, head].double() / q.shape[-1] ** 0.5
        weights = (one @ k[0, :, head].double().t()).softmax(-1)
        out.append(weights @ v[0, :, head].double())
    return torch.stack(out, dim=1)


def _prepared(function: Callable[..., torch.Tensor], inputs: Inputs, name: str) -> Prepared:
    def accuracy() -> dict[str, float]:
        results = {}
        for kind, qkv in inputs.qkv.items():
            cosines = head_cosines(function(*qkv)[0, inputs.rows], inputs.wanted[kind])
            results[kind] = {
                "mean cosine": float(cosines.mean()), "worst head": float(cosines.min()),
            }
        return worst(results)

    def figures() -> dict[str, float | str]:
        # What a mode that chooses has chosen, where wan_models says so.
        choice = getattr(wan_models.attention, "choice", None)
        if choice is None or "chosen" not in name:
            return {}
        return {"choice": _choice_text(choice, inputs.qkv[GAUSSIAN], name)}

    return Prepared(lambda: function(*inputs.qkv[GAUSSIAN]), accuracy, figures)


def _choice_text(choice: Callable[..., Any], qkv: Qkv, name: str) -> str:
    mode = "auto_fp8" if "8-bit" in name else "auto"
    try:
        return str(choice(mode, qkv[0], qkv[1]))
    except TypeError as error:
        return f"unknown: {error}"


def _alone(function: Callable[..., torch.Tensor], inputs: Inputs, row: Row) -> Prepared:
    def figures() -> dict[str, float | str]:
        kernel = longest(lambda: function(*inputs.qkv[GAUSSIAN]))
        row.ms = row.fastest = row.slowest = kernel.ms
        return {"kernel": kernel.name[:120]}

    return Prepared(lambda: None, None, figures, timed=False)


COMMAND = Command(
    "attention", "attention kernels, with and without quantisation, by head accuracy", plan,
    rounds=10, columns=("choice", "prepare s"),
)
