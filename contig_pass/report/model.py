"""One Report object; every renderer and every file is made from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from torch import fx

from contig_pass.analysis import Analysis, Use
from contig_pass.cost import bandwidth_of
from contig_pass.plan import Fix, Plan, Skip
from contig_pass.preparing.cases import rules_in_words
from contig_pass.preparing.savings import preparable_bytes
from contig_pass.provenance import origin_of
from contig_pass.report.copies import Copy
from contig_pass.report.place import Place, plain

#: Version of the JSON form of a report.
SCHEMA_VERSION = 4

FIX = "fix"
SKIP = "skip"


@dataclass(frozen=True)
class Row:
    """One fix or skip: what, where, why and at what price.

    Attributes:
        kind: ``"fix"`` or ``"skip"``.
        reason: the demand that is not met, or why the use is left alone.
        rules: the rules that are broken or cannot be proved.
        source: where the contract comes from.
        op, operand, node: the use: op and operand name, and the consumer's name in the graph.
        dtype, shape, device: of the operand.
        before, after: its memory; ``after`` is ``None`` for a skip.
        order: order of the copy; ``None`` for a skip.
        copy: name of the inserted node; rows with equal names share one copy.
        nbytes: bytes read plus written for this copy; 0 for a row that shares another's;
            ``None`` if symbolic or a skip.
        microseconds: modelled time for them; likewise.
        fused: the copy is written by its producer's kernel.
        write_back: the op writes to the copy, and what it wrote is put back.
        parameter: dotted name of the parameter or buffer whose memory the operand is, and a fix
            copies on every call; ``"?"`` if its name is not known; ``None`` if it is none.
        once: the copy is made once, while compiling, and not on every call.
        module: dotted path of the module in the user's program.
        file, lineno, code: the user's source line.
    """

    kind: str
    reason: str
    rules: tuple[str, ...]
    source: str
    op: str
    operand: str
    node: str
    dtype: str
    shape: tuple[int | str, ...]
    device: str
    before: Place
    after: Place | None
    order: str | None
    copy: str | None
    nbytes: int | None
    microseconds: float | None
    fused: bool
    write_back: bool
    parameter: str | None
    once: bool
    module: str
    file: str
    lineno: int
    code: str


@dataclass(frozen=True)
class Hunk:
    """The graph around one fix: lines of the graph, each behind ``" "``, ``"-"`` or ``"+"``.

    Attributes:
        module: dotted path of the module of the first use.
        lines: (mark, text) pairs.
    """

    module: str
    lines: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Listing:
    """A whole graph before and after, for a report that shows it.

    Attributes:
        graph: the graph's name.
        parts: its nodes in order, one part for each run of nodes of one module. A node that
            changed has two lines: ``"-"`` as it was and ``"+"`` as it is.
    """

    graph: str
    parts: tuple[Hunk, ...]


@dataclass(frozen=True)
class Totals:
    """Sums over a report.

    Attributes:
        nodes: nodes of the graph before the pass.
        uses: uses that a contract binds.
        clean: uses that were legal already.
        fixes: copies inserted.
        fixed_uses: uses that read them.
        skips: uses left alone with a reason.
        pins: values that the compiler is held to the layout of.
        checks: values from opaque ops whose address is looked at when the graph runs.
        preparable: bytes a call that ``prepare`` would save: of copies that another layout of a
            parameter or buffer spares, unless something outside the graph keeps it as it lies.
        nbytes: bytes read plus written by the copies, where known.
        microseconds: modelled time of the copies, where known.
    """

    nodes: int
    uses: int
    clean: int
    fixes: int
    fixed_uses: int
    skips: int
    pins: int
    checks: int
    preparable: int
    nbytes: int
    microseconds: float


@dataclass(frozen=True)
class Report:
    """What was found and done in one compiled graph (or, merged, in several).

    Attributes:
        graph: name of the graph, such as ``"model__0_inference_0"``.
        policy: the policy it was planned under.
        targets: devices whose demands counted, such as ``("sm90",)``.
        bandwidth: what the modelled times rest on.
        totals: sums.
        rows: every fix and every skip.
        hunks: the graph diff.
        seconds: time that analysis, plan and rewrite took.
        cached: the graph came out of a compile cache; the report is that of the compile that put
            it there.
        listings: the whole graph, kept by ``explain`` and for a report that ends in ``.html``.
        copies: what becomes of every copy that the user's program asks for, and of others that
            are without effect.
    """

    graph: str
    policy: str
    targets: tuple[str, ...]
    bandwidth: str
    totals: Totals
    rows: tuple[Row, ...]
    hunks: tuple[Hunk, ...]
    seconds: float = 0.0
    cached: bool = False
    listings: tuple[Listing, ...] = ()
    copies: tuple[Copy, ...] = ()

    @property
    def fixes(self) -> tuple[Row, ...]:
        """The rows that are fixes."""
        return tuple(row for row in self.rows if row.kind == FIX)

    @property
    def skips(self) -> tuple[Row, ...]:
        """The rows that are skips."""
        return tuple(row for row in self.rows if row.kind == SKIP)

    @property
    def clean(self) -> bool:
        """Nothing was broken and nothing was inserted."""
        return not self.rows

    def __str__(self) -> str:
        from contig_pass.report.text import to_text

        return to_text(self)


def make_report(
    name: str,
    analysis: Analysis,
    plan: Plan,
    copies: dict[Fix, fx.Node],
    hunks: tuple[Hunk, ...],
    seconds: float,
    parameters: Mapping[str, str] = MappingProxyType({}),
    listings: tuple[Listing, ...] = (),
    user_copies: Sequence[Copy] = (),
) -> Report:
    """The report of one graph after its plan was carried out.

    Args:
        name: the graph's name.
        analysis: what was found.
        plan: what was decided.
        copies: the node that each fix became.
        hunks: the graph diff.
        seconds: time that the pass took.
        parameters: names of the parameters by the names of their placeholders.
        listings: the whole graph, where that is wanted.
        user_copies: what becomes of the copies in the user's own program.
    """
    rows = [
        row
        for fix in plan.fixes
        for row in _fix_rows(fix, copies[fix].name, parameters.get(fix.uses[0].fact.root.name))
    ]
    rows += [
        _skip_row(skip, parameters.get(skip.use.fact.root.name)) for skip in plan.skips
    ]
    targets = sorted({use.target.name: use.target for use in analysis.uses}.items())
    totals = Totals(
        nodes=analysis.nodes,
        uses=len(analysis.uses),
        clean=sum(use.clean for use in analysis.uses),
        fixes=len(plan.fixes),
        fixed_uses=sum(len(fix.uses) for fix in plan.fixes),
        skips=len(plan.skips),
        pins=len(plan.pins),
        checks=len(plan.checks),
        preparable=preparable_bytes(analysis, plan, parameters),
        nbytes=sum(fix.nbytes or 0 for fix in plan.fixes),
        microseconds=sum(fix.microseconds or 0.0 for fix in plan.fixes),
    )
    return Report(
        graph=name,
        policy=plan.policy,
        targets=tuple(target_name for target_name, _ in targets),
        bandwidth="; ".join(
            f"{target_name}: {bandwidth_of(target).describe()}" for target_name, target in targets
        ),
        totals=totals,
        rows=tuple(rows),
        hunks=hunks,
        seconds=seconds,
        listings=listings,
        copies=tuple(user_copies),
    )


def merge(reports: list[Report]) -> Report:
    """Several graphs' reports as one; sums add up, rows follow each other.

    Raises:
        ValueError: no reports given.
    """
    if not reports:
        raise ValueError("merge needs at least one report")
    if len(reports) == 1:
        return reports[0]
    sums = {
        name: sum(getattr(report.totals, name) for report in reports)
        for name in Totals.__dataclass_fields__
    }
    first = reports[0]
    return replace(
        first,
        graph=", ".join(report.graph for report in reports),
        targets=tuple(sorted({t for report in reports for t in report.targets})),
        bandwidth="; ".join(dict.fromkeys(r.bandwidth for r in reports if r.bandwidth)),
        totals=Totals(**sums),
        rows=tuple(row for report in reports for row in report.rows),
        hunks=tuple(hunk for report in reports for hunk in report.hunks),
        seconds=sum(report.seconds for report in reports),
        listings=tuple(listing for report in reports for listing in report.listings),
        copies=tuple(copy for report in reports for copy in report.copies),
    )


def _fix_rows(fix: Fix, copy: str, parameter: str | None) -> list[Row]:
    rows = []
    for position, use in enumerate(fix.uses):
        first = position == 0
        rows.append(
            _row(
                FIX,
                use,
                reason="; ".join(rules_in_words(use)),
                after=Place.of(fix.after),
                order=fix.order,
                copy=copy,
                nbytes=fix.nbytes if first else 0,
                microseconds=fix.microseconds if first else 0.0,
                fused=fix.fused,
                write_back=fix.write_back,
                parameter=parameter,
            )
        )
    return rows


def _skip_row(skip: Skip, parameter: str | None) -> Row:
    return _row(SKIP, skip.use, reason=skip.reason, parameter=parameter)


def _row(
    kind: str,
    use: Use,
    *,
    reason: str,
    after: Place | None = None,
    order: str | None = None,
    copy: str | None = None,
    nbytes: int | None = None,
    microseconds: float | None = None,
    fused: bool = False,
    write_back: bool = False,
    parameter: str | None = None,
) -> Row:
    layout = use.fact.layout
    origin = origin_of(use.node)
    return Row(
        kind=kind,
        reason=reason,
        rules=tuple(rule.describe() for rule in (*use.broken, *use.unknown)),
        source=use.contract.source,
        op=use.contract.op,
        operand=use.operand.name,
        node=use.node.name,
        dtype=str(layout.dtype).removeprefix("torch."),
        shape=plain(layout.shape),
        device=str(layout.device),
        before=Place.of(layout),
        after=after,
        order=order,
        copy=copy,
        nbytes=nbytes,
        microseconds=microseconds,
        fused=fused,
        write_back=write_back,
        parameter=parameter,
        once=False,
        module=origin.module,
        file=origin.file,
        lineno=origin.lineno,
        code=origin.code,
    )
