"""Modes ``"auto"`` and ``"auto_fp8"``: the fastest mode of this machine, found by trying.

``"auto"`` takes one that computes in the type of its operands, ``"auto_fp8"`` one in 8 bits, whose
numbers are others; which ones says :data:`wan_models.attention.modes.AUTO`. The first eager call
on a GPU of each class of shapes times every one that can run, on the operands at hand. All later
calls of the process take the fastest. Nothing is timed while a graph is traced or captured: a
compiled model takes what was measured last for its device and dtype (:func:`measure` sees to that
beforehand), else the first of that order that can run. What was chosen, and the times, are in
:func:`choice` and :func:`choices`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch

from wan_models.attention.modes import AUTO, check_mode, head_dim_problem, machine_problem

Run = Callable[[str], torch.Tensor]
_WARM, _RUNS = 1, 3


class Shape(NamedTuple):
    """A class of calls for which one choice holds; tokens up to the next power of two.

    Attributes:
        mode: ``"auto"`` or ``"auto_fp8"``.
        device: kind and index.
        dtype: of q, k and v.
        head_dim: D.
        planes, queries, keys: B * H, L and S, each up to the next power of two.
        masked: whether keys are masked.
    """

    mode: str
    device: tuple[str, int | None]
    dtype: torch.dtype
    head_dim: int
    planes: int
    queries: int
    keys: int
    masked: bool


class Choice(NamedTuple):
    """What a mode stands for.

    Attributes:
        mode: the one that runs.
        reason: why.
        milliseconds: medians of all that were timed; empty where nothing was.
        failed: modes that could not run after all, and the first line of why.
    """

    mode: str
    reason: str
    milliseconds: dict[str, float]
    failed: dict[str, str]


_measured: dict[Shape, Choice] = {}


def resolve(
    mode: str, q: torch.Tensor, k: torch.Tensor, k_lens: torch.Tensor | None, run: Run
) -> str:
    """The mode that ``mode`` stands for; itself where it is none of :data:`AUTO`.

    Args:
        mode: checked by :func:`wan_models.attention.modes.check_mode` before.
        q: (B, L, H, D); k: (B, S, H, D).
        k_lens: (B,) or None.
        run: attention of the operands by the mode that it is given, for timing.
    """
    if mode not in AUTO:
        return mode
    if torch.compiler.is_compiling() or not _can_time(q):
        names = _order(mode, q.device.type, q.device.index, q.dtype)
        for name in names:
            if not head_dim_problem(name, q.shape[-1]):
                return name
        return names[0]
    shape = _shape(mode, q, k, k_lens is not None)
    if shape not in _measured:
        _measured[shape] = _fastest(mode, q, run)
    return _measured[shape].mode


def measure(
    mode: str, batch: int, tokens: int, heads: int, head_dim: int, *, keys: int | None = None,
    dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cuda", masked: bool = False,
) -> Choice:
    """Choose for a shape beforehand, on random operands; a compile then takes it.

    Args:
        mode: ``"auto"`` or ``"auto_fp8"``.
        batch, tokens, heads, head_dim: B, L, H and D.
        keys: S, if it is not L.
        dtype: of q, k and v.
        device: a GPU; on others nothing is timed.
        masked: with ``k_lens``.

    Raises:
        ValueError: another mode, or one of which nothing can run.
    """
    from wan_models.attention.kernels import attention

    _check(mode)
    q, k, v = (
        torch.randn(batch, n, heads, head_dim, device=device, dtype=dtype)
        for n in (tokens, keys or tokens, keys or tokens)
    )
    lens = torch.full((batch,), k.shape[1], device=device) if masked else None
    check_mode(mode, q.device, dtype=dtype, head_dim=head_dim)
    name = resolve(mode, q, k, lens, lambda name: attention(q, k, v, mode=name, k_lens=lens))
    return _measured.get(_shape(mode, q, k, masked), _unmeasured(name))


def choice(
    mode: str, q: torch.Tensor | None = None, k: torch.Tensor | None = None, *,
    device: torch.device | str = "cuda", dtype: torch.dtype = torch.bfloat16, head_dim: int = 128,
    masked: bool = False,
) -> Choice:
    """What was measured for operands like q and k; else what a compile would take for ``mode`` now.

    Args:
        mode: ``"auto"`` or ``"auto_fp8"``.
        q: (B, L, H, D); k: (B, S, H, D), or None for one like q. What follows then is theirs.
        device, dtype, head_dim: of operands that are not at hand.
        masked: whether keys are masked.

    Raises:
        ValueError: another mode than ``"auto"`` and ``"auto_fp8"``, or nothing can run.
    """
    _check(mode)
    device = torch.device(device)
    if q is not None:
        device, dtype, head_dim = q.device, q.dtype, q.shape[-1]
    check_mode(mode, device, dtype=dtype, head_dim=head_dim)
    if q is not None:
        found = _measured.get(_shape(mode, q, q if k is None else k, masked))
        if found is not None:
            return found
    names = _order(mode, device.type, device.index, dtype)
    name = next((n for n in names if not head_dim_problem(n, head_dim)), names[0])
    found = _last(mode, device.type, device.index, dtype)
    return found if found is not None and found.mode == name else _unmeasured(name)


def choices() -> dict[Shape, Choice]:
    """Every choice by measurement in this process so far, in order."""
    return dict(_measured)


def _check(mode: str) -> None:
    if mode not in AUTO:
        raise ValueError(f"mode {mode!r} stands for itself: use {' or '.join(map(repr, AUTO))}")


def _unmeasured(name: str) -> Choice:
    return Choice(name, "nothing was measured: the first in order that can run here", {}, {})


def _can_time(q: torch.Tensor) -> bool:
    """Whether q holds values on a GPU that is not recording a graph."""
    plain = type(q) in (torch.Tensor, torch.nn.Parameter)
    return plain and q.device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


@torch.compiler.assume_constant_result
def _order(mode: str, kind: str, index: int | None, dtype: torch.dtype) -> tuple[str, ...]:
    """What can run on this machine, the last measured winner first; read while tracing."""
    usable = [name for name in AUTO[mode] if not machine_problem(name, kind, index, dtype)]
    last = _last(mode, kind, index, dtype)
    if last is not None:
        usable.sort(key=lambda name: name != last.mode)
    return tuple(usable)


def _last(mode: str, kind: str, index: int | None, dtype: torch.dtype) -> Choice | None:
    """The last measured choice for a device and dtype. A device without index is any of its kind:
    the current one, when it runs."""
    for shape, made in reversed(_measured.items()):
        same = index is None or shape.device[1] is None or shape.device[1] == index
        if (shape.mode, shape.device[0], shape.dtype) == (mode, kind, dtype) and same:
            return made
    return None


def _shape(mode: str, q: torch.Tensor, k: torch.Tensor, masked: bool) -> Shape:
    batch, queries, heads, size = q.shape
    sizes = (1 << (n - 1).bit_length() for n in (batch * heads, queries, k.shape[1]))
    return Shape(mode, (q.device.type, q.device.index), q.dtype, size, *sizes, masked)


def _fastest(mode: str, q: torch.Tensor, run: Run) -> Choice:
    times, failed = {}, {}
    for name in AUTO[mode]:
        if machine_problem(name, q.device.type, q.device.index, q.dtype) or head_dim_problem(
            name, q.shape[-1]
        ):
            continue
        try:
            times[name] = _milliseconds(lambda name=name: run(name), q.device)
        except (RuntimeError, ValueError, TypeError) as error:
            failed[name] = str(error).partition("\n")[0]
    if not times:
        reasons = "; ".join(f"{name!r}: {why}" for name, why in failed.items())
        raise ValueError(f"attention mode {mode!r}: none of its modes ran: {reasons}")
    best = min(times, key=times.__getitem__)
    return Choice(best, f"the fastest of {len(times)} measured", times, failed)


def _milliseconds(call: Callable[[], object], device: torch.device) -> float:
    """Median of a few runs, by the GPU's clock."""
    with torch.cuda.device(device), torch.no_grad():
        for _ in range(_WARM):
            call()
        times = []
        for _ in range(_RUNS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
    return statistics.median(times)
