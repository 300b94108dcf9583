"""Where a report goes: a file, a callable, and the structured trace that tlparse renders."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from torch._logging import trace_structured

from contig_pass.errors import ReportError
from contig_pass.report.html import to_html
from contig_pass.report.json import to_file, to_json
from contig_pass.report.model import Report
from contig_pass.report.text import render_diff, to_text

Sink = str | Callable[[Report], None] | None


def check_sink(sink: Sink) -> None:
    """Fail before anything is compiled if reports could not be delivered to ``sink``.

    Raises:
        ReportError: not a path or callable, an unknown suffix, or a path that cannot be written.
    """
    if sink is None or callable(sink):
        return
    if not isinstance(sink, str):
        raise ReportError(f"report={sink!r}: use a path ({_suffixes()}) or a callable")
    path = Path(sink)
    if path.suffix not in _RENDERERS:
        raise ReportError(f"report={sink!r}: use a path that ends in {_suffixes()}")
    if not path.parent.is_dir():
        raise ReportError(f"report={sink!r}: the folder {str(path.parent)!r} does not exist")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ReportError(f"report={sink!r}: no file can be written there")
    if path.exists() and not os.access(path, os.W_OK):
        raise ReportError(f"report={sink!r}: the file is read-only")


def write_file(path: str, reports: Sequence[Report]) -> None:
    """Write ``reports`` to ``path`` in the form that its suffix names, all or nothing.

    Raises:
        ReportError: the file cannot be written; what stood there before still does.
    """
    content = _RENDERERS[Path(path).suffix](reports)
    folder = Path(path).resolve().parent
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", dir=folder, prefix=".contig_pass_", delete=False, encoding="utf-8"
        ) as file:
            temporary = file.name
            file.write(content)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise ReportError(f"report={path!r}: {error.strerror or error}") from error


def trace_artifact(report: Report) -> None:
    """Add the report to the structured trace; it costs nothing unless TORCH_TRACE is set."""
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": "contig_pass_report", "encoding": "json"},
        payload_fn=lambda: json.dumps(to_json(replace(report, listings=()))),
    )
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": "contig_pass_diff", "encoding": "string"},
        payload_fn=lambda: render_diff(report),
    )


def _text(reports: Sequence[Report]) -> str:
    return "\n".join(to_text(report) for report in reports)


def _json(reports: Sequence[Report]) -> str:
    # Without the whole graphs: they are for looking at, and a file to compare with is kept small.
    return json.dumps(to_file(replace(r, listings=()) for r in reports), indent=1) + "\n"


_RENDERERS: dict[str, Callable[[Sequence[Report]], str]] = {
    ".txt": _text,
    ".json": _json,
    ".html": to_html,
}


def _suffixes() -> str:
    *others, last = _RENDERERS
    return f"{', '.join(others)} or {last}"
