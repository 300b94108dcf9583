"""What becomes of every use of a parameter if the parameter gets another layout."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from contig_pass.analysis import Use
from contig_pass.callsite import called_op
from contig_pass.contracts.rules import COLUMN, KEEP, ROW, dim_order, order_name
from contig_pass.layout import FRESH_ALIGNMENT, INPUT_ALIGNMENT, Layout, dense_strides, known
from contig_pass.preparing.cases import Case, Site, is_copied, judged_as

#: Every order of dimensions is tried up to here; beyond, only the usual ones.
_MOST_DIMS = 6


@dataclass(frozen=True)
class Verdict:
    """What a new layout would do.

    Attributes:
        spared: copies that a call no longer makes.
        legal: uses that become legal by their real address.
        left: uses that stay open.
        obstacle: why the layout is out; ``None``: it is not.
    """

    spared: int = 0
    legal: int = 0
    left: tuple[Use, ...] = ()
    obstacle: str | None = None

    @property
    def gain(self) -> tuple[int, int]:
        return (self.spared, self.legal) if self.obstacle is None else (0, 0)


def _orders_of(layout: Layout) -> Iterator[tuple[int, ...]]:
    """Orders of dimensions to try, the present one first; none with the same strides twice."""
    # Elements that lie on each other have no order to keep.
    names = (ROW, COLUMN) if layout.overlaps() else (KEEP, ROW, COLUMN)
    usual = (dim_order(name, layout) for name in names)
    every = itertools.permutations(range(layout.ndim)) if layout.ndim <= _MOST_DIMS else ()
    seen = set()
    for order in itertools.chain(usual, every):
        strides = dense_strides(layout.shape, order)
        if strides not in seen:
            seen.add(strides)
            yield order


def choose(case: Case, layout: Layout) -> tuple[tuple[int, ...] | None, Verdict, str]:
    """The first order that gains most and its verdict; if none gains, ``None`` and the verdict on
    the present order. Last, in words, why the first order that is out is out."""
    present, *others = _orders_of(layout)
    if case.alone:
        return present, Verdict(), ""
    best = _try_order(case, present)
    chosen = present if best.gain > (0, 0) else None
    hindered = _hindrance(present, best)
    for order in others:
        if chosen is not None and not best.left:
            break
        verdict = _try_order(case, order)
        hindered = hindered or _hindrance(order, verdict)
        if verdict.gain > best.gain:
            chosen, best = order, verdict
    return chosen, best, hindered


def _hindrance(order: tuple[int, ...], verdict: Verdict) -> str:
    if verdict.obstacle is None:
        return ""
    return f"; in {order_name(order)} order {verdict.obstacle}"


def _try_order(case: Case, order: tuple[int, ...]) -> Verdict:
    """Judge a fresh dense copy in ``order`` by every view and every use."""
    tensor = case.group.tensor
    strides = dense_strides(tuple(tensor.shape), order)
    spared = legal = 0
    left: list[Use] = []
    for site in case.sites:
        try:
            views = _replay(site, strides)
        except Exception as error:
            # Whatever an op raises for these strides, the program would raise it as well.
            return Verdict(obstacle=f"a view of it would fail: {_first_line(error)}")
        value = site.node.meta["val"]
        if site.node in site.traced.contiguous and not _same_strides(views[site.node], value):
            return Verdict(obstacle="contiguous(), which the program calls on it, would copy")
        stranger = _stranger(site, views)
        if stranger is not None:
            return Verdict(obstacle=f"no contract says which strides {stranger} takes")
        spared += site.realigned
        for use in site.uses:
            moved = _moved(use, views)
            if moved is None:
                return Verdict(obstacle=f"{use.contract.op} was made for its strides")
            fresh = judged_as(use, replace(moved, base_alignment=FRESH_ALIGNMENT))
            compiled = judged_as(use, replace(moved, base_alignment=INPUT_ALIGNMENT))
            earlier = case.real(use)
            copied, copies = is_copied(use), is_copied(compiled)
            held = [r for r in use.rules if r not in (*earlier.broken, *earlier.unknown)]
            spoiled = [r for r in (*fresh.broken, *fresh.unknown) if r in held]
            if spoiled or (copies and not copied):
                rules = "; ".join(r.describe() for r in spoiled or compiled.broken)
                where = f"{use.contract.op} operand {use.operand.name}"
                return Verdict(obstacle=f"it would break, for {where}: {rules}")
            spared += copied - copies
            legal += fresh.clean - earlier.clean
            if not fresh.clean or not compiled.clean:
                left.append(compiled)
    return Verdict(spared, legal, tuple(left))


def _replay(site: Site, strides: tuple[Any, ...]) -> dict[fx.Node, Any]:
    """What the views of the tensor are if it has ``strides``."""
    value = site.node.meta["val"]
    views: dict[fx.Node, Any] = {
        site.node: torch.empty_strided(value.shape, strides, dtype=value.dtype, device="meta")
    }

    def argument(node: fx.Node) -> Any:
        return views[node] if node in views else node.meta["val"]

    for node in site.traced.views[site.node]:
        if node.target in _BY_ADDRESS:
            raise RuntimeError(f"{node.target} picks elements by address")
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), argument)
        views[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return views


#: Views whose values depend on the strides of what they view.
_BY_ADDRESS = frozenset({torch.ops.aten.as_strided.default})


def _moved(use: Use, views: Mapping[fx.Node, Any]) -> Layout | None:
    """The operand's layout after the change; ``None`` if its consumer does not take it.

    A view that the consumer spells out itself, to write to it, is not replayed.
    """
    layout, view = use.fact.layout, views[use.operand.node]
    fixed = use.contract.keep_strides or not use.operand.path
    if fixed and not _same_strides(view, use.operand.node.meta["val"]):
        return None
    if not use.operand.path:
        return layout
    offset = view.storage_offset() * view.dtype.itemsize
    return replace(layout, strides=tuple(view.stride()), byte_offset=offset)


def _stranger(site: Site, views: Mapping[fx.Node, Any]) -> str | None:
    """An op that reads a view with new strides, and may not take them."""
    bound = {(use.node, use.operand.node) for use in site.uses}
    for node, view in views.items():
        if not isinstance(view, torch.Tensor) or _same_strides(view, node.meta["val"]):
            continue
        for user in node.users:
            if user not in views and (user, node) not in bound and not _takes_any_strides(user):
                return str(user.target)
    return None


def _same_strides(a: torch.Tensor, b: torch.Tensor) -> bool:
    return all(
        known(s == t) is True or known(n <= 1) is True
        for n, s, t in zip(a.shape, a.stride(), b.stride(), strict=True)
    )


def _takes_any_strides(node: fx.Node) -> bool:
    if node.op == "output":
        return True
    op = called_op(node)
    if op is None or op is not node.target:
        return False
    general = {torch.Tag.core, torch.Tag.pointwise} & set(op.tags)
    return bool(general) or op.namespace in ("prims", "inductor", "contig_pass") or op in _GENERAL


_GENERAL = frozenset({torch.ops.aten.copy_.default, torch.ops.aten.baddbmm.default})


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
