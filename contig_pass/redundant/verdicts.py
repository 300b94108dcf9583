"""What each copy in an ATen graph is good for. Edits nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from contig_pass.analysis import Use
from contig_pass.callsite import Operand
from contig_pass.contracts.judging import judge
from contig_pass.contracts.target import Target
from contig_pass.facts import fact_of
from contig_pass.inductor.traced import innermost_call
from contig_pass.layout import Layout
from contig_pass.redundant.calls import copying_call
from contig_pass.redundant.trial import Bench, Trial, without
from contig_pass.remedy import remedy_of
from contig_pass.report.copies import NEEDED, REDUNDANT, REMOVED, UNNEEDED, Copy, make_copy

aten = torch.ops.aten
_COPIES = (aten.clone.default, aten._to_copy.default)


@dataclass(frozen=True, eq=False)
class Found:
    """One copy, tried.

    Attributes:
        trial: what would come of the graph without it.
        asked: the user's program calls for a copy there, and it does not come with another call.
    """

    trial: Trial
    asked: bool

    @property
    def without_effect(self) -> bool:
        """Nothing can tell the graph without the copy from the graph with it."""
        return not self.trial.obstacles


def copies_in(graph: fx.Graph) -> list[fx.Node]:
    """Nodes of ``graph`` that copy a tensor and change neither its values nor its type."""
    return [node for node in graph.nodes if node.target in _COPIES and _only_copies(node)]


def try_copies(copies: Iterable[fx.Node], bench: Bench) -> Iterator[Found]:
    """Each of ``copies`` by itself, the others in place."""
    for copy in copies:
        call = innermost_call(copy)
        asked = call is not None and copying_call(call[1]) is not None
        yield Found(without(copy, bench), asked)


def removed_row(found: Found, bench: Bench, target: Target | None) -> Copy:
    """The row of a copy that is about to be taken out."""
    return _row(found, REMOVED, _proof(found.trial), bench, target)


def judged_rows(
    found: Iterable[Found], uses: Sequence[Use], bench: Bench, target: Target | None
) -> list[Copy]:
    """The rows of copies that stay: those without effect, and those that the user asked for.

    Args:
        found: the copies, tried on the graph as it is.
        uses: every use of that graph that a contract binds.
        bench: of that graph.
        target: the device that copies are priced by; ``None``: each tensor's own.
    """
    by_place: dict[tuple[fx.Node, fx.Node], list[Use]] = {}
    for use in uses:
        by_place.setdefault((use.node, use.operand.node), []).append(use)
    rows = []
    for one in found:
        if one.without_effect:
            rows.append(_row(one, REDUNDANT, _proof(one.trial), bench, target))
        elif one.asked:
            verdict, proof = _with_contracts(one.trial, by_place, bench)
            rows.append(_row(one, verdict, proof, bench, target))
    return rows


def _only_copies(node: fx.Node) -> bool:
    source = node.args[0] if node.args else None
    before = source.meta.get("val") if isinstance(source, fx.Node) else None
    after = node.meta.get("val")
    return (
        isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor)
        and before.layout is torch.strided and after.layout is torch.strided
        and before.dtype == after.dtype and before.device == after.device
    )


def _with_contracts(
    trial: Trial, uses: dict[tuple[fx.Node, fx.Node], list[Use]], bench: Bench
) -> tuple[str, str]:
    """Verdict and proof of a copy that something could tell the absence of."""
    answers = []
    for obstacle in trial.obstacles:
        bound = [uses.get((obstacle.node, arg), []) for arg in obstacle.read]
        if not bound or not all(bound):
            return NEEDED, obstacle.words
        for arg, found in zip(obstacle.read, bound, strict=True):
            layout = trial.layout_at(arg, bench.aligned_inputs)
            for use in found:
                kept, words = _without_copy(use, layout)
                if not kept:
                    return NEEDED, words
                answers.append(words)
    return UNNEEDED, "; ".join(dict.fromkeys(answers))


def _without_copy(use: Use, layout: Layout) -> tuple[bool, str]:
    """Whether ``use`` is served without the user's copy, and how, or what is missing."""
    name = f"{use.contract.op.removesuffix('.default')} {use.operand.name}"
    if use.mutated:
        return False, f"{name} is written to"
    broken, unknown = judge(use.rules, layout)
    if not broken and not unknown:
        return True, f"{name} takes what is copied as it is, {layout.describe()}"
    rules = "; ".join(rule.describe() for rule in (*broken, *unknown))
    remedy = remedy_of(layout, use.contract, use.rules, (*broken, *unknown))
    if remedy.helps and remedy.obstacle is None:
        return True, f"the pass itself copies it for {name}, which asks for: {rules}"
    return False, f"{name} asks for: {rules}"


def _proof(trial: Trial) -> str:
    """Why the copy is without effect, in words."""
    readers = [node for node in trial.readers if node.op != "output"]
    others = len(trial.changed) - 1
    lead = "nothing reads it"
    if readers:
        named = ", ".join(dict.fromkeys(_called(node) for node in readers))
        lead = f"what reads it ({named}) gives the same values, to the bit, with the same strides"
    between = f", through {others} value{'s' if others > 1 else ''} in between" if others else ""
    return (
        f"{lead}{between}; it is not returned, and neither it nor what it copies "
        f"({trial.source.name}) is written to"
    )


def _called(node: fx.Node) -> str:
    return str(node.target).removesuffix(".default")


def _row(
    found: Found, verdict: str, proof: str, bench: Bench, target: Target | None
) -> Copy:
    node = found.trial.copy
    call = innermost_call(node)
    op = _called(node)
    name, called = (node.name, op) if call is None else (call[0], _words(call[1]))
    before, after = (
        fact_of(Operand("", None, one, one.meta["val"], ()), bench.aligned_inputs).layout
        for one in (found.trial.source, node)
    )
    return make_copy(
        node, verdict, proof, call=called if found.asked or call is None else f"{called} ({op})",
        name=name, before=before, after=after, target=target,
    )


def _words(target: object) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))
