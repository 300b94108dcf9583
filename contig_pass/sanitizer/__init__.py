"""The contracts in eager mode: every op is checked before its kernel is launched.

On a GPU a kernel that reads from a wrong address fails later, at another line, or not at all. Here
the line that calls it says what is wrong with which operand, and which line made it so::

    with contig_pass.sanitize():
        model(x)

or, for a whole script, ``python -m contig_pass.sanitizer script.py ...``.
"""

from __future__ import annotations

import contextlib
import threading
from typing import Any

from contig_pass.contracts.target import AUTO, parse_target
from contig_pass.errors import OptionError
from contig_pass.sanitizer.checker import MODES, RAISE, Checker
from contig_pass.sanitizer.findings import Finding
from contig_pass.sanitizer.modes import Attention, Ops
from contig_pass.sanitizer.threads import following

__all__ = ["Finding", "Sanitizer", "sanitize"]

#: Bytes up to which an operand of a custom op is compared before and after.
AUDIT_BYTES = 1 << 20


class Sanitizer(contextlib.ContextDecorator):
    """What :func:`sanitize` returns: a context manager, a decorator, and what it has found.

    It acts on the thread that enters it, on backward passes started there, and on the threads that
    are started while it is active. It may be entered by several threads, and more than once.
    """

    def __init__(self, checker: Checker) -> None:
        self._checker = checker
        self._entered = threading.local()

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Everything found so far, each once for a line and operand."""
        return tuple(self._checker.findings)

    def __enter__(self) -> Sanitizer:
        stack = self._on_this_thread()
        stack.enter_context(following(self._on_this_thread))
        stack.enter_context(self._checker.activity())
        self._stacks().append(stack)
        return self

    def __exit__(self, *raised: Any) -> None:
        self._stacks().pop().__exit__(*raised)

    def _on_this_thread(self) -> contextlib.ExitStack:
        """Enter the modes. A thread that is not told to leave takes them with it when it ends."""
        stack = contextlib.ExitStack()
        stack.enter_context(Ops(self._checker))
        stack.enter_context(Attention(self._checker))
        return stack

    def _stacks(self) -> list[contextlib.ExitStack]:
        if not hasattr(self._entered, "stacks"):
            self._entered.stacks = []
        return self._entered.stacks


def sanitize(
    mode: str = RAISE,
    *,
    target: str = AUTO,
    audit_bytes: int = AUDIT_BYTES,
    audit_every: bool = False,
) -> Sanitizer:
    """Check the operands of every op against its contracts, in eager mode, while active.

    Beside broken contracts it finds custom ops (any outside torch's own namespaces) whose kernel
    returns another layout than their fake implementation says or writes to an operand that their
    schema does not declare, and calls of ``scaled_dot_product_attention`` that a layout keeps from
    every fused kernel.

    A function that torch.compile would compile inside the block runs eagerly, since torch.compile
    leaves frames alone under such a mode. Of one that was compiled before, only those ops are seen
    that its code calls through torch's dispatcher. The ops of threads that ran before are not
    seen. Subclasses of Tensor and the kernels of custom ops are looked into.

    Args:
        mode: ``"raise"``: :class:`LayoutViolation` before the kernel is launched (what a custom op
            did is raised after it). ``"warn"``: a warning to the logger ``contig_pass``, once for
            each line and operand. ``"fix"``: warn, and run the op on a fresh copy of the operand;
            what it writes to the copy is put back.
        target: as the option of ``contig_safe``: ``"auto"`` (each tensor's device; CPU tensors are
            judged as a rehearsal for sm90), ``"cpu"``, ``"sm90"``, ...
        audit_bytes: operands of custom ops up to this many bytes are compared before and after a
            call; 0: none, and no fakes are run either.
        audit_every: audit each call of a custom op. By default one call is audited for each way in
            which its operands lie.

    Raises:
        OptionError: a bad mode, target or size.
        LayoutViolation: inside the block, in mode ``raise``; in mode ``fix`` where no copy makes
            the call legal, or a copy would lose what the op writes.
    """
    if mode not in MODES:
        raise OptionError(f"mode={mode!r}: use {', '.join(map(repr, MODES))}")
    if not isinstance(audit_bytes, int) or audit_bytes < 0:
        raise OptionError(f"audit_bytes={audit_bytes!r}: use a number of bytes, 0 for no audit")
    return Sanitizer(Checker(mode, parse_target(target), audit_bytes, audit_every))
