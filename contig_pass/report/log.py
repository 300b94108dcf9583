"""The latest reports of this process, and the delivery of each to where the user wants it."""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable

from contig_pass.errors import ReportError
from contig_pass.plan import AUDIT
from contig_pass.report.model import Report
from contig_pass.report.write import Sink, check_sink, trace_artifact, write_file

_KEPT = 256
#: (report, absolute path it was written to or None), oldest first.
_delivered: deque[tuple[Report, str | None]] = deque(maxlen=_KEPT)
_lock = threading.Lock()
_logger = logging.getLogger("contig_pass")


def last_reports() -> list[Report]:
    """Reports of the graphs compiled in this process, oldest first, at most 256.

    A graph that was served from a compile cache ran no pass and has no report.
    """
    with _lock:
        return [report for report, _ in _delivered]


def forget_reports() -> None:
    """Empty the list that :func:`last_reports` returns; files that were written stay."""
    with _lock:
        _delivered.clear()


def deliver_to(sink: Sink) -> Callable[[Report], None]:
    """A function that records a report, traces it, and hands it to ``sink``.

    A callable receives each report. A path receives every report that this process delivered to
    it, written anew each time: a model that breaks into several graphs fills one file.

    Raises:
        ReportError: ``sink`` cannot be used; checked here, before anything is compiled.
    """
    check_sink(sink)
    path = os.path.abspath(sink) if isinstance(sink, str) else None

    def deliver(report: Report) -> None:
        with _lock:
            _delivered.append((report, path))
            same_file = [earlier for earlier, to in _delivered if path is not None and to == path]
        _log(report)
        trace_artifact(report)
        if path is not None:
            write_file(path, same_file)
        elif callable(sink):
            _call(sink, report)

    return deliver


def _call(sink: Callable[[Report], None], report: Report) -> None:
    try:
        sink(report)
    except Exception as error:
        name = getattr(sink, "__qualname__", repr(sink))
        raise ReportError(
            f"report callable {name} raised {type(error).__name__}: {error}"
        ) from error


def _log(report: Report) -> None:
    totals = report.totals
    _logger.info(
        "%s: %d uses checked, %d clean, %d copies, %d left alone",
        report.graph, totals.uses, totals.clean, totals.fixes, totals.skips,
    )
    broken = [row for row in report.skips if row.rules]
    if broken and report.policy != AUDIT:
        _logger.warning(
            "%s: %d uses break their contract and no copy can help; the report says which",
            report.graph, len(broken),
        )
