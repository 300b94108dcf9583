"""Symbolic sizes of which more is known than torch has been told."""

from __future__ import annotations

import sympy

from contig_pass.layout import IntLike


def substituted(value: IntLike, symbolic: IntLike, number: int) -> IntLike:
    """``value`` where ``symbolic`` is ``number``; as it is where that leaves it open.

    No guard is added, and no hint is looked at.
    """
    if isinstance(value, int) or isinstance(symbolic, int):
        return value
    settled = value.node.expr.xreplace({symbolic.node.expr: sympy.Integer(number)})
    return int(settled) if settled.is_Integer else value
