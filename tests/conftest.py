"""Every test starts with an empty compiler, the built-in contracts and no reports."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import contig_pass
from contig_pass.contracts import REGISTRY


@pytest.fixture(autouse=True)
def clean_slate() -> Iterator[None]:
    torch.set_num_threads(1)
    torch._dynamo.reset()
    contig_pass.forget_reports()
    settings = {"force_disable_caches": True, "emulate_precision_casts": True, "compile_threads": 1}
    with REGISTRY.scope(), torch._inductor.config.patch(settings):
        yield
    torch._dynamo.reset()
