"""Private names of torch: all found here, and told in one line where one is missing."""

from __future__ import annotations

import logging

import pytest
import torch

from contig_pass.errors import InductorHookError
from contig_pass.inductor import hooks


def test_this_version_has_every_hook() -> None:
    assert hooks.missing() == ()


def test_a_missing_hook_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    monkeypatch.setattr(logging.getLogger("contig_pass"), "warning", lambda *a: told.append(a))
    monkeypatch.delattr(torch._meta_registrations, "_meta_grouped_mm_common")
    hooks.self_test.__wrapped__()
    ((_, line),) = told
    assert "torch._meta_registrations._meta_grouped_mm_common" in line
    assert "programs that torch refuses while tracing stay refused" in line
    assert "\n" not in line


def test_nothing_works_without_a_required_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._inductor.output_code.CompiledFxGraph, "post_compile")
    monkeypatch.delattr(torch._inductor.output_code.OutputCode, "post_compile")
    with pytest.raises(InductorHookError, match="misaligned inputs cannot be realigned"):
        hooks.self_test.__wrapped__()
