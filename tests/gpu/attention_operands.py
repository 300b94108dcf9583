"""Operands of attention on a GPU, the modes it can run, and memory that holds NaN."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from wan_models.attention.kernels import check_mode

CUDA, BF16 = torch.device("cuda"), torch.bfloat16


def require(mode: str, dtype: torch.dtype = BF16, head_dim: int = 128) -> None:
    try:
        check_mode(mode, CUDA, dtype=dtype, head_dim=head_dim)
    except ValueError as reason:
        pytest.skip(str(reason))


def operands(
    queries: int, keys: int, *, size: int = 128, heads: int = 3, batch: int = 2,
    dtype: torch.dtype = BF16,
) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(batch, n, heads, size) for n in (queries, keys, keys)]
    return [torch.randn(shape, device="cuda").to(dtype) for shape in shapes]


def poisoned(call: Callable[[], torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """The result of ``call`` where the allocator hands out memory full of NaN: an element that a
    kernel does not write is seen."""
    poison = [torch.full_like(like, torch.nan) for _ in range(4)]
    torch.cuda.synchronize()
    del poison
    out = call()
    torch.cuda.synchronize()
    return out
