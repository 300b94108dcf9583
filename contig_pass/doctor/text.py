"""An examination as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from tabulate import tabulate

from contig_pass.doctor.examination import Examination
from contig_pass.doctor.kernels import WORKS, Kernel
from contig_pass.doctor.machine import FOUND, MISSING
from contig_pass.doctor.verify import AGREES, DISAGREES, STRICTER, Idle, Row, Verification
from contig_pass.report.units import in_bytes

_WIDE = 60


def to_text(found: Examination) -> str:
    """Versions, GPU, kernels, hooks and caches; contracts are :func:`verified_text`."""
    return "\n\n".join(
        (
            _facts("versions", found.versions),
            _facts("GPU", found.gpu),
            _kernels(f"attention kernels on {found.device}", found.attention),
            _kernels(f"quantised products on {found.device}", found.quantised),
            _hooks(found),
            _caches(found),
        )
    )


def _facts(title: str, facts: dict[str, str]) -> str:
    return _table(title, facts.items())


def _kernels(title: str, kernels: Sequence[Kernel]) -> str:
    rows = [
        (f"{k.name} {k.version}".strip(), "yes" if k.state == WORKS else "no",
         "" if k.state == WORKS else k.state)
        for k in kernels
    ]
    return _table(title, rows, ("kernel", "works", "why not"), (None, None, _WIDE))


def _hooks(found: Examination) -> str:
    count = sum(hook.state == FOUND for hook in found.hooks)
    lines = [f"private hooks of torch: {count} of {len(found.hooks)} found"]
    lines += [
        f"  {hook.path}: {hook.state}{': ' * bool(hook.consequence)}{hook.consequence}"
        for hook in found.hooks if hook.state != FOUND
    ]
    if any(hook.state == MISSING for hook in found.hooks) or found.self_test:
        lines.append(f"self-test FAILED: {found.self_test}")
    else:
        lines.append("self-test passed")
    return "\n".join(lines)


def _caches(found: Examination) -> str:
    words = {True: "on", False: "off", None: "not in this version"}
    switches = ", ".join(f"{name} {words[on]}" for name, on in found.switches.items())
    rows = [
        (f.name, f.path, f.files if f.exists else "not there", in_bytes(f.nbytes))
        for f in found.folders
    ]
    table = _table("compile caches", rows, ("cache", "folder", "files", "size"))
    return f"{table}\n{switches}"


# -- contracts -----------------------------------------------------------------------------------


def verified_text(found: Verification) -> str:
    """Every layout tried, operand by operand; then what was not tried; then the counts."""
    parts = []
    for (op, variant, operand), group in groupby(
        found.rows, key=lambda row: (row.op, row.variant, row.operand)
    ):
        rows = list(group)
        title = f"{_short(op)} {variant}, {operand}: demanded {'; '.join(rows[0].demanded)}"
        parts.append(
            _table(
                title, map(_row, rows), ("rule broken", "layout tried", "observed", "agrees"),
                (40, None, _WIDE, None),
            )
        )
    if found.idle:
        parts.append(_idle(found.idle))
    parts += [_told(row) for row in found.rows if row.agrees == DISAGREES]
    parts.append(_summary(found))
    return "\n\n".join(parts)


def _short(op: str) -> str:
    return op.removeprefix("aten::").removesuffix(".default")


def _row(row: Row) -> tuple[str, str, str, str]:
    return "; ".join(row.broken) or "none", row.layout, _observed(row), row.agrees


def _observed(row: Row) -> str:
    told = [row.outcome]
    if row.message:
        told.append(f": {row.message}")
    if row.compiled:
        told.append(f"; compiled: {row.compiled}")
    return "".join(told)


def _idle(idle: Sequence[Idle]) -> str:
    rows = [
        (f"{_short(i.op)}, {i.operand}", "; ".join(i.rules), i.reason) for i in idle
    ]
    return _table("not tried here", rows, ("op, operand", "rules", "why"), (45, 45, _WIDE))


def _told(row: Row) -> str:
    kind = f"breaks {'; '.join(row.broken)}" if row.broken else "is legal"
    return (
        f"DISAGREES: {_short(row.op)} {row.variant}, {row.operand}: {row.layout} {kind} by the "
        f"contract [{row.source}], and gave: {_observed(row)}"
    )


def _summary(found: Verification) -> str:
    return (
        f"{len(found.rows)} layouts tried on {found.device} in {found.seconds:.0f} s: "
        f"{found.count(AGREES)} agree, in {found.count(STRICTER)} the contract is stricter than "
        f"this machine and says so, {found.count(DISAGREES)} disagree"
    )


def _table(
    title: str,
    rows: Iterable[Iterable[object]],
    headers: Sequence[str] = (),
    widths: Sequence[int | None] | None = None,
) -> str:
    body = tabulate(
        [tuple(map(str, row)) for row in rows], headers, disable_numparse=True,
        tablefmt="simple" if headers else "plain",
        maxcolwidths=None if widths is None else [*widths],
    )
    return f"{title}\n{body}"
