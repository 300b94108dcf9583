"""The hand fix that contig_pass is there to replace, put in and looked at.

It puts ``.contiguous()`` behind every merge of heads, ``flatten(2)`` of (B, L, H, D), of the
attention classes; HuMo's attention gets two calls more, on what the kernel returns and on that
viewed back as (B, L, H, D). Here these calls are made while a model runs eagerly, and a call that
returns the memory it was given did nothing.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

from wan_models.attention import WanHuMoCrossAttention


class HandCall(NamedTuple):
    """One ``.contiguous()`` of the hand fix.

    Attributes:
        site: qualified name of the function it is in.
        no_op: whether it returned its argument's memory.
        strides: of its argument.
    """

    site: str
    no_op: bool
    strides: tuple[int, ...]


class _AfterMerges(TorchFunctionMode):
    """Every ``x.flatten(2)`` of a 4-D tensor becomes ``x.flatten(2).contiguous()``."""

    def __init__(self, calls: list[HandCall]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.Tensor.flatten and args[1:] == (2,) and args[0].dim() == 4:
            site = sys._getframe(1).f_code.co_qualname
            return _inserted(self.calls, out, site)
        return out


@contextlib.contextmanager
def hand_fix() -> Iterator[list[HandCall]]:
    """Within the block the calls are made; the list receives them in order."""
    calls: list[HandCall] = []
    humo = WanHuMoCrossAttention

    def after(name: str) -> Callable[..., torch.Tensor]:
        plain = getattr(humo, name)

        def method(*args: Any, **kwargs: Any) -> torch.Tensor:
            return _inserted(calls, plain(*args, **kwargs), f"{humo.__name__}.{name}")

        return method

    with (
        mock.patch.object(humo, "attend", after("attend")),
        mock.patch.object(humo, "attend_per_frame", after("attend_per_frame")),
        _AfterMerges(calls),
    ):
        yield calls


def _inserted(calls: list[HandCall], x: torch.Tensor, site: str) -> torch.Tensor:
    made = x.contiguous()
    calls.append(HandCall(site, made.data_ptr() == x.data_ptr(), x.stride()))
    return made
