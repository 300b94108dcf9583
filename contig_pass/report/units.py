"""Bytes and times in words."""

from __future__ import annotations


def in_bytes(count: int) -> str:
    """``count`` bytes in decimal units: ``512 B``, ``1.5 kB``, ``2.25 GB``."""
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


def in_microseconds(microseconds: float) -> str:
    """A time in microseconds: ``0.0 us``, ``<0.1 us``, ``12.3 us``."""
    return f"{microseconds:.1f} us" if microseconds >= 0.1 or not microseconds else "<0.1 us"
