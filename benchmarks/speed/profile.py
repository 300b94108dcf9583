"""GPU kernels of a call by ``torch.profiler``, and which part of a block each belongs to."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

LINEARS, ATTENTION, TEXT, ELEMENTWISE = "linears", "attention", "text attention", "elementwise"
OPERANDS = "attention operands"
PARTS = (LINEARS, ATTENTION, TEXT, OPERANDS, ELEMENTWISE)
#: Inductor names its fused kernels after the ops in them, products and attention included.
_FUSED = re.compile(r"triton_(poi|red|per|for|mix)_")
#: Kernels of wan_models.quant that multiply, and what makes a weight ready for it.
_OWN_LINEARS = re.compile(r"(row_scaled_product|few_rows|expand)$")
#: Kernels of wan_models.attention.fp8_quantise, for both attentions: their launches for the text
#: cannot be told apart.
_OWN_OPERANDS = re.compile(
    r"(quantise_(queries|keys|values)|sample|peaks|norms|norm_scales|settle(_values)?)$"
)
#: Passes of other attention modes that only prepare operands.
_PREPARES = re.compile(r"quanti[sz]e|statistic|smooth|transpose|cast|copy|norm|rope|rotary", re.I)
_ATTENTION = re.compile(r"flash|fmha|attention|attn|sdpa|sage|softmax", re.I)
_PRODUCT = re.compile(r"gemm|nvjet|matmul|scaled_mm|cublas|triton_tem_|_mm_", re.I)
#: Attention kernels shorter than this part of the longest one are those of the text.
_TEXT_SHARE = 0.25


class Kernel(NamedTuple):
    """One launch: its name and time."""

    name: str
    ms: float


def kernels(call: Callable[[], Any], *, calls: int = 1) -> list[Kernel]:
    """The kernels of ``calls`` calls in order of their start; on a CPU its ops, own time alone."""
    on_gpu = torch.cuda.is_available()
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    call()
    with torch.profiler.profile(activities=[activity]) as profile:
        for _ in range(calls):
            call()
        if on_gpu:
            torch.cuda.synchronize()
    found = []
    for event in sorted(profile.events(), key=lambda e: e.time_range.start):
        if getattr(event, "is_user_annotation", False):
            continue  # a range, not a kernel
        if on_gpu and event.device_type == DeviceType.CUDA:
            found.append(Kernel(event.name, event.time_range.elapsed_us() / 1e3))
        elif not on_gpu:
            found.append(Kernel(event.name, event.self_cpu_time_total / 1e3))
    return found


def longest(call: Callable[[], Any], *, calls: int = 5) -> Kernel:
    """The kernel that takes the most time, with its mean time in one call.

    That is the attention kernel itself in a call that also quantises.
    """
    total: dict[str, float] = {}
    for kernel in kernels(call, calls=calls):
        total[kernel.name] = total.get(kernel.name, 0.0) + kernel.ms
    if not total:
        raise RuntimeError("the profiler saw no kernel")
    name = max(total, key=lambda key: total[key])
    return Kernel(name, total[name] / calls)


def part_of(name: str) -> str:
    """Which part of a block a kernel is by its name; :data:`TEXT` is told by time, not here."""
    if _FUSED.search(name):
        return ELEMENTWISE
    # Signatures hold namespaces of everything: what a kernel is called stands first.
    head = name.split("(", 1)[0]
    if _OWN_LINEARS.match(head):
        return LINEARS
    if _OWN_OPERANDS.match(head):
        return OPERANDS
    if _ATTENTION.search(head) and not _PREPARES.search(head.split("<", 1)[0]):
        return ATTENTION
    return LINEARS if _PRODUCT.search(head) else ELEMENTWISE


def by_part(launched: list[Kernel]) -> dict[str, float]:
    """Milliseconds of each of :data:`PARTS`."""
    total = dict.fromkeys(PARTS, 0.0)
    attention = [kernel.ms for kernel in launched if part_of(kernel.name) == ATTENTION]
    least = _TEXT_SHARE * max(attention, default=0.0)
    for kernel in launched:
        part = part_of(kernel.name)
        if part == ATTENTION and kernel.ms < least:
            part = TEXT
        total[part] += kernel.ms
    return total


def summed(launched: list[Kernel]) -> list[tuple[str, str, int, float]]:
    """(part, name, launches, ms) by name, longest first."""
    total: dict[str, list[float]] = {}
    for kernel in launched:
        total.setdefault(kernel.name, []).append(kernel.ms)
    lines = [(part_of(name), name, len(ms), sum(ms)) for name, ms in total.items()]
    return sorted(lines, key=lambda line: -line[3])
