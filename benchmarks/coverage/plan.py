"""Which rows a run has, and what compiles each."""

from __future__ import annotations

from benchmarks.coverage.cases import BLOCK, CLASS, CONTROL, FP4, FP8, MODEL, ONCE, PLAIN, Entry
from benchmarks.coverage.measure import AOT_EAGER, INDUCTOR, Row

BATCHES = (1, 2)
_KINDS_OF_PRODUCT = (PLAIN, FP8, FP4)
#: Entries that try every quantisation, or Inductor, in a quick run as well.
_QUICK_RECIPES = (("WanSelfAttention", "forward"),)
_QUICK_INDUCTOR = (("WanSelfAttention", "forward"), ("MTVCrafterMotionAttention", "forward"))
_QUICK_ONCE = ("40 equal blocks", "three LoRA strengths")
_QUICK_RESOLUTIONS = "three resolutions: t2v-1.3b"


def full_rows(entry: Entry) -> list[Row]:
    """Every quantisation and batch: by Inductor, and whole models by it once for each kind of
    product."""
    rows = []
    for quantisation in entry.quantisations:
        for batch in BATCHES:
            inductor = entry.kind != MODEL or quantisation in _KINDS_OF_PRODUCT
            if entry.kind == ONCE and entry.name.startswith("three resolutions"):
                inductor = entry.name == _QUICK_RESOLUTIONS
            rows.append(_row(entry, quantisation, batch, INDUCTOR if inductor else AOT_EAGER))
    return rows


def quick_rows(entry: Entry) -> list[Row]:
    """Every variant with one recipe of each kind of product, most without Inductor."""
    key = (entry.owner, entry.name)
    if entry.kind == CLASS:
        chosen = entry.quantisations if key in _QUICK_RECIPES else _KINDS_OF_PRODUCT
        rows = [
            _row(entry, quantisation, batch, AOT_EAGER)
            for quantisation in chosen
            for batch in BATCHES
            # Layouts depend on B and on the kind of product, but not on both together.
            if quantisation != FP4 or batch == 2
        ]
        if key in _QUICK_INDUCTOR:
            rows.append(_row(entry, FP8, 2, INDUCTOR))
        return rows
    if entry.kind == BLOCK:
        return [_row(entry, FP8, batch, AOT_EAGER) for batch in BATCHES]
    if entry.kind == MODEL:
        return [_row(entry, FP8, 1, AOT_EAGER)]
    if entry.kind == CONTROL:
        return [_row(entry, FP8, 2, AOT_EAGER)]
    if entry.name in _QUICK_ONCE:
        return [_row(entry, quantisation, 2, AOT_EAGER) for quantisation in entry.quantisations]
    if entry.name == _QUICK_RESOLUTIONS:
        return [_row(entry, FP8, 1, AOT_EAGER)]
    return []


def _row(entry: Entry, quantisation: str, batch: int, inner: str) -> Row:
    return Row(entry.kind, entry.owner, entry.name, quantisation, batch, inner)
