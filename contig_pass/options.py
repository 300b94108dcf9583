"""Options of the backend: ours, checked here, and Inductor's, passed through."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from contig_pass.contracts.target import AUTO, Target, parse_target
from contig_pass.errors import OptionError
from contig_pass.plan import AUDIT, DENSE, POLICIES

INDUCTOR = "inductor"
AOT_EAGER = "aot_eager"
INNERS = (INDUCTOR, AOT_EAGER)
_OWN = ("policy", "report", "inner", "target", "remove_redundant")


@dataclass(frozen=True)
class Options:
    """Checked options of one ``torch.compile(..., backend="contig_safe")``.

    Attributes:
        policy: ``"dense"``, ``"contract"``, ``"audit"`` or ``"strict"``.
        report: path (``.txt``, ``.json`` or ``.html``) that each graph's report is written to, or
            a callable that receives each :class:`~contig_pass.Report`; ``None``: neither.
        inner: ``"inductor"`` or ``"aot_eager"``.
        target: judge by this device's contracts; ``None``: by each tensor's own device.
        inductor: Inductor configuration to compile with.
        listing: reports list the whole graph, as ``.html`` shows it.
        remove_redundant: take out the program's own copies that are proved to be without effect.
    """

    policy: str = DENSE
    report: str | Callable[[Any], None] | None = None
    inner: str = INDUCTOR
    target: Target | None = None
    inductor: Mapping[str, Any] = field(default_factory=dict)
    listing: bool = False
    remove_redundant: bool = False

    def decisive(self) -> str:
        """The options that change a graph or what is kept with it, as text for cache keys."""
        target = AUTO if self.target is None else self.target.name
        listing = " listing" if self.listing else ""
        removing = " remove_redundant" if self.remove_redundant else ""
        return f"policy={self.policy} target={target}{listing}{removing}"


def parse_options(mode: str | None, options: Mapping[str, Any] | None) -> Options:
    """Check ``mode`` and ``options`` as ``torch.compile`` hands them to the backend.

    Raises:
        OptionError: an unknown option or mode, or a value that cannot be used.
    """
    given = dict(options or {})
    policy = given.pop("policy", DENSE)
    if policy not in POLICIES:
        raise OptionError(f"policy={policy!r}: use {_either(POLICIES)}{_near(policy, POLICIES)}")
    inner = given.pop("inner", INDUCTOR)
    if inner not in INNERS:
        raise OptionError(f"inner={inner!r}: use {_either(INNERS)}{_near(inner, INNERS)}")
    report = given.pop("report", None)
    if isinstance(report, os.PathLike):
        report = os.fspath(report)
    target = parse_target(given.pop("target", AUTO))
    removing = given.pop("remove_redundant", False)
    if not isinstance(removing, bool):
        raise OptionError(f"remove_redundant={removing!r}: use True or False")
    if removing and policy == AUDIT:
        raise OptionError(
            "remove_redundant=True with policy='audit', which changes nothing: leave one of them "
            "out; the report says in any case which copies are redundant"
        )
    inductor = _mode_options(mode)
    for name, value in given.items():
        inductor[_inductor_option(name)] = value
    if inner == AOT_EAGER and inductor:
        raise OptionError(
            f"inner='aot_eager' compiles nothing, so it takes no mode and no Inductor option: "
            f"remove {', '.join(sorted(inductor))}"
        )
    return Options(policy, report, inner, target, inductor, shows_graphs(report), removing)


def shows_graphs(report: Any) -> bool:
    """Whether what is written to ``report`` shows whole graphs."""
    return isinstance(report, str) and report.endswith(".html")


def _mode_options(mode: str | None) -> dict[str, Any]:
    if mode is None:
        return {}
    import torch._inductor

    modes = torch._inductor.list_mode_options()
    if mode not in modes:
        raise OptionError(f"mode={mode!r}: use {_either(modes)}{_near(mode, modes)}")
    return dict(modes[mode])


def _inductor_option(name: str) -> str:
    """``name`` with dots, if Inductor has such an option."""
    import torch._inductor

    known = torch._inductor.list_options()
    dotted = str(name).replace("-", "_")
    if dotted in known:
        return dotted
    raise OptionError(
        f"unknown option {name!r}{_near(dotted, [*_OWN, *known])}; contig_safe has "
        f"{', '.join(_OWN)}, and takes any option of torch._inductor.config"
    )


def _either(names: Any) -> str:
    *others, last = [repr(name) for name in names]
    return f"{', '.join(others)} or {last}"


def _near(name: object, names: Any) -> str:
    close = difflib.get_close_matches(str(name), list(names), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
