"""Where a graph reads a parameter's memory, and what is wrong with that as it lies."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import fx

from contig_pass.analysis import Analysis, Use
from contig_pass.contracts.judging import judge, objections
from contig_pass.contracts.rules import AlignedPointer, Dense, NoOverlap, Rule
from contig_pass.contracts.target import Target
from contig_pass.layout import ABSOLUTE, INPUT_ALIGNMENT, Layout
from contig_pass.plan import CONTRACT, make_plan
from contig_pass.preparing.graphs import Traced
from contig_pass.preparing.memory import Group, has_memory

_POINTER = AlignedPointer(INPUT_ALIGNMENT)


@dataclass(frozen=True, eq=False)
class Site:
    """One placeholder of one graph that stands for a tensor."""

    traced: Traced
    node: fx.Node

    @property
    def realigned(self) -> bool:
        """Whether the tensor is copied whole at each call, for its address alone."""
        tensor = self.traced.tensors[self.node]
        lies = has_memory(tensor) and tensor.data_ptr() % INPUT_ALIGNMENT != 0
        return lies and self.node in self.traced.reached

    @property
    def uses(self) -> Sequence[Use]:
        """Bound uses of the tensor's memory."""
        return self.traced.uses.get(self.node, ())


@dataclass(eq=False)
class Case:
    """One group and every use that is known of it.

    Attributes:
        group: the tensors.
        sites: where they are read.
        alone: judge the tensor by itself, whatever the program does.
        unfollowed: a graph reads one of them as something that cannot be told.
    """

    group: Group
    sites: tuple[Site, ...] = ()
    alone: bool = False
    unfollowed: bool = False

    @functools.cached_property
    def uses(self) -> list[Use]:
        return [use for site in self.sites for use in site.uses]

    @property
    def target(self) -> Target | None:
        return next((use.target for use in self.uses), None)

    def real(self, use: Use) -> Use:
        """``use`` judged by the tensor's real address."""
        tensor, layout = self.group.tensor, use.fact.layout
        if not has_memory(tensor):
            return use
        offset = tensor.data_ptr() + layout.byte_offset
        return judged_as(use, replace(layout, byte_offset=offset, base_alignment=ABSOLUTE))

    @functools.cached_property
    def open_uses(self) -> list[Use]:
        """Uses that are not clean, by the real address or as a compiled graph takes it."""
        return [use for use in self.uses if not use.clean or not self.real(use).clean]

    def wrong(self) -> tuple[str, ...]:
        """What is wrong, in words, each once."""
        words = []
        if any(site.realigned for site in self.sites):
            words.append(f"not {_POINTER.describe()}")
        for use in self.open_uses:
            for judged in (self.real(use), use):
                words += rules_in_words(judged)
        layout = self.group.layout()
        if layout is not None and (self.alone or self.unfollowed):
            rules: tuple[Rule, ...] = (_POINTER, NoOverlap(), Dense())
            words += [f"not {r.describe()}" for r in rules if r.check(layout) is False]
        return tuple(dict.fromkeys(words))


def cases_of(groups: Sequence[Group], traced: Sequence[Traced]) -> Iterator[Case]:
    sites: dict[int, list[Site]] = {}
    for graph in traced:
        for node, tensor in graph.tensors.items():
            sites.setdefault(id(tensor), []).append(Site(graph, node))
    unfollowed = {id(tensor) for graph in traced for tensor in graph.unfollowed}
    for group in groups:
        members = [id(tensor) for tensor in group.members.values()]
        found = tuple(site for member in members for site in sites.get(member, ()))
        yield Case(group, found, unfollowed=not unfollowed.isdisjoint(members))


def rules_in_words(use: Use) -> list[str]:
    """What a use's rules object to."""
    return objections(use.broken, use.unknown)


def judged_as(use: Use, layout: Layout) -> Use:
    """``use`` with ``layout`` for its operand."""
    broken, unknown = judge(use.rules, layout)
    return replace(
        use,
        fact=replace(use.fact, layout=layout),
        broken=broken,
        unknown=unknown,
    )


def is_copied(use: Use) -> bool:
    """Whether a compiled graph makes a copy for ``use`` at each call."""
    analysis = Analysis((use,), 1)
    return bool(make_plan(analysis, CONTRACT, pinning=False).fixes)
