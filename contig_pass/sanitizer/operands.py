"""Operands that break their contracts: found, and relaid."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from contig_pass.contracts.judging import judge
from contig_pass.contracts.registry import REGISTRY, Contract, op_name
from contig_pass.contracts.rules import Rule
from contig_pass.contracts.target import Target
from contig_pass.errors import LayoutViolation
from contig_pass.inductor.ops import contiguous_op
from contig_pass.layout import Layout
from contig_pass.remedy import Remedy, remedy_of
from contig_pass.sanitizer.calls import EagerCall, Launch, Tensor

#: Operands of which an eager op makes a dense copy by itself, unless they are dense in that order
#: already: ``_flash_attention_backward``, which calls ``contiguous()`` on their transpositions.
_COPIED = {
    "aten::_scaled_dot_product_flash_attention_backward.default": {
        "grad_out": (0, 2, 1, 3), "out": (0, 2, 1, 3),
    },
}


@dataclass(frozen=True, eq=False)
class Offence:
    """One operand of one call that breaks its contract."""

    tensor: Tensor
    contract: Contract
    layout: Layout
    broken: tuple[Rule, ...]

    @property
    def remedy(self) -> Remedy:
        """What a copy of the operand does about it."""
        return remedy_of(self.layout, self.contract, self.contract.rules, self.broken)


def offences(call: EagerCall, target: Target | None) -> Iterator[Offence]:
    """Every operand of ``call`` that breaks a rule."""
    seen = call.registry_call(target)
    if seen is None:
        return
    for name, contract in REGISTRY.for_call(seen).items():
        layout = seen.operands[name]
        # Real memory leaves nothing open but what a rule of the user's says it cannot tell.
        broken, unknown = judge(contract.rules, layout)
        copied = _COPIED.get(op_name(call.op), {}).get(name)
        if copied is not None and layout.dense_in(copied) is False:
            continue
        if broken or unknown:
            yield Offence(call.tensors[name], contract, layout, (*broken, *unknown))


def run_repaired(call: EagerCall, wrong: list[Offence], launch: Launch) -> Any:
    """Run ``call`` with a fresh copy of each operand in ``wrong``.

    What the op writes to a copy is put back where it belongs. ``launch`` calls the op.

    Raises:
        LayoutViolation: a copy would not make the call legal, or would lose what the op writes or
            the memory that its result shares with an operand.
    """
    copies: dict[str, torch.Tensor] = {}
    for offence in wrong:
        remedy = offence.remedy
        obstacle = remedy.obstacle or _obstacle(call, offence.tensor)
        if obstacle is not None:
            raise LayoutViolation(f"{call.op._schema.name} {offence.tensor.name}: {obstacle}")
        copies[offence.tensor.name] = contiguous_op()(offence.tensor.value, remedy.order)
    result = call.run(copies, launch)
    returned = {}
    for name, copy in copies.items():
        tensor = call.tensors[name]
        if tensor.argument in call.written:
            tensor.value.copy_(copy)
            returned[id(copy)] = tensor.value
    return _with(result, returned)


def _obstacle(call: EagerCall, tensor: Tensor) -> str | None:
    """Why no copy may stand for an operand."""
    for argument in call.op._schema.arguments:
        if argument.name == tensor.argument and argument.alias_info is not None:
            shares = argument.alias_info.before_set
            if not argument.alias_info.is_write and any(
                returned.alias_info is not None and returned.alias_info.before_set & shares
                for returned in call.op._schema.returns
            ):
                return "the result shares this operand's memory, and a copy's would be another"
    if tensor.argument in call.written:
        for other in call.tensors.values():
            both = other is not tensor and other.argument in call.written
            if both and _overlap(tensor.value, other.value):
                return f"the op writes to memory that this operand shares with {other.name}"
    return None


def _with(result: Any, replaced: Mapping[int, torch.Tensor]) -> Any:
    """``result`` with what it holds of copies replaced by what was copied."""
    if isinstance(result, (list, tuple)) and replaced:
        return type(result)(_with(item, replaced) for item in result)
    return replaced.get(id(result), result)


def _overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether the spans of memory from the first to the last element meet."""
    (start, end), (other_start, other_end) = map(_span, (one, other))
    return start < other_end and other_start < end


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    if tensor.numel() == 0:
        return 0, 0
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
