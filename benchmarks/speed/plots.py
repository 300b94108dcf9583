"""PNG plots of a command's rows: the roofline, time by part, times beside peers' times."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.speed.bars import PUBLISHED
from benchmarks.speed.profile import PARTS
from benchmarks.speed.rows import Row
from benchmarks.speed.sizes import PEAK_TBS, PEAK_TFLOPS

_OURS, _PEER, _FAILED = "#1b6ca8", "#9aa5ae", "#c8553d"
_COLOURS = ("#1b6ca8", "#e09f3e", "#9e2a2b", "#7d5ba6", "#6a994e", "#9aa5ae")


def missing() -> str:
    """What is not installed, in one line, or ``""``."""
    if importlib.util.find_spec("matplotlib") is None:
        return "--plots needs matplotlib: pip install matplotlib, or the extra 'bench'"
    return ""


def draw(command: str, rows: Sequence[Row], folder: str) -> list[Path]:
    """Write the plots that these rows allow.

    Args:
        command: name of the subcommand, the first part of each file's name.
        rows: of a run.
        folder: made if it is not there.

    Returns:
        The files.
    """
    import matplotlib

    matplotlib.use("Agg")
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in _figures(command, [row for row in rows if row.ms is not None]):
        path = target / f"{command}-{name}.png"
        figure.savefig(path, dpi=150, bbox_inches="tight")
        figure.clear()
        written.append(path)
    return written


def _figures(command: str, rows: list[Row]) -> Iterator[tuple[str, Any]]:
    for group in dict.fromkeys(row.group for row in rows):
        members = [row for row in rows if row.group == group]
        slug = "-".join("".join(c if c.isalnum() else " " for c in group).split())
        yield f"{slug}-times", _beside_peers(command, group, members)
        if any(f"{PARTS[0]} ms" in row.figures for row in members):
            yield f"{slug}-parts", _parts(group, members)
        if any(row.moved for row in members):
            yield f"{slug}-roofline", _roofline(command, group, members)


def _axes(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    return figure, figure.subplots()


def _is_ours(row: Row) -> bool:
    return "ours" in row.label


def _beside_peers(command: str, group: str, rows: list[Row]) -> Any:
    """Bars of the times, each with its ratio to the fastest peer."""
    figure, axes = _axes(9, 0.42 * len(rows) + 1.6)
    published = PUBLISHED.get((command, group))
    peers = [row.ms for row in rows if not _is_ours(row) and row.ms]
    base = min(peers) if peers else published[0] if published else None
    for place, row in enumerate(reversed(rows)):
        colour = _FAILED if row.reason else _OURS if _is_ours(row) else _PEER
        axes.barh(place, row.ms, color=colour)
        ratio = "" if not base else f"  x{row.ms / base:.2f}"
        rate = f"  {row.tflops:.0f} TFLOPS" if row.tflops else ""
        axes.text(row.ms, place, f" {row.ms:.3g} ms{ratio}{rate}", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [row.label for row in reversed(rows)], fontsize=8)
    axes.set_xlim(0, 1.45 * max(row.ms for row in rows if row.ms))
    axes.set_xlabel("median ms; x: ratio to the fastest peer" + (
        f" (published: {published[2]})" if published and not peers else ""
    ), fontsize=8)
    axes.set_title(f"{command}: {group}")
    return figure


def _parts(group: str, rows: list[Row]) -> Any:
    """Time of our rows stacked by part, last what the median has beyond the profiled call: waiting,
    and a lower clock than it ran at."""
    shown = [row for row in rows if f"{PARTS[0]} ms" in row.figures]
    figure, axes = _axes(9, 0.7 * len(shown) + 1.8)
    for place, row in enumerate(reversed(shown)):
        left = 0.0
        for part, colour in zip((*PARTS, "idle"), _COLOURS, strict=True):
            width = float(row.figures.get(f"{part} ms", 0.0))
            name = "rest of the median" if part == "idle" else part
            label = name if place == 0 else None
            axes.barh(place, width, left=left, color=colour, label=label)
            if width > 0.04 * row.ms:
                axes.text(left + width / 2, place, f"{width:.1f}", ha="center", va="center",
                          fontsize=8, color="white")
            left += width
    axes.set_yticks(range(len(shown)), [row.label for row in reversed(shown)], fontsize=8)
    axes.set_xlabel("ms by part (torch.profiler)")
    axes.set_title(f"block: {group}")
    axes.legend(fontsize=8, ncols=len(PARTS) + 1, loc="upper center", bbox_to_anchor=(0.5, -0.3))
    return figure


def _roofline(command: str, group: str, rows: list[Row]) -> Any:
    """Rates against the peaks: by FLOPs a byte where there are FLOPs, else by bytes moved."""
    figure, axes = _axes(8, 5)
    points = [row for row in rows if row.tflops and row.moved]
    products = bool(points)
    points = points or [row for row in rows if row.tbs]
    places = [
        (row.flops / row.moved, row.tflops) if products else (row.moved / 1e9, row.tbs)
        for row in points
    ]
    for number, (row, place) in enumerate(zip(points, places, strict=True)):
        colour = _FAILED if row.reason else _OURS if _is_ours(row) else _PEER
        axes.scatter(*place, color=colour, s=24)
        axes.annotate(str(number + 1), place, fontsize=7)
    if products:
        widest = 2 * max(*(x for x, _ in places), max(PEAK_TFLOPS.values()) / PEAK_TBS)
        for name, peak in PEAK_TFLOPS.items():
            corner = peak / PEAK_TBS
            axes.plot((corner / 8, corner, widest), (peak / 8, peak, peak), "k--", linewidth=0.8)
            axes.text(widest, peak, f"{name} {peak:.0f}", fontsize=8, va="bottom", ha="right")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(f"FLOPs a byte that has to be moved (slope: {PEAK_TBS} TB/s)")
        axes.set_ylabel("TFLOPS")
    else:
        axes.axhline(PEAK_TBS, color="black", linewidth=0.8, linestyle="--")
        axes.set_xlabel("GB that have to be moved")
        axes.set_ylabel("TB/s")
    key = "\n".join(f"{n + 1}  {row.label}" for n, row in enumerate(points))
    axes.text(1.02, 1.0, key, transform=axes.transAxes, fontsize=7, va="top")
    axes.set_title(f"{command}: {group}: rates against the peaks")
    return figure
