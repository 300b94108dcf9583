"""A report as JSON, version 4.

A file is an object ``{"schema": "contig_pass.report", "version": 4, "reports": [report, ...]}``.
A report has the fields of :class:`~contig_pass.report.model.Report`:

=============  ===================================================================================
field          content
=============  ===================================================================================
graph          string: name of the compiled graph, or several with ", " between
policy         "dense", "contract", "audit" or "strict"
targets        strings: devices whose demands counted, such as "sm90"
bandwidth      string: what modelled times rest on
totals         object of numbers: nodes, uses, clean, fixes, fixed_uses, skips, pins, checks,
               preparable (bytes a call), nbytes, microseconds
rows           objects, see below
hunks          objects {module, lines}; a line is [mark, text], mark one of " ", "-", "+"
seconds        number: time that the pass took; 0 in files of ``contig-pass diff``, so that equal
               programs give equal files
cached         boolean: the graph came out of a compile cache
listings       objects {graph, parts}, a part like a hunk; empty in files that ``write_file`` made
copies         objects, see below; version 3 had none, and is read as well
=============  ===================================================================================

A row has kind ("fix" or "skip"), reason, rules (strings), source, op, operand, node, dtype, shape,
device, before, after, order, copy, nbytes, microseconds, fused, write_back, parameter, once,
module, file, lineno, code.
``before`` and ``after`` are objects {strides, offset, alignment} (offset in bytes); ``after``,
``order``, ``copy``, ``nbytes`` and ``microseconds`` are null where they do not apply. A symbolic
size, stride or offset is a string.

A copy, one that the user's program asks for, has verdict ("no-op", "compiled away", "redundant",
"removed", "unneeded" or "needed"), call, proof, node, dtype, shape, device, before, after, nbytes,
microseconds, module, file, lineno, code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from contig_pass.errors import ReportError
from contig_pass.report.copies import Copy
from contig_pass.report.model import (
    SCHEMA_VERSION,
    Hunk,
    Listing,
    Report,
    Row,
    Totals,
)
from contig_pass.report.place import Place

SCHEMA = "contig_pass.report"
_WITHOUT_COPIES = 3


def to_json(report: Report) -> dict[str, Any]:
    """``report`` as plain dictionaries, lists, strings and numbers."""
    return _plain(dataclasses.asdict(report))


def to_file(reports: Iterable[Report]) -> dict[str, Any]:
    """The content of a report file."""
    return {
        "schema": SCHEMA,
        "version": SCHEMA_VERSION,
        "reports": [to_json(report) for report in reports],
    }


def from_file(content: Any) -> list[Report]:
    """The reports of a report file's content.

    Raises:
        ReportError: it is not such a file, or of another version, or a field is missing.
    """
    if not isinstance(content, Mapping) or content.get("schema") != SCHEMA:
        raise ReportError(f"not a report file: the top level must have schema {SCHEMA!r}")
    version, reports = content.get("version"), content.get("reports", [])
    if version == _WITHOUT_COPIES:
        reports = [{**report, "copies": []} for report in reports]
    elif version != SCHEMA_VERSION:
        raise ReportError(
            f"report file of version {version!r}: this contig_pass reads versions "
            f"{_WITHOUT_COPIES} and {SCHEMA_VERSION}"
        )
    return [from_json(report) for report in reports]


def from_json(data: Mapping[str, Any]) -> Report:
    """The report that :func:`to_json` made ``data`` of.

    Raises:
        ReportError: a field is missing or unknown.
    """
    fields = dict(_checked(Report, data))
    fields["targets"] = tuple(fields["targets"])
    fields["totals"] = Totals(**_checked(Totals, fields["totals"]))
    fields["rows"] = tuple(_row(row) for row in fields["rows"])
    fields["hunks"] = tuple(_hunk(hunk) for hunk in fields["hunks"])
    fields["listings"] = tuple(_listing(listing) for listing in fields["listings"])
    fields["copies"] = tuple(_copy(copy) for copy in fields["copies"])
    return Report(**fields)


def _row(data: Mapping[str, Any]) -> Row:
    fields = dict(_checked(Row, data))
    fields["rules"] = tuple(fields["rules"])
    fields["shape"] = tuple(fields["shape"])
    fields["before"] = _place(fields["before"])
    fields["after"] = None if fields["after"] is None else _place(fields["after"])
    return Row(**fields)


def _copy(data: Mapping[str, Any]) -> Copy:
    fields = dict(_checked(Copy, data))
    fields["shape"] = tuple(fields["shape"])
    fields["before"], fields["after"] = _place(fields["before"]), _place(fields["after"])
    return Copy(**fields)


def _place(data: Mapping[str, Any]) -> Place:
    fields = dict(_checked(Place, data))
    return Place(tuple(fields["strides"]), fields["offset"], fields["alignment"])


def _hunk(data: Mapping[str, Any]) -> Hunk:
    fields = _checked(Hunk, data)
    return Hunk(fields["module"], tuple((mark, line) for mark, line in fields["lines"]))


def _listing(data: Mapping[str, Any]) -> Listing:
    fields = _checked(Listing, data)
    return Listing(fields["graph"], tuple(_hunk(part) for part in fields["parts"]))


def _checked(kind: type, data: Any) -> Mapping[str, Any]:
    names = {field.name for field in dataclasses.fields(kind)}
    given = set(data) if isinstance(data, Mapping) else set()
    if given != names:
        wrong = ", ".join(sorted(names ^ given))
        raise ReportError(f"{kind.__name__.lower()} in a report file: missing or unknown: {wrong}")
    return data


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
