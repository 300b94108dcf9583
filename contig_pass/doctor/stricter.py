"""Where a contract says that it asks for more than one kernel or shape needs.

A layout that such a rule forbids may well give the right value on the machine at hand. Each entry
repeats what the contract's own module says, or of an op that copies by itself the sanitizer's, and
nothing else excuses a disagreement.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from contig_pass.contracts.attention import BACKWARD


@dataclass(frozen=True)
class Stricter:
    """One demand that is meant to be conservative.

    Attributes:
        op: pattern of the op's name.
        operands: of the op.
        rule: the demand's words begin so.
        why: what the contract says of it.
        device: the kind of device that it is about.
        layouts: patterns of the layouts that it is about.
    """

    op: str
    operands: tuple[str, ...]
    rule: str
    why: str
    device: str = "cuda"
    layouts: tuple[str, ...] = ("*",)


_INDUCTOR = (
    "contracts/scaled_mm.py names Inductor's check of the order as the only source on a CPU, whose "
    "kernels take any layout"
)
_BIAS = (
    "contracts/attention.py: a bias off by 4 or 8 bytes, or whose rows are, passes some cuDNN "
    "shapes; only 16 is safe for all"
)
_UNLOWERED = (
    "contracts/scaled_mm.py: Inductor checks the order; that of torch 2.12 and earlier leaves "
    "_scaled_mm_v2 to the CPU's kernel, which takes any layout"
)
_SHARED = ("outermost dimension expanded", "rows that overlap")

STRICTER = (
    Stricter(
        "aten::_scaled_mm*", ("self", "mat2"), "pitch aligned",
        "contracts/scaled_mm.py: with tensor-wise scales cuBLASLt accepts pitches of K+4 to K+12 "
        "bytes for some shapes and refuses them for others, so only 16 is safe",
    ),
    Stricter(
        "aten::_scaled_mm*", ("bias",), "pointer aligned",
        "contracts/scaled_mm.py: a bias off by 4 or 8 bytes is accepted for some shapes only",
    ),
    Stricter(
        "aten::_scaled_mm*", ("self",), "row-major",
        "contracts/scaled_mm.py: with some pitches eager mode copies rows that overlap by itself",
        layouts=("rows that overlap",),
    ),
    *(
        Stricter("aten::_scaled_dot_product_*", ("attn_bias",), rule, _BIAS)
        for rule in ("pointer aligned", "pitch aligned")
    ),
    *(
        Stricter(
            "aten::_scaled_dot_product_cudnn_attention_backward.default", ("attn_bias",),
            "unit-stride", f"contracts/attention.py: {BACKWARD}",
        ),
        Stricter(
            "aten::_scaled_dot_product_cudnn_attention_backward.default", ("grad_out", "out"),
            "dense", "contracts/attention.py: the op copies what is not unit-stride by itself",
            layouts=("inner stride 2", "inner two dimensions swapped"),
        ),
        Stricter(
            "aten::_scaled_dot_product_efficient_attention_backward.default", ("out",), "dense",
            "contracts/attention.py: the demand is for the order of heads and tokens",
            layouts=("outermost dimension expanded",),
        ),
        Stricter(
            "aten::_scaled_dot_product_flash_attention_for_cpu.default", ("query", "key", "value"),
            "unit-stride", "contracts/attention.py: the kernel of torch 2.14 takes more layouts",
            "cpu",
        ),
    ),
    Stricter(
        "aten::_int_mm*", ("self", "mat2"), "pitch aligned",
        "contracts/scaled_mm.py: the cuBLAS preparation transposes or clones by strides alone",
        layouts=("inner stride 2",),
    ),
    *(
        Stricter(
            "aten::_scaled_dot_product_flash_attention_backward.default", ("grad_out", "out"), rule,
            "contracts/attention.py: this op copies grad_out and out unless they are dense as "
            "(B, L, H, D)",
        )
        for rule in ("unit-stride", "pitch aligned", "pointer aligned")
    ),
    # mat2 with an inner stride of 2 is refused by Inductor.
    Stricter(
        "aten::_scaled_mm*", ("self",), "row-major", _INDUCTOR, "cpu", (*_SHARED, "inner stride 2")
    ),
    Stricter("aten::_scaled_mm*", ("mat2",), "column-major", _INDUCTOR, "cpu", _SHARED),
    *(
        Stricter(
            "aten::_scaled_mm_v2*", (operand,), rule, _UNLOWERED, "cpu",
            ("inner two dimensions swapped", "inner stride 2"),
        )
        for operand, rule in (("self", "row-major"), ("mat2", "column-major"))
        if torch.__version__ < "2.13"
    ),
)


def stricter(device: str, op: str, operand: str, layout: str, broken: tuple[str, ...]) -> str:
    """Why a layout that breaks these rules may be right nevertheless; ``""`` if it may not.

    Args:
        device: kind of the device at hand.
        op: ``namespace::name.overload``.
        operand: its name, with the position of a tensor in a list argument.
        layout: in words.
        broken: the rules in words. All of them must be conservative.
    """
    reasons = []
    for rule in broken:
        found = [
            entry.why for entry in STRICTER
            if entry.device == device
            and fnmatchcase(op, entry.op)
            and any(fnmatchcase(layout, pattern) for pattern in entry.layouts)
            and operand.split("[")[0] in entry.operands
            and rule.startswith(entry.rule)
        ]
        if not found:
            return ""
        reasons += found
    return "; ".join(dict.fromkeys(reasons))
