"""The contract registry: which rules bind which operand of which op, and when.

The registry is the only mutable module-level state of the package. Contracts are frozen; the
registry's digest takes part in the compile caches' keys, so a changed table never meets an
artifact that an older one made.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import marshal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from contig_pass.contracts.rules import Rule
from contig_pass.contracts.target import Target
from contig_pass.errors import ContractError
from contig_pass.layout import Layout


@dataclass(frozen=True, eq=False)
class Call:
    """What is known of one call of an op when contracts are chosen for it.

    Attributes:
        op: the overload called.
        operands: layouts by operand name; tensors in a list argument are ``name[0]``, ``name[1]``.
        args: every argument by name, tensors as given (FX nodes or tensors).
        target: the device whose demands count.
    """

    op: torch._ops.OpOverload
    operands: Mapping[str, Layout]
    args: Mapping[str, Any]
    target: Target


@dataclass(frozen=True)
class When:
    """A condition on a call, with its words."""

    text: str
    holds: Callable[[Call], bool]

    def __and__(self, other: When) -> When:
        return When(
            f"{self.text}, {other.text}", lambda call: self.holds(call) and other.holds(call)
        )


ALWAYS = When("always", lambda call: True)

#: Families decide what policy ``dense`` adds: density of both matrices of a quantised matmul.
SCALED_MM = "scaled matmul"
ATTENTION = "attention"
CUSTOM = "registered op"
CALLS = "kernels and subgraphs called"


@dataclass(frozen=True)
class Contract:
    """The rules of one operand of one op.

    Attributes:
        op: overload, as ``namespace::name.overload``.
        operand: argument name as in the op's schema; for a list argument, of every tensor in it.
        rules: all must hold.
        source: where the demand comes from: documentation, source code or measurement.
        when: condition under which the contract applies.
        family: :data:`SCALED_MM`, :data:`ATTENTION` or :data:`CUSTOM`.
        keep_order: a repairing copy keeps the operand's order of dimensions, because the op's
            result takes its strides from it.
        dense: policy ``dense`` asks for density beyond the rules.
        keep_strides: a repairing copy keeps the operand's strides, because the callee was made
            for them.
    """

    op: str
    operand: str
    rules: tuple[Rule, ...]
    source: str
    when: When = ALWAYS
    family: str = CUSTOM
    keep_order: bool = False
    dense: bool = False
    keep_strides: bool = False

    def describe(self) -> str:
        """The contract in one line."""
        rules = "; ".join(rule.describe() for rule in self.rules)
        return f"{self.op} {self.operand} ({self.when.text}): {rules} [{self.source}]"


@dataclass
class Registry:
    """Contracts by op. Reading is lock-free; changes replace the table as a whole."""

    _table: dict[str, tuple[Contract, ...]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, contract: Contract) -> None:
        """Register ``contract``.

        Raises:
            ContractError: the op or operand does not exist, a rule cannot apply, or a contract
                for the same op, operand and condition stands already.
        """
        _validate(contract)
        with self._lock:
            standing = self._table.get(contract.op, ())
            for other in standing:
                if other.operand == contract.operand and other.when.text == contract.when.text:
                    raise ContractError(
                        f"operand {contract.operand!r} of {contract.op} has a contract already "
                        f"({other.describe()}); call unregister_contract first to replace it"
                    )
            self._table = {**self._table, contract.op: (*standing, contract)}

    def remove(self, op: str, operand: str) -> None:
        """Remove every contract of ``operand`` of ``op``.

        Raises:
            ContractError: there is none.
        """
        with self._lock:
            standing = self._table.get(op, ())
            left = tuple(c for c in standing if c.operand != operand)
            if len(left) == len(standing):
                raise ContractError(f"no contract for operand {operand!r} of {op} to remove")
            table = {**self._table, op: left}
            if not left:
                del table[op]
            self._table = table

    def knows(self, op: torch._ops.OpOverload) -> bool:
        """Whether any contract speaks of ``op``."""
        return op_name(op) in self._table

    def table(self) -> Mapping[str, tuple[Contract, ...]]:
        """Contracts by op; another object after every change."""
        return self._table

    def contracts(self) -> tuple[Contract, ...]:
        """Every contract, in order of registration by op."""
        return tuple(c for group in self._table.values() for c in group)

    def for_call(self, call: Call) -> dict[str, Contract]:
        """The contract of each operand of ``call`` that has one.

        Where several contracts of an operand apply their rules are joined.
        """
        chosen: dict[str, Contract] = {}
        for contract in self._table.get(op_name(call.op), ()):
            for operand in call.operands:
                if operand.split("[")[0] != contract.operand or not contract.when.holds(call):
                    continue
                standing = chosen.get(operand)
                chosen[operand] = contract if standing is None else _join(standing, contract)
        return chosen

    def digest(self) -> str:
        """A hash of every contract, conditions included, for cache keys."""
        text = "\n".join(
            f"{c.describe()}|{c.rules!r}|{c.family}|{c.keep_order}|{c.dense}|{_code(c.when)}"
            for c in self.contracts()
        )
        return hashlib.sha256(text.encode()).hexdigest()

    @contextlib.contextmanager
    def scope(self) -> Iterator[Registry]:
        """Undo, on leaving, whatever was registered or removed inside the ``with`` block."""
        table = self._table
        try:
            yield self
        finally:
            self._table = table


REGISTRY = Registry()


def register_contract(
    op: str | torch._ops.OpOverload | torch._ops.OpOverloadPacket,
    operand: str,
    rules: Sequence[Rule],
    *,
    source: str = "registered by the user",
    when: Callable[[Call], bool] | None = None,
    keep_order: bool = False,
) -> None:
    """State what an op demands of one of its operands.

    Args:
        op: ``"namespace::name"`` or ``"namespace::name.overload"`` (default overload if not
            named), or the op object.
        operand: the argument's name in the op's schema: a Tensor, an optional Tensor, or a list
            of Tensors (then the rules bind each).
        rules: what the operand must satisfy, such as ``[RowMajor(), AlignedPointer(16)]``.
        source: where the demand comes from; reports print it.
        when: called with the :class:`Call`; the contract binds only where it returns True.
        keep_order: set it where the op's result takes its strides from this operand, so that a
            repairing copy keeps the operand's order of dimensions.

    Raises:
        ContractError: unknown op or operand, rules that cannot apply, or a contract that stands
            already.
    """
    condition = ALWAYS
    if when is not None:
        condition = When(getattr(when, "__qualname__", repr(when)), when)
    REGISTRY.add(
        Contract(
            op=op_name(resolve_op(op)),
            operand=operand,
            rules=tuple(rules) if isinstance(rules, Sequence) else (rules,),
            source=source,
            when=condition,
            keep_order=keep_order,
        )
    )


def unregister_contract(
    op: str | torch._ops.OpOverload | torch._ops.OpOverloadPacket, operand: str
) -> None:
    """Remove the contracts of ``operand`` of ``op``; see :func:`register_contract`."""
    REGISTRY.remove(op_name(resolve_op(op)), operand)


def op_name(op: torch._ops.OpOverload) -> str:
    """``namespace::name.overload`` of an overload."""
    return f"{op._schema.name}.{op._overloadname}"


def resolve_op(
    op: str | torch._ops.OpOverload | torch._ops.OpOverloadPacket,
) -> torch._ops.OpOverload:
    """The overload that ``op`` means; see :func:`register_contract`.

    Raises:
        ContractError: no such op or overload.
    """
    if isinstance(op, torch._ops.OpOverload):
        return op
    if isinstance(op, torch._ops.OpOverloadPacket):
        return _default_overload(op, str(op))
    namespace, _, rest = str(op).partition("::")
    name, _, overload = rest.partition(".")
    if not rest or not namespace.isidentifier():
        raise ContractError(
            f"op {op!r}: name it as 'namespace::name' or 'namespace::name.overload'"
        )
    packet = getattr(getattr(torch.ops, namespace), name, None) if name.isidentifier() else None
    if packet is None or not isinstance(packet, torch._ops.OpOverloadPacket):
        raise ContractError(f"unknown op {op!r}{_similar_ops(namespace, name)}")
    if not overload:
        return _default_overload(packet, op)
    if overload not in packet.overloads():
        raise ContractError(
            f"op {namespace}::{name} has no overload {overload!r}; "
            f"it has {', '.join(packet.overloads())}"
        )
    return getattr(packet, overload)


def _default_overload(packet: torch._ops.OpOverloadPacket, asked: str) -> torch._ops.OpOverload:
    overloads = packet.overloads()
    if "default" in overloads:
        return packet.default
    raise ContractError(f"op {asked!r} has no default overload; name one of {', '.join(overloads)}")


def _similar_ops(namespace: str, name: str) -> str:
    prefix = f"{namespace}::"
    registered = torch._C._dispatch_get_all_op_names()
    names = {n.removeprefix(prefix).split(".")[0] for n in registered if n.startswith(prefix)}
    if not names:
        return f": import the package that registers ops in namespace {namespace!r}"
    close = difflib.get_close_matches(name, sorted(names), n=3)
    return f"; did you mean {' or '.join(prefix + c for c in close)}?" if close else ""


def tensor_operands(op: torch._ops.OpOverload) -> dict[str, bool]:
    """Tensor arguments of ``op`` by name, and whether each is a list of tensors."""
    found = {}
    for argument in op._schema.arguments:
        kind = str(argument.type)
        if "Tensor" in kind:
            found[argument.name] = "List" in kind or "[]" in kind
    return found


def _validate(contract: Contract) -> None:
    op = resolve_op(contract.op)
    operands = tensor_operands(op)
    if contract.operand not in operands:
        named = {argument.name for argument in op._schema.arguments}
        why = "is not a tensor" if contract.operand in named else "does not exist"
        raise ContractError(
            f"operand {contract.operand!r} of {contract.op} {why}; "
            f"its tensor operands are {', '.join(operands) or 'none'}"
        )
    if not contract.rules:
        raise ContractError(f"contract of {contract.op} {contract.operand}: no rules given")
    for rule in contract.rules:
        if not isinstance(rule, Rule):
            raise ContractError(
                f"contract of {contract.op} {contract.operand}: {rule!r} is not a rule; "
                "give instances such as RowMajor() or AlignedPointer(16)"
            )
    orders = {rule.order for rule in contract.rules if rule.order is not None}
    if len(orders) > 1:
        raise ContractError(
            f"contract of {contract.op} {contract.operand}: no layout can be "
            f"{' and '.join(sorted(orders))}-major at once"
        )


def _join(first: Contract, second: Contract) -> Contract:
    extra = tuple(rule for rule in second.rules if rule not in first.rules)
    source = first.source if second.source == first.source else f"{first.source}; {second.source}"
    return replace(
        first,
        rules=first.rules + extra,
        source=source,
        keep_order=first.keep_order or second.keep_order,
        dense=first.dense or second.dense,
    )


def _code(when: When) -> str:
    """The condition's compiled code, the same in every process that runs the same source."""
    code = getattr(when.holds, "__code__", None)
    return type(when.holds).__qualname__ if code is None else marshal.dumps(code).hex()
