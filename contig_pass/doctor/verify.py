"""``contig-pass doctor --verify``: every contract against the device at hand.

For each operand that a contract binds, legal and illegal layouts are made on purpose, and each is
tried in a process of its own. A legal one must give the right value. An illegal one must not, in
eager mode or compiled, unless the contract itself says that it is stricter than some kernels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from contig_pass.contracts.calls import SUBGRAPH, SUBGRAPH_RESULT, TRITON_KERNEL
from contig_pass.contracts.registry import REGISTRY, Contract, Registry
from contig_pass.doctor import processes
from contig_pass.doctor.catalogue import catalogue
from contig_pass.doctor.errors import DoctorError
from contig_pass.doctor.planning import Trial, plan
from contig_pass.doctor.processes import CRASH, FAILED, TIMEOUT, Ended
from contig_pass.doctor.programs import Program
from contig_pass.doctor.stricter import stricter
from contig_pass.doctor.trial import RIGHT, Observed, observe, refused
from contig_pass.inductor.examining import import_compiler

AGREES, STRICTER, DISAGREES = "yes", "stricter", "NO"


@dataclass(frozen=True)
class Row:
    """One layout of one operand, and what came of it.

    Attributes:
        op, variant: the program.
        operand: which.
        demanded: the rules of its contracts.
        layout: what was tried.
        broken: the rules that it breaks; none: it is legal.
        outcome, message: in eager mode.
        compiled, compiled_message: what tracing and Inductor made of it, where that was looked at.
        agrees: :data:`AGREES`, :data:`STRICTER` or :data:`DISAGREES`.
        source: where the demand comes from; of a stricter one, what its contract says of it.
    """

    op: str
    variant: str
    operand: str
    demanded: tuple[str, ...]
    layout: str
    broken: tuple[str, ...]
    outcome: str
    message: str
    compiled: str
    compiled_message: str
    agrees: str
    source: str


@dataclass(frozen=True)
class Idle:
    """A contract, or one rule of it, that was not tried here.

    Attributes:
        op, operand, when: the contract's; ``when`` is its condition.
        rules: in words.
        reason: why not.
    """

    op: str
    operand: str
    when: str
    rules: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Verification:
    """Everything that ``--verify`` found.

    Attributes:
        device: kind.
        rows: every layout tried.
        idle: what was not tried, and why.
        seconds: how long it took.
    """

    device: str
    rows: tuple[Row, ...]
    idle: tuple[Idle, ...]
    seconds: float

    def count(self, agrees: str) -> int:
        """How many rows say so."""
        return sum(row.agrees == agrees for row in self.rows)


def verify(
    device: str,
    *,
    only: str = "",
    jobs: int = 2,
    timeout: float = 120.0,
    registry: Registry = REGISTRY,
    programs: Sequence[Program] | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Verification:
    """Try every contract of ``registry`` that applies to ``device``.

    Args:
        device: ``"cuda"`` or ``"cpu"``.
        only: programs whose name, such as ``_scaled_mm row-wise``, contains this.
        jobs: processes at a time.
        timeout: seconds for one of them.
        registry: the contracts.
        programs: what to call; by default all that the doctor knows.
        progress: told how far it is, a line at a time.

    Raises:
        DoctorError: no program fits ``only``, or this process cannot fork children for a GPU.
    """
    started = time.perf_counter()
    known = catalogue() if programs is None else tuple(programs)
    chosen = [p for p in known if only in p.name]
    if not chosen:
        names = ", ".join(dict.fromkeys(p.name.split()[0] for p in known))
        raise DoctorError(f"--only {only!r}: no program's name contains it; there are {names}")
    fitting = [
        p for p in chosen if device in p.kinds and p.op in registry.table()
    ]
    import_compiler()
    where = torch.device(device)
    plans = _plans(fitting, where, registry, jobs, timeout)
    progress(f"{sum(not e.problem for e in plans)} of {len(fitting)} programs run here")
    tasks = [
        (program, trial)
        for program, end in zip(fitting, plans, strict=True) if not end.problem
        for trial in end.value.trials
    ]
    rows = _rows(tasks, where, jobs, timeout, progress)
    idle = tuple(_idle(registry, known, chosen, dict(zip(fitting, plans, strict=True)), device))
    return Verification(device, rows, idle, time.perf_counter() - started)


def _plans(
    programs: Sequence[Program],
    device: torch.device,
    registry: Registry,
    jobs: int,
    timeout: float,
) -> list[Ended]:
    works = [partial(plan, program, device, registry) for program in programs]
    return processes.run_all(works, jobs=jobs, timeout=timeout)


def _rows(
    tasks: Sequence[tuple[Program, Trial]],
    device: torch.device,
    jobs: int,
    timeout: float,
    progress: Callable[[str], None],
) -> tuple[Row, ...]:
    works = [
        partial(observe, program, trial, device, not _excuse(program, trial, device.type))
        for program, trial in tasks
    ]
    done = 0

    def ended(number: int, end: Ended) -> None:
        nonlocal done
        done += 1
        row = _row(*tasks[number], end, device.type)
        if row.agrees == DISAGREES:
            said = f"{row.op} {row.variant} {row.operand}, {row.layout}: {row.outcome}"
            progress(f"[{done}/{len(tasks)}] disagrees: {said}")
        elif done % 50 == 0 or done == len(tasks):
            progress(f"[{done}/{len(tasks)}] layouts tried")

    ends = processes.run_all(works, jobs=jobs, timeout=timeout, ended=ended)
    return tuple(_row(*task, end, device.type) for task, end in zip(tasks, ends, strict=True))


# -- verdicts ------------------------------------------------------------------------------------


def _excuse(program: Program, trial: Trial, device: str) -> str:
    return stricter(device, program.op, trial.operand, trial.words, trial.broken)


def _row(program: Program, trial: Trial, end: Ended, device: str) -> Row:
    seen = end.value if not end.problem else Observed(end.problem, end.message)
    why = _excuse(program, trial, device)
    agrees = _verdict(trial, seen, bool(why))
    return Row(
        op=program.op,
        variant=program.variant,
        operand=trial.operand,
        demanded=trial.demanded,
        layout=trial.words,
        broken=trial.broken,
        outcome=seen.outcome,
        message=seen.message,
        compiled=seen.compiled,
        compiled_message=seen.compiled_message,
        agrees=agrees,
        source=why if agrees == STRICTER else trial.source,
    )


def _verdict(trial: Trial, seen: Observed, conservative: bool) -> str:
    """Whether contract and fact agree. What did not end, or could not be set up, settles nothing
    and counts as a disagreement; a crash is what an illegal layout may well end in."""
    if seen.outcome in (TIMEOUT, FAILED):
        return DISAGREES
    if trial.legal:
        return AGREES if seen.outcome == RIGHT else DISAGREES
    if seen.outcome == CRASH or refused(seen):
        return AGREES
    return STRICTER if conservative else DISAGREES


# -- what was not tried --------------------------------------------------------------------------


def _idle(
    registry: Registry,
    known: Sequence[Program],
    chosen: Sequence[Program],
    plans: dict[Program, Ended],
    device: str,
) -> list[Idle]:
    found = []
    made = [end.value for end in plans.values() if not end.problem]
    for number, contract in enumerate(registry.contracts()):
        mine = [p for p in chosen if p.op == contract.op]
        if not mine and any(p.op == contract.op for p in known):
            continue  # not asked for
        bound = [p for p in made if number in p.bound]
        reason = "" if bound else _why_not(contract, mine, plans, device)
        tried = {position for one in bound for n, position in one.rules if n == number}
        rules = [r for position, r in enumerate(contract.rules) if position not in tried]
        if reason or rules:
            words = tuple(rule.describe() for rule in rules)
            reason = reason or "no layout of the operands tried breaks it"
            found.append(Idle(contract.op, contract.operand, contract.when.text, words, reason))
    if len(chosen) == len(known):
        for contract in (TRITON_KERNEL, SUBGRAPH, SUBGRAPH_RESULT):
            words = tuple(rule.describe() for rule in contract.rules)
            reason = "binds what compiled code calls, which is no op"
            found.append(Idle(contract.op, contract.operand, contract.when.text, words, reason))
    return found


def _why_not(
    contract: Contract, programs: Sequence[Program], plans: dict[Program, Ended], device: str
) -> str:
    if not programs:
        return "the doctor knows no call of this op"
    if not any(device in program.kinds for program in programs):
        kinds = " or ".join(dict.fromkeys(k for program in programs for k in program.kinds))
        return f"for {kinds}; this is {device}"
    problems = [
        f"{program.variant}: {plans[program].message}"
        for program in programs if program in plans and plans[program].problem
    ]
    if problems:
        return f"does not run here ({'; '.join(problems)})"
    return f"binds only: {contract.when.text}; this is {device}"
