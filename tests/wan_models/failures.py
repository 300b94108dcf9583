"""How the tests of layout failures run things: as an H100 would, compiled with and without us."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.faults import emulate
from tests.wan_models import scenario_checks as checks
from tests.wan_models import scenarios
from wan_models.quant import quantize_

RECIPE = "fp8_e4m3fn_scaled_fast"
SELF = scenarios.SCENARIOS["self-attention"]


@pytest.fixture(scope="module", autouse=True)
def kernel_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder: Path = tmp_path_factory.mktemp("kernels")
    with torch._inductor.utils.fresh_cache(dir=str(folder)):
        yield


@pytest.fixture(autouse=True)
def kept_kernels(clean_slate: None, kernel_folder: None) -> Iterator[None]:
    """C++ that two compiles of this module have in common is built once; graphs are not kept."""
    with (
        torch._inductor.config.patch(force_disable_caches=False, fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
        torch.no_grad(),
    ):
        yield


@contextlib.contextmanager
def h100() -> Iterator[None]:
    """Within the block the CPU's scaled product refuses what an H100's was seen to refuse."""
    library = emulate.install()
    try:
        yield
    finally:
        library._destroy()


def plain(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True)


def safe(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return torch.compile(function, backend="contig_safe", fullgraph=True, options=options)


def quantised(module: nn.Module, recipe: str = RECIPE) -> nn.Module:
    made = scenarios.randomise(module).to(scenarios.BF16)
    quantize_(made, recipe)
    return made


def near(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal up to what a compile may change, see :data:`checks.COMPILED`."""
    return checks.error(one, other.double()) < checks.COMPILED
