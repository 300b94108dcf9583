"""Ops with contracts that Dynamo of this version would leave out of the graph.

torch 2.11 and 2.12 break the graph at ``torch._scaled_mm_v2`` and ``torch._scaled_grouped_mm_v2``
(what ``torch.nn.functional.scaled_mm`` and ``scaled_grouped_mm`` call), so that no pass would ever
see them; 2.12 also at the enums that those take. Later versions take all of them in.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from contig_pass.inductor import hooks

_FUNCTIONS = ("_scaled_mm_v2", "_scaled_grouped_mm_v2")


def install() -> None:
    """Let Dynamo take those functions into graphs, as later versions do."""
    _allow_functions()
    _allow_enums()


def _allow_functions() -> None:
    lookup = hooks.TRACE_RULES.find()
    if lookup is None or not hooks.TRACE_RULES.expected():
        return
    from torch._dynamo.variables import SkipFunctionVariable

    for name in _FUNCTIONS:
        function = getattr(torch, name, None)
        if function is not None and lookup(function) is SkipFunctionVariable:
            torch.compiler.allow_in_graph(function)


def _allow_enums() -> None:
    handlers = hooks.ENUM_HANDLERS.find()
    if handlers is None or not hooks.ENUM_HANDLERS.expected():
        return
    from torch._dynamo.variables import UserDefinedObjectVariable

    def wrapped(tx: object, value: object) -> UserDefinedObjectVariable:
        del tx
        return UserDefinedObjectVariable(value)

    for kind in (F.ScalingType, F.SwizzleType):
        handlers.setdefault(kind, wrapped)
