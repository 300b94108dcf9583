"""What ``prepare`` did, as a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from contig_pass.analysis import Use
from contig_pass.contracts.rules import order_name
from contig_pass.contracts.target import target_of
from contig_pass.cost import bandwidth_of
from contig_pass.layout import FRESH_ALIGNMENT, dense_strides
from contig_pass.options import Options
from contig_pass.preparing.cases import Case
from contig_pass.provenance import origin_of
from contig_pass.report.model import FIX, SKIP, Place, Report, Row, Totals

#: Operand and op of a row where no use is known.
_WHOLE = "parameter"


@dataclass(eq=False)
class Outcome:
    """What was done about one case.

    Attributes:
        rows: for the report.
        fixed: uses that are repaired.
    """

    rows: list[Row] = field(default_factory=list)
    fixed: int = 0


def fix_rows(
    case: Case, options: Options, wrong: tuple[str, ...], order: tuple[int, ...]
) -> list[Row]:
    tensor = case.group.tensor
    after = Place(dense_strides(tuple(tensor.shape), order), 0, FRESH_ALIGNMENT)
    nbytes = 2 * tensor.numel() * tensor.element_size()
    target = case.target or options.target or target_of(tensor.device)
    priced = {"nbytes": nbytes, "microseconds": bandwidth_of(target).microseconds(nbytes)}
    rows = []
    for name in case.group.members:
        first = name == case.group.name
        reason = "; ".join(wrong) if first else f"same memory as {case.group.name}"
        row = _row(case, FIX, name, reason, wrong)
        price = priced if first else {"nbytes": 0, "microseconds": 0.0}
        rows.append(replace(row, after=after, order=order_name(order), copy=name, **price))
    return rows


def skip_row(case: Case, wrong: tuple[str, ...], reason: str, use: Use | None = None) -> Row:
    return _row(case, SKIP, case.group.name, reason, wrong, use)


def _row(
    case: Case, kind: str, name: str, reason: str, wrong: tuple[str, ...], use: Use | None = None
) -> Row:
    """A row about the tensor as a whole; op, operand and line are those of its first use."""
    tensor = case.group.tensor
    use = use or next(iter((*case.open_uses, *case.uses)), None)
    # A subclass may have none of its own; then a part of it is what is read.
    layout = case.group.layout() or use.fact.layout  # type: ignore[union-attr]
    origin = origin_of(use.node) if use is not None else None
    rules = (word.removeprefix("not ").removeprefix("cannot be proved ") for word in wrong)
    # An address says nothing to a reader; where the tensor starts in its storage does.
    offset = tensor.storage_offset() * tensor.dtype.itemsize if case.group.plain else 0
    return Row(
        kind=kind,
        reason=reason,
        rules=tuple(dict.fromkeys(rules)),
        source=use.contract.source if use is not None else "Inductor realigns inputs to 16 bytes",
        op=use.contract.op if use is not None else _WHOLE,
        operand=use.operand.name if use is not None else _WHOLE,
        node=use.node.name if use is not None else "",
        dtype=str(tensor.dtype).removeprefix("torch."),
        shape=tuple(tensor.shape),
        device=str(tensor.device),
        before=replace(Place.of(layout), offset=offset),
        after=None,
        order=None,
        copy=None,
        nbytes=None,
        microseconds=None,
        fused=False,
        write_back=False,
        parameter=name,
        once=kind == FIX,
        module=name.rpartition(".")[0],
        file=origin.file if origin is not None else "",
        lineno=origin.lineno if origin is not None else 0,
        code=origin.code if origin is not None else "",
    )


def report_of(
    options: Options, cases: Sequence[Case], outcomes: Sequence[Outcome], nodes: int,
    seconds: float,
) -> Report:
    rows = tuple(row for outcome in outcomes for row in outcome.rows)
    fixes = [row for row in rows if row.kind == FIX]
    targets = {use.target.name: use.target for case in cases for use in case.uses}
    # Without a program each tensor is one use: of itself.
    alone = sum(case.alone for case in cases)
    uses = alone or sum(len(case.uses) for case in cases)
    return Report(
        graph="prepare",
        policy=options.policy,
        targets=tuple(sorted(targets)),
        bandwidth="; ".join(
            f"{name}: {bandwidth_of(targets[name]).describe()}" for name in sorted(targets)
        ),
        totals=Totals(
            nodes=nodes,
            uses=uses,
            clean=uses - (len(rows) if alone else sum(len(case.open_uses) for case in cases)),
            fixes=len(fixes),
            fixed_uses=sum(outcome.fixed for outcome in outcomes),
            skips=len(rows) - len(fixes),
            pins=0,
            checks=0,
            preparable=0,
            nbytes=sum(row.nbytes or 0 for row in fixes),
            microseconds=sum(row.microseconds or 0.0 for row in fixes),
        ),
        rows=rows,
        hunks=(),
        seconds=seconds,
    )
