"""The picture of where bytes and microseconds go, by module: bars in a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from contig_pass.provenance import repeated
from contig_pass.report.model import Report
from contig_pass.report.units import in_bytes, in_microseconds

#: Bars shown; what is smaller is summed up in one more.
BARS = 12


@dataclass
class _Share:
    """What the copies of one module cost."""

    module: str
    copies: int = 0
    nbytes: int = 0
    fused_bytes: int = 0
    microseconds: float = 0.0
    fused_microseconds: float = 0.0

    def add(self, other: _Share) -> None:
        self.copies += other.copies
        self.nbytes += other.nbytes
        self.fused_bytes += other.fused_bytes
        self.microseconds += other.microseconds
        self.fused_microseconds += other.fused_microseconds


def chart(reports: Sequence[Report]) -> str:
    """A table with two bars a module, dearest first; words where nothing is moved."""
    shares = _shares(reports)
    if not any(share.copies for share in shares):
        return '<p class="quiet">No call makes a copy: there is nothing to price.</p>'
    shares.sort(key=lambda share: (-share.microseconds, -share.nbytes, share.module))
    if len(shares) > BARS:
        rest = _Share(f"{len(shares) - BARS + 1} other modules")
        for share in shares[BARS - 1 :]:
            rest.add(share)
        shares = [*shares[: BARS - 1], rest]
    most_bytes = max(share.nbytes for share in shares)
    most_time = max(share.microseconds for share in shares)
    rows = []
    for share in shares:
        size = _bar("bytes", share.nbytes, share.fused_bytes, most_bytes)
        time = _bar("time", share.microseconds, share.fused_microseconds, most_time)
        rows.append(
            f'<tr role="row"><th role="rowheader" scope="row">{escape(share.module)}</th>'
            f'<td role="cell" class="number" data-label="copies">{share.copies:,}</td>'
            f'<td role="cell" data-label="bytes">{size}<span>{in_bytes(share.nbytes)}</span></td>'
            f'<td role="cell" data-label="time">{time}'
            f"<span>{in_microseconds(share.microseconds)}</span></td></tr>"
        )
    head = "".join(
        f'<th role="columnheader" scope="col">{name}</th>'
        for name in ("module", "copies", "bytes a call", "modelled time a call")
    )
    return (
        '<table class="chart" role="table" aria-label="bytes and time by module">'
        f'<thead role="rowgroup"><tr role="row">{head}</tr></thead>'
        f'<tbody role="rowgroup">{"".join(rows)}</tbody></table>{_key(shares)}'
    )


def _key(shares: Sequence[_Share]) -> str:
    if not any(share.fused_bytes for share in shares):
        return ""
    swatch = '<svg class="swatch {}" aria-hidden="true"><rect width="100%" height="100%"/></svg>'
    return (
        f'<p class="key">{swatch.format("bytes")}{swatch.format("time")} a copy of its own '
        f'{swatch.format("bytes fused")}{swatch.format("time fused")} written by the kernel '
        "before it</p>"
    )


def _shares(reports: Sequence[Report]) -> list[_Share]:
    shares: dict[str, _Share] = {}
    for report in reports:
        previous = None
        for row in report.fixes:
            if row.once:
                continue  # no part of a call
            shared = row.copy is not None and row.copy == previous
            previous = row.copy
            module = repeated(row.module) or "top level"
            nbytes, microseconds = row.nbytes or 0, row.microseconds or 0.0
            fused = int(row.fused)
            shares.setdefault(module, _Share(module)).add(
                _Share(
                    module,
                    copies=int(not shared),
                    nbytes=nbytes,
                    fused_bytes=fused * nbytes,
                    microseconds=microseconds,
                    fused_microseconds=fused * microseconds,
                )
            )
    return list(shares.values())


def _bar(kind: str, value: float, fused: float, most: float) -> str:
    """A bar ``value / most`` wide, its fused part last and paler. The number stands beside it."""
    if not most:
        return ""
    own, rest = 100 * (value - fused) / most, 100 * fused / most
    parts = f'<rect width="{own:.2f}%" height="100%"/>' if own else ""
    if rest:
        parts += f'<rect class="fused" x="{own:.2f}%" width="{rest:.2f}%" height="100%"/>'
    return f'<svg class="bar {kind}" aria-hidden="true">{parts}</svg>'
