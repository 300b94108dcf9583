"""The latest reports of this process, and the delivery of each to where the user wants it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from contig_pass.report.model import Report

_KEPT = 256
_reports: deque[Report] = deque(maxlen=_KEPT)
_lock = threading.Lock()


def last_reports() -> list[Report]:
    """Reports of the graphs compiled in this process, oldest first, at most 256.

    A graph that was served from a compile cache ran no pass and has no report.
    """
    with _lock:
        return list(_reports)


def forget_reports() -> None:
    """Empty the list that :func:`last_reports` returns."""
    with _lock:
        _reports.clear()


def deliver_to(sink: str | Callable[[Report], None] | None) -> Callable[[Report], None]:
    """A function that logs a report and hands it to ``sink``: a path, a callable or ``None``.

    A path receives every report delivered through this function so far, each time anew.

    Raises:
        ReportError: the path's suffix is unknown or it cannot be written.
    """
    from contig_pass.report.write import trace_artifact, writer

    write = writer(sink)

    def deliver(report: Report) -> None:
        with _lock:
            _reports.append(report)
        trace_artifact(report)
        write(report)

    return deliver
