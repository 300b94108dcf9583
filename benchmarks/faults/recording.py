"""Custom ops that make a kernel's demands and record what they received.

They stand for kernels that this machine does not have: third-party ops, and on a CPU the three
attention backends of a GPU. Each checks its demands on the real memory, by rules written here and
independent of contig_pass, and does what the measured kernels do when one is broken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from contig_pass import (
    AlignedPitch,
    AlignedPointer,
    ColumnMajor,
    RowMajor,
    UnitStrideLast,
    register_contract,
)

#: Facts of every operand received since the last :func:`forget`: (op, operand, shape, strides,
#: address modulo 16).
received: list[tuple[str, str, tuple[int, ...], tuple[int, ...], int]] = []
#: Errors that a GPU would raise at its next synchronisation.
pending: list[str] = []

_LIBRARY = torch.library.Library("faults", "DEF")


def forget() -> None:
    """Empty the records."""
    received.clear()
    pending.clear()


def note(op: str, **operands: torch.Tensor | None) -> None:
    """Record what ``op`` received."""
    for name, tensor in operands.items():
        if tensor is not None:
            received.append(
                (op, name, tuple(tensor.shape), tensor.stride(), tensor.data_ptr() % 16)
            )


def aligned(tensor: torch.Tensor) -> bool:
    """Pointer and every non-unit stride on multiples of 16 bytes."""
    strides = [s for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1 and s != 1]
    return tensor.data_ptr() % 16 == 0 and all(s * tensor.element_size() % 16 == 0 for s in strides)


def values(tensor: torch.Tensor) -> torch.Tensor:
    """The values as fp32, of packed and scale types the bytes."""
    if tensor.dtype in (torch.float8_e8m0fnu, torch.float4_e2m1fn_x2):
        tensor = tensor.view(torch.uint8)
    return tensor.contiguous().float()


def garbled(tensor: torch.Tensor) -> torch.Tensor:
    """What a kernel that reads the wrong addresses might return."""
    return tensor.flip(-1) + 1


def _define(schema: str, kernel: object, fake: object) -> None:
    name = schema.split("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"faults::{name}", fake, lib=_LIBRARY)


# -- one matrix, several matrices, a mutated one -------------------------------------------------


def _rows(x: torch.Tensor) -> torch.Tensor:
    note("rows", x=x)
    if x.data_ptr() % 16 or x.stride(-1) != 1:
        return garbled(values(x))
    return values(x) * 2


def _shifted(x: torch.Tensor) -> torch.Tensor:
    """An output that starts at element 1 of its storage, of which the fake knows nothing."""
    note("shifted", x=x)
    out = torch.empty(x.numel() + 1, dtype=torch.float32, device=x.device)[1:].view(x.shape)
    return out.copy_(values(x))


def _shifted_parts(x: torch.Tensor) -> list[torch.Tensor]:
    return [_shifted(part) for part in x.chunk(2)]


def _linear(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    note("linear", x=x, w=w)
    if x.stride(1) != 1 or w.stride(1) != 1 or not (aligned(x) and aligned(w)):
        raise RuntimeError("x and w must be row-major and aligned")
    return values(x) @ values(w).t()


def _matmul(
    a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    note("matmul", a=a, b=b, bias=bias)
    if a.stride(1) != 1 or b.stride(0) != 1:
        raise RuntimeError("a must be row-major and b column-major")
    if not (aligned(a) and aligned(b)) or (bias is not None and bias.data_ptr() % 16):
        raise RuntimeError("misaligned operand")
    out = values(a) @ values(b)
    return out if bias is None else out + bias.float()


def _total(xs: Sequence[torch.Tensor]) -> torch.Tensor:
    note("total", **{f"xs{i}": x for i, x in enumerate(xs)})
    total = torch.stack([values(x).sum() for x in xs]).sum()
    return total if all(x.data_ptr() % 16 == 0 for x in xs) else total + 1


def _accumulate(x: torch.Tensor, out: torch.Tensor) -> None:
    note("accumulate", x=x, out=out)
    bad = x.data_ptr() % 16 or x.stride(-1) != 1
    out.add_(garbled(values(x)) if bad else values(x))


def _fill(x: torch.Tensor, out: torch.Tensor) -> None:
    note("fill", x=x, out=out)
    bad = x.data_ptr() % 16 or x.stride(-1) != 1 or out.data_ptr() % 16
    out.copy_(garbled(values(x)) if bad else values(x))


def _like(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


for _name in ("rows", "late", "scaled"):
    _define(f"{_name}(Tensor x) -> Tensor", _rows, _like)
_define("shifted(Tensor x) -> Tensor", _shifted, _like)
_define(
    "shifted_parts(Tensor x) -> Tensor[]",
    _shifted_parts,
    lambda x: [_like(part) for part in x.chunk(2)],
)
_define(
    "linear(Tensor x, Tensor w) -> Tensor",
    _linear,
    lambda x, w: x.new_empty(x.shape[0], w.shape[0], dtype=torch.float32),
)
_define(
    "matmul(Tensor a, Tensor b, Tensor? bias=None) -> Tensor",
    _matmul,
    lambda a, b, bias=None: a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32),
)
_define(
    "total(Tensor[] xs) -> Tensor", _total, lambda xs: xs[0].new_empty((), dtype=torch.float32)
)
_define("accumulate(Tensor x, Tensor(a!) out) -> ()", _accumulate, lambda x, out: None)
_define("fill(Tensor x, Tensor(a!) out) -> ()", _fill, lambda x, out: None)

_MATRIX = [AlignedPointer(16), AlignedPitch(16)]
for _name in ("rows", "scaled", "fill"):
    register_contract(f"faults::{_name}", "x", [UnitStrideLast(), AlignedPointer(16)])
register_contract("faults::fill", "out", [AlignedPointer(16)])
for _operand in "xw":
    register_contract("faults::linear", _operand, [RowMajor(), *_MATRIX])
register_contract("faults::matmul", "a", [RowMajor(), *_MATRIX])
register_contract("faults::matmul", "b", [ColumnMajor(), *_MATRIX])
register_contract("faults::matmul", "bias", [AlignedPointer(16)])
register_contract("faults::total", "xs", [AlignedPointer(16)])
register_contract("faults::accumulate", "x", [UnitStrideLast(), AlignedPointer(16)])


# -- gradients -----------------------------------------------------------------------------------


def _keep(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _linear_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x, w = ctx.saved_tensors
    linear = torch.ops.faults.linear
    return linear(grad, w.t()), linear(grad.t(), x.t())


torch.library.register_autograd(
    "faults::scaled", lambda ctx, grad: torch.ops.faults.scaled(grad), lib=_LIBRARY
)
torch.library.register_autograd(
    "faults::linear", _linear_backward, setup_context=_keep, lib=_LIBRARY
)


# -- the attention backends of a GPU -------------------------------------------------------------


def _attention(name: str) -> None:
    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        note(name, q=q, k=k, v=v)
        if any(t.stride(-1) != 1 for t in (q, k, v)):
            raise RuntimeError("No available kernel. Aborting execution.")
        product = values(q) @ values(k).transpose(-1, -2) / q.shape[-1] ** 0.5
        out = (product.softmax(-1) @ values(v)).to(q.dtype)
        if not all(map(aligned, (q, k, v))):
            if name == "cudnn":
                out = garbled(out)
            elif name == "flash":
                pending.append("CUDA error: misaligned address")
            else:
                raise RuntimeError("query is not correctly aligned")
        return torch.empty_like(q).copy_(out)

    _define(
        f"{name}(Tensor q, Tensor k, Tensor v) -> Tensor",
        kernel,
        lambda q, k, v: torch.empty_like(q),
    )
    for operand in "qkv":
        register_contract(
            f"faults::{name}", operand, [UnitStrideLast(), *_MATRIX], keep_order=True
        )


for _name in ("flash", "cudnn", "efficient"):
    _attention(_name)
