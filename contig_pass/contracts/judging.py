"""Hold rules against a layout: which are broken, which cannot be decided."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from contig_pass.contracts.rules import Rule
from contig_pass.layout import Layout


def judge(rules: Iterable[Rule], layout: Layout) -> tuple[tuple[Rule, ...], tuple[Rule, ...]]:
    """The rules that ``layout`` breaks, and those that cannot be decided statically."""
    # An empty operand is never read, so any layout of it is legal.
    empty = layout.is_empty() is True
    answers = {} if empty else {rule: rule.check(layout) for rule in rules}
    broken = tuple(rule for rule, holds in answers.items() if holds is False)
    return broken, tuple(rule for rule, holds in answers.items() if holds is None)


def objections(broken: Sequence[Rule], unknown: Sequence[Rule] = ()) -> list[str]:
    """What the rules object to, in words."""
    told = [f"not {rule.describe()}" for rule in broken]
    return told + [f"cannot be proved {rule.describe()}" for rule in unknown]
