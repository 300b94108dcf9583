"""The rows as a table: one line for each variant and kind of quantisation, B = 1 and 2 side by
side."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate

from benchmarks.coverage.cases import PLAIN
from benchmarks.coverage.measure import Row
from wan_models.quant import RECIPES

_HEADERS = (
    "variant", "linears", "ok", "graphs", "differs", "uses", "fixes", "KiB",
    "by hand", "no-ops",
)
_LEGEND = (
    "Two figures are those of B = 1 / B = 2, of one row each; a range spans several recipes.\n"
    "differs: largest difference to eager mode, as a part of the largest value.\n"
    "linears: bf16; stored (FP8 or FP4, dequantised for the product); product (in FP8 or FP4).\n"
    "KiB: read and written by the fixes on every call; 0 where a fix is written by its producer.\n"
    "by hand: .contiguous() calls of the hand fix; no-ops: those that return what they are given."
)
_VARIANT_WIDTH = 30


def table(rows: Sequence[Row]) -> str:
    """At most about 120 characters wide."""
    lines: list[tuple[str, ...]] = []
    owner = None
    for key, group in _grouped(rows).items():
        if key[0] != owner:
            owner = key[0]
            lines.append((f"-- {owner}", *("" for _ in _HEADERS[1:])))
        lines.append(_line(key[1], key[2], group))
    return f"{tabulate(lines, _HEADERS, disable_numparse=True)}\n{_LEGEND}\n"


def linears(quantisation: str) -> str:
    """``"bf16"``, ``"stored"`` or ``"product"``."""
    if quantisation == PLAIN:
        return PLAIN
    return "product" if RECIPES[quantisation].fast else "stored"


def _grouped(rows: Sequence[Row]) -> dict[tuple[str, str, str], list[Row]]:
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.owner, row.variant, linears(row.quantisation)), []).append(row)
    return groups


def _line(variant: str, kind: str, rows: Sequence[Row]) -> tuple[str, ...]:
    batches = sorted({row.batch for row in rows})
    differences = [row.difference for row in rows if row.difference is not None]

    def both(name: str, unit: int = 1) -> str:
        """The figure of each batch, as a range where recipes differ."""
        spans = [_span([getattr(r, name) / unit for r in rows if r.batch == b]) for b in batches]
        return " / ".join(spans)

    return (
        _shortened(variant),
        kind,
        f"{sum(row.ok for row in rows)}/{len(rows)}",
        _span([row.graphs for row in rows]),
        f"{max(differences):.2g}" if differences else "-",
        both("uses"),
        both("fixes"),
        both("fix_bytes", 1024),
        both("hand_calls"),
        both("hand_no_ops"),
    )


def _span(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.4g}" if low == high else f"{low:.4g}-{high:.4g}"


def _shortened(text: str) -> str:
    return text if len(text) <= _VARIANT_WIDTH else text[: _VARIANT_WIDTH - 1] + "…"
