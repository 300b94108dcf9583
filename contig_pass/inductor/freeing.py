"""Buffers whose memory is given back when it was read last, but that no other buffer takes over.

Inductor knows memory that may be taken over and memory that is kept until the graph returns. What
an opaque op allocated may start anywhere, so no buffer that is to start aligned may take it over;
kept to the end, though, the results of all such ops would lie in memory at once.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from contig_pass.inductor.hooks import FREE_LINE, FREEING

#: Attribute of Inductor's graph: names of the buffers that are kept apart.
_APART = "_contig_pass_apart"


def keep_apart(names: Iterable[str]) -> None:
    """Let no buffer of the graph being lowered take over the memory of these."""
    from torch._inductor.virtualized import V

    apart = V.graph.__dict__.setdefault(_APART, set())
    apart.update(names)
    V.graph.never_reuse_buffers.update(apart)


def install() -> None:
    """Teach Inductor's wrapper to free them. Called once a process."""
    free, line = FREEING.find(), FREE_LINE.find()
    if free is None or line is None:
        return  # told by the self-test; the memory is kept

    @functools.wraps(free)
    def codegen_free(self: Any, buffer: Any) -> None:
        from torch._inductor.virtualized import V

        apart = V.graph.__dict__.get(_APART, ())
        if buffer.get_name() in apart and not V.graph.cpp_wrapper:
            self.writeline(line(self, buffer))
        else:
            free(self, buffer)

    from torch._inductor.codegen.wrapper import PythonWrapperCodegen

    PythonWrapperCodegen.codegen_free = codegen_free  # type: ignore[method-assign]
