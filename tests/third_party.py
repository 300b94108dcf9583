"""torchao's int8 product with scaled rows: an op whose kernel does not look at a stride.

``torchao::int_scaled_matmul(a, b, scales1)``, a (M, K), b (K, N) int8, multiplies row m of the
product by scale m. Its Triton kernel reads the scales at ``scales1 + m``: one after another,
whatever their stride. A column of a matrix of statistics gives wrong values without an error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from contig_pass import Rule, register_contract

OP = "torchao::int_scaled_matmul"


@dataclass(frozen=True)
class OneAfterAnother(Rule):
    """Neighbours along the second-last dimension are neighbours in memory."""

    order = "column"

    def check(self, layout: object) -> bool | None:
        return layout.unit_stride(-2)  # type: ignore[attr-defined]

    def describe(self) -> str:
        return "one after another along the rows"


def register() -> None:
    """State what the kernel demands of its scales."""
    register_contract(OP, "scales1", [OneAfterAnother()], source="torchao/kernel/intmm_triton.py")


def program(a: torch.Tensor, b: torch.Tensor, statistics: torch.Tensor) -> torch.Tensor:
    """The product of ``a`` and ``b``, its rows scaled by the middle column of ``statistics``."""
    return torch.ops.torchao.int_scaled_matmul(a, b, statistics[:, 1:2])


def operands(device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random operands; small numbers, so that every product is exact."""
    torch.manual_seed(0)
    a = torch.randint(-4, 5, (64, 128), dtype=torch.int8, device=device)
    b = torch.randint(-4, 5, (128, 64), dtype=torch.int8, device=device)
    return a, b, torch.randint(1, 9, (64, 3), device=device).float()


def expected(a: torch.Tensor, b: torch.Tensor, statistics: torch.Tensor) -> torch.Tensor:
    """What the product is, (M, N) fp32."""
    return (a.double() @ b.double() * statistics[:, 1:2]).float()
