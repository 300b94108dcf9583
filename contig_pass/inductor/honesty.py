"""An op whose kernel returned other strides than its fake promised, told in one line.

Inductor checks the strides of every opaque op's results when the graph runs.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

from contig_pass.errors import LayoutViolation

#: Inductor's option for that check.
SIZE_ASSERTS = "size_asserts"
_OP = re.compile(r"Error in op: (?:torch\.ops\.)?(?P<op>\S+)")


def told_plainly(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """``compiled``, raising :class:`LayoutViolation` where such a check fails."""

    @functools.wraps(compiled)
    def run(*args: Any) -> Any:
        try:
            return compiled(*args)
        except AssertionError as error:
            found = _OP.search(str(error))
            if found is None:
                raise
            op = found["op"].replace(".", "::", 1)
            what = str(error).splitlines()[0]
            raise LayoutViolation(
                f"{op} returned another layout than its fake implementation says: {what} "
                "(real==fake); correct the fake, or make the kernel return what it says"
            ) from error

    return run
