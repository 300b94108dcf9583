"""What one sanitizer knows and does, whichever thread calls it."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from contig_pass.contracts.registry import REGISTRY
from contig_pass.contracts.rules import ROW
from contig_pass.contracts.target import Target
from contig_pass.errors import LayoutViolation
from contig_pass.inductor.ops import contiguous_op
from contig_pass.sanitizer import attention, audit
from contig_pass.sanitizer.calls import EagerCall, Launch, signature
from contig_pass.sanitizer.findings import FAKE, LAYOUT, SLOW, WRITE, Finding
from contig_pass.sanitizer.lines import Caller, caller
from contig_pass.sanitizer.operands import Offence, offences, run_repaired
from contig_pass.sanitizer.sentences import dishonest_fake, offence_found, slow_attention, write
from contig_pass.sanitizer.views import Views

_logger = logging.getLogger("contig_pass")

RAISE, WARN, FIX = "raise", "warn", "fix"
MODES = (RAISE, WARN, FIX)

#: What is done at each call of an op; a foreign one is audited beside being checked.
PLAIN, VIEW, BOUND, FOREIGN, COMPOSITE = range(5)

#: Calls remembered as clean or audited before they are forgotten.
_REMEMBERED = 10_000

#: What a finding is known by at one caller, and how it is put into words.
_Told = tuple[tuple, Callable[[], Finding]]

_SDPA = torch.ops.aten.scaled_dot_product_attention.default


class Checker:
    """Judges calls and keeps what was found.

    Args:
        mode: :data:`RAISE`, :data:`WARN` or :data:`FIX`.
        target: whose demands count; ``None``: each call's own device's.
        audit_bytes: operands of custom ops up to this size are compared before and after.
        audit_every: audit each call of a custom op, not only the first of its kind.
    """

    def __init__(
        self, mode: str, target: Target | None, audit_bytes: int, audit_every: bool
    ) -> None:
        self.mode = mode
        self.target = target
        self.audit_bytes = audit_bytes
        self.audit_every = audit_every
        self.views = Views()
        self.findings: list[Finding] = []
        self.active = 0
        self._lock = threading.Lock()
        self._told: set[tuple] = set()
        self._kinds: dict[Any, int] = {}
        self._table = REGISTRY.table()
        self._clean: set[tuple] = set()
        self._audited: set[tuple] = set()

    @contextlib.contextmanager
    def activity(self) -> Iterator[None]:
        """Until the last such block ends, calls are judged; threads may run on after that."""
        with self._lock:
            self.active += 1
        try:
            yield
        finally:
            with self._lock:
                self.active -= 1

    # -- ops -------------------------------------------------------------------------------------

    def kind(self, op: torch._ops.OpOverload) -> int:
        """What is to be done at a call of ``op``."""
        table = REGISTRY.table()
        if table is not self._table:
            with self._lock:
                self._kinds, self._clean, self._table = {}, set(), table
        kind = self._kinds.get(op)
        if kind is None:
            kind = self._kinds[op] = _kind_of(op)
        return kind

    def call(
        self, op: torch._ops.OpOverload, args: tuple, kwargs: dict[str, Any], launch: Launch
    ) -> Any:
        """Check a call of a bound or foreign op, and have ``launch`` make it."""
        foreign = self.kind(op) == FOREIGN
        key = signature(op, args, kwargs)
        clean = key in self._clean or not REGISTRY.knows(op)
        if clean and not foreign:
            return launch(op, args, kwargs)
        call = EagerCall(op, args, kwargs)
        wrong = [] if clean else list(offences(call, self.target))
        if wrong:
            by = caller()
            self._tell(by, [self._layout(call, offence, by) for offence in wrong])
        elif key is not None:
            self._remember(self._clean, key)
        repairing = wrong and self.mode == FIX

        def run() -> Any:
            if repairing:
                return run_repaired(call, wrong, launch)
            return launch(op, args, kwargs)

        audited = key is not None and key in self._audited and not self.audit_every
        if not foreign or audited or not self.audit_bytes or _capturing():
            return run()
        before = audit.undeclared(call, self.audit_bytes)
        result = run()
        self._tell_audited(call, before, audit.promised(op, args, kwargs), result)
        if key is not None:
            self._remember(self._audited, key)
        return result

    def _layout(self, call: EagerCall, offence: Offence, by: Caller) -> _Told:
        key = (LAYOUT, call.op, offence.tensor.name, offence.broken)
        return key, lambda: offence_found(call, offence, self.views, by)

    def _tell_audited(
        self,
        call: EagerCall,
        before: dict[str, torch.Tensor],
        kept: list[torch.Tensor] | None,
        result: Any,
    ) -> None:
        written = list(audit.written(call, before))
        others = [] if kept is None else list(audit.differences(kept, result))
        if not written and not others:
            return
        by = caller()
        told: list[_Told] = [
            ((WRITE, call.op, name), lambda name=name: write(call, name, by)) for name in written
        ]
        for tensor, promise in others:
            told.append(
                (
                    (FAKE, call.op, promise),
                    lambda t=tensor, promise=promise: dishonest_fake(call, t, promise, by),
                )
            )
        self._tell(by, told)

    # -- attention -------------------------------------------------------------------------------

    def attend(self, attention_op: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Check a call of scaled dot product attention before its kernel is chosen, and make it."""
        call = EagerCall(_SDPA, args, kwargs)
        tensors = [call.given.get(name) for name in attention.OPERANDS]
        given = [tensor for tensor in tensors if tensor is not None]
        plain = len(call.tensors) == len(given) and all(type(t) in _PLAIN for t in given)
        # Autocast may copy the operands before a kernel sees them.
        if not plain or torch.is_autocast_enabled(tensors[0].device.type):
            return attention_op(*args, **kwargs)
        rest = {n: value for n, value in call.given.items() if n not in attention.OPERANDS}
        backend, blamed = attention.chosen(tensors, rest), ()
        if not attention.is_fused(backend):
            blamed = attention.to_blame(tensors, rest)
            if not blamed:  # no fused kernel, however they lie: the slow path takes any layout
                return attention_op(*args, **kwargs)
        wrong = [] if tensors[0].is_cuda else self._composite_offences(call, args, kwargs)
        if not wrong and not blamed:
            return attention_op(*args, **kwargs)
        by = caller()
        told = [self._layout(call, offence, by) for offence in wrong]
        orders = {offence.tensor.name: offence.remedy.order for offence in wrong}
        for name in blamed:
            if name not in orders:
                orders[name] = ROW
                key = (SLOW, call.op, name)
                told.append(
                    (key, lambda n=name: slow_attention(call, n, backend, self.views, by))
                )
        self._tell(by, told)
        if self.mode != FIX:
            return attention_op(*args, **kwargs)
        copies = {n: contiguous_op()(call.given[n], order) for n, order in orders.items()}
        return attention_op(**{**call.given, **copies})

    def _composite_offences(
        self, call: EagerCall, args: tuple, kwargs: dict[str, Any]
    ) -> list[Offence]:
        """What a GPU's kernels would object to. There their own ops are checked, when called."""
        key = signature(_SDPA, args, kwargs)
        if key in self._clean:
            return []
        wrong = [o for o in offences(call, self.target) if o.remedy.obstacle is None]
        if not wrong and key is not None:
            self._remember(self._clean, key)
        return wrong

    # -- telling ---------------------------------------------------------------------------------

    def _tell(self, by: Caller, told: Sequence[_Told]) -> None:
        """Keep what is new; raise the first, or log each once for a caller."""
        fresh = []
        with self._lock:
            for key, sentence in told:
                if (key, by) not in self._told:
                    self._told.add((key, by))
                    fresh.append(sentence())
            self.findings.extend(fresh)
        if self.mode == RAISE:
            finding = told[0][1]()
            others = ", ".join(str(sentence().operand) for _, sentence in told[1:])
            raise LayoutViolation(f"{finding}" + (f" (also wrong: {others})" if others else ""))
        for finding in fresh:
            _logger.warning("%s", finding)

    def _remember(self, known: set[tuple], key: tuple) -> None:
        if len(known) >= _REMEMBERED:
            known.clear()
        known.add(key)


_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


def _capturing() -> bool:
    """Whether a CUDA graph is being recorded, which a look at values would break."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _kind_of(op: torch._ops.OpOverload) -> int:
    if op is _SDPA:
        return COMPOSITE
    if audit.is_foreign(op):
        return FOREIGN
    if REGISTRY.knows(op):
        return BOUND
    schema = op._schema
    if not schema.arguments or "Tensor" not in str(schema.arguments[0].type):
        return PLAIN
    views = (r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    return VIEW if any(views) else PLAIN
