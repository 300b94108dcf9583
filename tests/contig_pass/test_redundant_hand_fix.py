"""A hand fix by ``.contiguous()``, as people scatter it: which calls did nothing, site by site.

The functions below have the calls where such a fix puts them: behind every merge of heads, three
times over in one place, and at every step of an FP8 linear's forward. What a call really does is
seen by running it eagerly and comparing addresses; the report must say the same of each line.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import contig_pass

HEADS, DIM = 4, 16
WIDTH = HEADS * DIM


class Fp8Linear(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        weight = torch.randn(WIDTH, WIDTH).to(torch.float8_e4m3fn)
        self.weight = torch.nn.Parameter(weight, requires_grad=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        one = torch.ones((), dtype=torch.float32)
        input = input.contiguous()
        rows = input.reshape(-1, input.shape[2])
        rows = rows.to(torch.float8_e4m3fn)
        rows = rows.contiguous()
        out = torch._scaled_mm(rows, self.weight.t(), one, one, out_dtype=torch.bfloat16)
        return out.reshape(*input.shape[:2], WIDTH)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """(B, L, H, D) each."""
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first).transpose(1, 2)


class Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(WIDTH, 3 * WIDTH, dtype=torch.bfloat16)
        self.o = Fp8Linear()

    def heads(self, x: torch.Tensor) -> list[torch.Tensor]:
        parts = self.qkv(x).chunk(3, dim=-1)
        return [part.unflatten(-1, (HEADS, DIM)) for part in parts]


class SelfAttention(Attention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = attention(*self.heads(x))
        x = x.flatten(2)
        x = x.contiguous()
        return self.o(x)


class SplitAttention(Attention):
    """Heads first in memory, so that merging them copies, and the call behind it does not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            part.transpose(1, 2).contiguous()
            for part in self.heads(x)
        )
        x = F.scaled_dot_product_attention(q, k, v)
        x = (x * 2).transpose(1, 2)
        x = x.flatten(2).contiguous()
        return self.o(x)


class HumoAttention(Attention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b = x.shape[0]
        text = attention(*self.heads(x)).flatten(2)
        text = text.contiguous().view(b, -1, HEADS, DIM).contiguous().flatten(2).contiguous()
        return self.o(text)


class Watch(TorchFunctionMode):
    """Whether each ``.contiguous()`` returned its argument's memory, by source line."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, list[bool]] = defaultdict(list)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.Tensor.contiguous:
            no_op = out.data_ptr() == args[0].data_ptr()
            self.seen[sys._getframe(1).f_lineno].append(no_op)
        return out


@pytest.mark.parametrize(
    ("kind", "calls", "no_ops"),
    [(SelfAttention, 3, 3), (SplitAttention, 6, 3), (HumoAttention, 5, 5)],
)
def test_the_report_agrees_with_what_each_call_did(
    kind: type[Attention], calls: int, no_ops: int
) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = kind()
    x = torch.randn(2, 32, WIDTH, dtype=torch.bfloat16)
    with torch.no_grad(), Watch() as watch:
        model(x)
    with torch.no_grad():
        report = contig_pass.explain(model, x, target="sm90")
    found: dict[int, list[bool]] = defaultdict(list)
    for copy in report.copies:
        if copy.call == "contiguous":
            assert copy.file == __file__
            found[copy.lineno].append(copy.verdict == "no-op")
    assert found == watch.seen
    told = [no_op for line in found.values() for no_op in line]
    assert (len(told), sum(told)) == (calls, no_ops)


def test_every_site_reads_as_a_sentence() -> None:
    torch._dynamo.reset()
    x = torch.randn(2, 32, WIDTH, dtype=torch.bfloat16)
    with torch.no_grad():
        report = contig_pass.explain(HumoAttention(), x, target="sm90")
    text = str(report)
    assert "copies in your own program: 5 no-op" in text
    assert "test_redundant_hand_fix.py" in " ".join(text.split())
    modules = {copy.module for copy in report.copies}
    assert modules == {"", "o"}
