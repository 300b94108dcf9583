"""The rows and graphs of reports as the page's script reads them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from contig_pass.provenance import repeated
from contig_pass.report.copies import NO_OP, Copy
from contig_pass.report.model import FIX, Hunk, Report, Row
from contig_pass.report.page.source import Excerpts
from contig_pass.report.place import Place
from contig_pass.report.rolling import (
    Block,
    blocks_of,
    kind_of_block,
    kind_of_copy,
    kind_of_hunk,
    kind_of_row,
    modules_of,
    rolled_up,
)
from contig_pass.report.units import in_bytes, in_microseconds

#: What the line of an inserted copy calls.
_COPY = " = contig_pass.contiguous."
#: Uses that a row which stands for many lists by name.
MEMBERS = 200


def page_data(reports: Sequence[Report]) -> dict[str, Any]:
    """Everything that the script shows: ``{rows, sources, graphs}``.

    Rows, hunks and blocks that read alike are rolled up; the first stands for all.
    """
    excerpts = Excerpts()
    rows = [
        _row(report.graph, group, excerpts)
        for report in reports
        for group in rolled_up(report.rows, kind_of_row)
    ]
    rows += [
        _copy(report.graph, group, excerpts)
        for report in reports
        for group in rolled_up(report.copies, kind_of_copy)
    ]
    graphs = [graph for report in reports for graph in _graphs(report)]
    return {"rows": rows, "sources": excerpts.found, "graphs": graphs}


# -- rows ----------------------------------------------------------------------------------------


def _row(graph: str, group: Sequence[Row], excerpts: Excerpts) -> dict[str, Any]:
    row = group[0]
    priced = row.nbytes is not None
    nbytes = sum(r.nbytes or 0 for r in group)
    microseconds = sum(r.microseconds or 0.0 for r in group)
    return {
        "kind": row.kind,
        "graph": graph,
        "module": repeated(row.module) or "top level",
        "count": len(group),
        "members": [[r.module, r.node, r.copy] for r in group[:MEMBERS]],
        "op": row.op.removesuffix(".default"),
        "operand": row.operand,
        "memory": f"{row.dtype}[{_numbers(row.shape)}]",
        "device": row.device,
        "reason": row.reason,
        "rules": list(row.rules),
        "source": row.source,
        "before": _place(row.before),
        "after": None if row.after is None else _place(row.after),
        "order": row.order,
        "bytes": nbytes if priced else None,
        "us": microseconds if priced else None,
        "price": [in_bytes(nbytes), in_microseconds(microseconds)] if priced else None,
        "notes": _notes(row),
        "excerpt": excerpts.number_of(row),
    }


def _copy(graph: str, group: Sequence[Copy], excerpts: Excerpts) -> dict[str, Any]:
    """A copy of the program's own, in the form of the other rows."""
    copy = group[0]
    priced = copy.nbytes is not None
    nbytes = sum(c.nbytes or 0 for c in group)
    microseconds = sum(c.microseconds or 0.0 for c in group)
    return {
        "kind": f"own copy: {copy.verdict}",
        "graph": graph,
        "module": modules_of(group),
        "count": len(group),
        "members": [[c.module, c.node, None] for c in group[:MEMBERS]],
        "op": copy.call,
        "operand": "",
        "memory": f"{copy.dtype}[{_numbers(copy.shape)}]",
        "device": copy.device,
        "reason": copy.proof,
        "rules": [],
        "source": "",
        "before": _place(copy.before),
        "after": None if copy.verdict == NO_OP else _place(copy.after),
        "order": None,
        "bytes": nbytes if priced else None,
        "us": microseconds if priced else None,
        "price": [in_bytes(nbytes), in_microseconds(microseconds)] if priced else None,
        "notes": [],
        "excerpt": excerpts.number_of(copy),
    }


def _place(place: Place) -> dict[str, Any]:
    return {
        "strides": _numbers(place.strides),
        "offset": str(place.offset),
        "alignment": place.alignment,
    }


def _numbers(values: Iterable[int | str]) -> str:
    return ", ".join(map(str, values))


def _notes(row: Row) -> list[str]:
    notes = []
    if row.fused:
        notes.append("the producer's kernel writes the copy")
    if row.write_back:
        notes.append("the op writes to the copy, and what it wrote is put back")
    if row.once:
        notes.append("copied once, while compiling")
    if row.parameter is not None:
        named = "a parameter" if row.parameter == "?" else f"parameter {row.parameter}"
        if row.kind == FIX and not row.once:
            notes.append(f"{named} is copied on every call: contig_pass.prepare copies it once")
        else:
            notes.append(f"the operand is memory of {named}")
    return notes


# -- graphs --------------------------------------------------------------------------------------


def _graphs(report: Report) -> list[dict[str, Any]]:
    if report.listings:
        return [
            {"name": listing.graph, "whole": True, "blocks": _whole(listing.parts)}
            for listing in report.listings
        ]
    if not report.hunks:
        return []
    groups = rolled_up(report.hunks, kind_of_hunk)
    blocks = [
        _block(Block(repeated(hunks[0].module), (hunks[0],)), len(hunks)) for hunks in groups
    ]
    return [{"name": report.graph, "whole": False, "blocks": blocks}]


def _whole(parts: Sequence[Hunk]) -> list[dict[str, Any]]:
    """Blocks in order. Neighbours that are like earlier ones are told in one entry, each by its
    name, the earlier one's number and how many nodes it has."""
    shown: list[dict[str, Any]] = []
    first: dict[Any, int] = {}
    for block in blocks_of(parts):
        kind = kind_of_block(block)
        if kind not in first:
            first[kind] = len(shown)
            shown.append(_block(block, 1))
            continue
        original = shown[first[kind]]
        original["count"] += 1
        if "like" not in shown[-1]:
            shown.append({"like": [], "nodes": 0})
        shown[-1]["like"].append([block.name, first[kind], original["nodes"]])
        shown[-1]["nodes"] += original["nodes"]
    return shown


def _block(block: Block, count: int) -> dict[str, Any]:
    lines = [line for part in block.parts for line in part.lines]
    marks = [mark for mark, _ in lines]
    parts = [[part.module, [mark + line for mark, line in part.lines]] for part in block.parts]
    return {
        "name": block.name,
        "count": count,
        "nodes": len(marks) - min(marks.count("-"), marks.count("+")),
        "changed": len(marks) - marks.count(" "),
        "copies": sum(mark == "+" and _COPY in line for mark, line in lines),
        "parts": parts,
    }
