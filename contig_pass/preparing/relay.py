"""``prepare``: parameters and buffers relaid once, instead of copied on every call.

A compiled graph takes its inputs as they come. One that does not start on 16 bytes is realigned
at each call, and a use of a parameter that breaks its contract reads a copy made at each call.
Where another layout of the whole tensor spares those copies, the tensor gets it here, in place.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from contig_pass.errors import ContigPassError
from contig_pass.layout import dense_strides
from contig_pass.options import Options, parse_options
from contig_pass.plan import AUDIT, DENSE
from contig_pass.preparing.cases import Case, cases_of, rules_in_words
from contig_pass.preparing.memory import Group, groups_of
from contig_pass.preparing.report import Outcome, fix_rows, report_of, skip_row
from contig_pass.preparing.traces import trace_model
from contig_pass.preparing.verdict import Verdict, choose
from contig_pass.report.model import Report


def prepare(
    model: torch.nn.Module,
    *args: Any,
    policy: str = DENSE,
    target: str = "auto",
    **kwargs: Any,
) -> Report:
    """Relay, once and in place, the parameters and buffers that every call would copy.

    With arguments, ``model(*args, **kwargs)`` is traced and run once, as by ``explain``, and what
    it wrote to the model or to its arguments is put back. A tensor is relaid if its copies by
    ``torch.compile(model, backend="contig_safe")`` become fewer, or more uses of it legal, and no
    use that is legal now is broken: to a dense, aligned layout, in its present order of
    dimensions if that serves as well as any. Its order changes only where every op that reads it
    is bound by a contract or takes any strides.

    Without arguments only what holds whatever the program does is repaired: tensors that do not
    start on 16 bytes, overlap themselves or are not dense get a dense copy in their present order.

    Call it before the model is compiled: a graph compiled earlier is compiled again. Values,
    names and identities stay as they are (``tensor.data`` is assigned), and tensors with the same
    memory keep sharing it. Views of a relaid tensor that live outside the model stay behind.

    Extra memory: one tensor at a time, beyond what the traced run needs. Slices of one buffer are
    moved one by one and keep that buffer alive until the last of them is moved.

    Args:
        model: a module with parameters or buffers.
        args, kwargs: what to call it with; none: judge the tensors alone.
        policy, target: as in the options of the backend; ``"audit"`` changes nothing, and
            ``"strict"`` is here as ``"contract"``, since compiling can still repair the rest.

    Returns:
        A report with a fix for each relaid tensor and a skip for each that is left alone.

    Raises:
        OptionError: a bad policy or target.
        ContigPassError: no module, nothing to relay in it, or nothing of it was traced.
    """
    started = time.perf_counter()
    options = parse_options(None, {"policy": policy, "target": target})
    if isinstance(model, torch._dynamo.OptimizedModule):
        model = model._orig_mod
    if not isinstance(model, torch.nn.Module):
        raise ContigPassError(
            f"prepare takes a torch.nn.Module; this is a {type(model).__name__}"
        )
    groups = groups_of(model, (args, kwargs))
    if not groups:
        raise ContigPassError(
            f"{type(model).__name__} has no parameters and no buffers: nothing to prepare"
        )
    if args or kwargs:
        traced = trace_model(model, args, kwargs, options, groups)
        cases = list(cases_of(groups, traced))
        nodes = sum(graph.nodes for graph in traced)
    else:
        cases, nodes = [Case(group, alone=True) for group in groups], 0
    outcomes = [_settle(case, options) for case in cases]
    return report_of(options, cases, outcomes, nodes, time.perf_counter() - started)


def _settle(case: Case, options: Options) -> Outcome:
    """Decide on one group and relay it: nothing of it is held when the next one's turn comes."""
    layout, wrong = case.group.layout(), case.wrong()
    if not wrong:
        return Outcome()
    obstacle = case.group.obstacle()
    if layout is None and obstacle is None:
        return Outcome()
    if obstacle is None and case.unfollowed:
        obstacle = "the compiled graph does not say which of its inputs this is"
    if obstacle is None and options.policy == AUDIT:
        obstacle = "policy audit: nothing is changed"
    if obstacle is not None:
        return Outcome([skip_row(case, wrong, obstacle)])
    order, verdict, hindered = choose(case, layout)
    if order is None:
        stays = f": {_left_words(verdict)}" if verdict.left else ""
        reason = f"no dense copy of the whole tensor repairs it{stays}{hindered}"
        return Outcome([skip_row(case, wrong, reason)])
    rows = fix_rows(case, options, wrong, order)
    _relay(case.group, order)
    if verdict.left:
        use = verdict.left[0]
        reason = f"not every use is repaired: {_left_words(verdict)}{hindered}"
        rows.append(skip_row(case, tuple(rules_in_words(use)), reason, use))
    return Outcome(rows, 1 if case.alone else len(case.open_uses) - len(verdict.left))


def _left_words(verdict: Verdict) -> str:
    """What is still open at the first use that a layout leaves open."""
    use = verdict.left[0]
    broken = "; ".join(rules_in_words(use))
    return f"{use.operand.name} would be {use.fact.layout.describe()}, {broken}"


def _relay(group: Group, order: tuple[int, ...]) -> None:
    old = group.tensor
    # What the caller's mode is must not show in the tensor.
    with torch.inference_mode(old.is_inference()), torch.no_grad():
        strides = dense_strides(tuple(old.shape), order)
        new = torch.empty_strided(
            old.shape, strides, dtype=old.dtype, device=old.device, pin_memory=old.is_pinned()
        )
        new.copy_(old.detach())
        for tensor in group.members.values():
            tensor.data = new
