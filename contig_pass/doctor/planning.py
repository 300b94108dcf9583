"""Which layouts of which operands are tried, and what the contracts say of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from contig_pass.contracts.judging import judge
from contig_pass.contracts.registry import Call, Contract, Registry, op_name
from contig_pass.contracts.rules import Multiple, Rule
from contig_pass.doctor.layouts import Lie, lies
from contig_pass.doctor.programs import Arguments, Program, tensors

DENSE = "dense, aligned"
EVERY = "(all)"


@dataclass(frozen=True)
class Trial:
    """One layout of one operand of one program.

    Attributes:
        operand: which, or :data:`EVERY` where all lie as they should.
        words: the layout.
        lie: how the operand lies; ``None``: as the program makes it.
        sizes: of the program, where others than its own are tried.
        demanded: the rules of the operand's contracts, in words.
        broken: those that the layout breaks, in words; none: it is legal.
        source: where the demands come from.
    """

    operand: str
    words: str
    lie: Lie | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    demanded: tuple[str, ...] = ()
    broken: tuple[str, ...] = ()
    source: str = ""

    @property
    def legal(self) -> bool:
        return not self.broken


@dataclass(frozen=True)
class Plan:
    """What to try of one program on one device.

    Attributes:
        trials: in order.
        bound: positions in the registry of the contracts that bind the call.
        rules: (position, rule's position in the contract) of the rules that some trial breaks.
    """

    trials: tuple[Trial, ...]
    bound: frozenset[int]
    rules: frozenset[tuple[int, int]]


def plan(program: Program, device: torch.device, registry: Registry) -> Plan:
    """Run ``program`` once as it should be, then plan its trials.

    Raises:
        Exception: whatever the op raises if it does not run here.
    """
    given = program.arguments(device, {})
    program.run(given)
    synchronise(device)
    call = program.call(given, {})
    chosen = registry.for_call(call)
    bound = {
        number: contract
        for number, contract in enumerate(registry.contracts())
        if any(_binds(contract, call, operand) for operand in chosen)
    }
    values = dict(tensors(given))
    trials = [_dense_trial(call, chosen)]
    for operand, contract in chosen.items():
        if program.operands is None or operand.split("[")[0] in program.operands:
            trials += _trials(values[operand], operand, contract)
            trials += _size_trials(program, device, operand, contract)
    broken = {
        (number, position)
        for number, contract in bound.items()
        for position, rule in enumerate(contract.rules)
        if any(
            rule.describe() in t.broken
            for t in trials if t.operand.split("[")[0] == contract.operand
        )
    }
    return Plan(tuple(trials), frozenset(bound), frozenset(broken))


def synchronise(device: torch.device) -> None:
    """Wait for the device; errors of kernels that run by themselves surface here."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _binds(contract: Contract, call: Call, operand: str) -> bool:
    named = operand.split("[")[0] == contract.operand
    return named and contract.op == op_name(call.op) and contract.when.holds(call)


def _dense_trial(call: Call, chosen: Mapping[str, Contract]) -> Trial:
    """Every operand as its contract should have it."""
    broken: list[Rule] = []
    for operand, contract in chosen.items():
        broken += judge(contract.rules, call.operands[operand])[0]
    rules = {rule.describe(): None for c in chosen.values() for rule in c.rules}
    sources = "; ".join(dict.fromkeys(c.source for c in chosen.values()))
    return Trial(
        EVERY, DENSE, demanded=tuple(rules), source=sources,
        broken=tuple(dict.fromkeys(rule.describe() for rule in broken)),
    )


def _trials(value: torch.Tensor, operand: str, contract: Contract) -> Iterator[Trial]:
    seen = {(tuple(value.stride()), 0)}
    for lie in lies(value, contract.rules):
        if (lie.strides, lie.offset) in seen:
            continue
        seen.add((lie.strides, lie.offset))
        # A rule of the user's that cannot tell of real memory is taken to be broken by it.
        breaks = sum(judge(contract.rules, lie.layout(value)), ())
        yield _trial(operand, lie.words, contract, breaks, lie=lie)


def _size_trials(
    program: Program, device: torch.device, operand: str, contract: Contract
) -> Iterator[Trial]:
    """Sizes that are no multiple of what is demanded, and one that is."""
    names = program.dims.get(operand, ())
    for rule in contract.rules:
        if not isinstance(rule, Multiple) or not names:
            continue
        name = names[rule.dim]
        for more in (rule.n // 2, rule.n):
            size = program.sizes[name] + more
            given = program.arguments(device, {name: size})
            layout = program.call(given, {}).operands[operand]
            breaks = judge(contract.rules, layout)[0]
            words = f"size of dim {rule.dim} is {size}"
            yield _trial(operand, words, contract, breaks, sizes={name: size})


def _trial(
    operand: str,
    words: str,
    contract: Contract,
    breaks: tuple[Rule, ...],
    lie: Lie | None = None,
    sizes: Mapping[str, int] | None = None,
) -> Trial:
    return Trial(
        operand, words, lie, sizes or {},
        demanded=tuple(rule.describe() for rule in contract.rules),
        broken=tuple(rule.describe() for rule in breaks),
        source=contract.source,
    )


def arguments_of(
    program: Program, trial: Trial, device: torch.device
) -> tuple[Arguments, dict[str, torch.Tensor]]:
    """A trial's arguments before its operand is planted, and its tensors by name."""
    given = program.arguments(device, trial.sizes)
    return given, dict(tensors(given))
