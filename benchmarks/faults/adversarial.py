"""Programs that defeat the obvious repairs: what a compiler may move, drop, alias or reuse.

All use recording ops with registered contracts, so they run on any device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from benchmarks.faults.program import (
    BF16,
    E4M3,
    Case,
    Program,
    finite_bytes,
    integers,
    normal,
    simple,
)

ops = torch.ops.faults
E8M0 = torch.float8_e8m0fnu
FP4 = torch.float4_e2m1fn_x2


def programs() -> Iterator[Program]:
    """Every adversarial program."""
    for group, builders in _GROUPS.items():
        for name, build in builders.items():
            yield Program(name, group, build)


def _on_bytes(function: Callable[..., object], *shapes: tuple[int, ...]) -> Callable[[str], Case]:
    def build(device: str) -> Case:
        return Case(function, [tuple(finite_bytes(device, *shape) for shape in shapes)])

    return build


def _on_integers(
    function: Callable[..., object], *shapes: tuple[int, ...]
) -> Callable[[str], Case]:
    """Small integers as floats: exact in whatever order and precision they are summed."""

    def build(device: str) -> Case:
        return Case(function, [tuple(integers(device, *shape) for shape in shapes)])

    return build


# -- copies that a compiler drops or undoes ------------------------------------------------------


def _contiguous_is_no_copy(b: torch.Tensor) -> torch.Tensor:
    return ops.rows(b.as_strided((32, 64), (64, 1), 1).contiguous())


def _user_clone(b: torch.Tensor) -> torch.Tensor:
    return ops.rows(b[1 : 1 + 32 * 64].view(32, 64).clone())


def _column_major_product(a: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return ops.matmul(a.t(), w.t().contiguous(), None)


def _transposed_then_scaled(x: torch.Tensor) -> torch.Tensor:
    return ops.rows((x.t() * 2).contiguous())


def _two_views_of_one(b: torch.Tensor) -> tuple[torch.Tensor, ...]:
    view = b[3 : 3 + 32 * 64].view(32, 64)
    return ops.rows(view), ops.rows(view), view * 3, ops.rows(view * 2)


def _other_users(b: torch.Tensor) -> tuple[torch.Tensor, ...]:
    x = (b + 1)[:, 1:]
    return ops.rows(x), x.t() @ x, x


# -- memory that a compiler places elsewhere -----------------------------------------------------


def _cat_rows(past: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    new = (x + 1).to(E4M3)
    return ops.rows(new), torch.cat([past.to(E4M3), new], 0).float()


def _cat_columns(past: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    new = (x + 1).to(E4M3)
    return ops.rows(new), torch.cat([past.to(E4M3), new], 1).float()


def _stacked(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    parts = [(x + i).to(E4M3) for i in range(3)]
    return ops.total(parts), torch.stack(parts, 1).float()


def _split_fp8(x: torch.Tensor) -> torch.Tensor:
    return ops.rows((x * 2).to(E4M3).split(33, -1)[1])


def _convolution(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return ops.rows(torch.nn.functional.conv2d(x, w).relu())


def _transposed_cast(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return ops.matmul(x.t().to(E4M3), w.to(E4M3).t(), None)


def _expanded_rows(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return ops.matmul((x + 1)[:1].expand(16, -1), w.t(), None)


def _extern_then_slice(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return ops.rows((a @ b)[:, 1:33])


# -- views of every kind -------------------------------------------------------------------------


def _flat_weight(x: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
    weight = flat[5 : 5 + 48 * 64].view(E4M3).view(48, 64)
    return ops.matmul(x.to(E4M3), weight.t(), None)


def _padded_weight(x: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
    weight = flat[: 48 * 67].view(E4M3).view(48, 67)[:, :64]
    return ops.matmul(x.to(E4M3), weight.t(), None)


def _sliced_bias(x: torch.Tensor, w: torch.Tensor, biases: torch.Tensor) -> torch.Tensor:
    first = ops.matmul(x, w.t(), biases[1:49])
    return first + ops.matmul(x, w.t(), biases[49:97])


def _dtype_views(flat: torch.Tensor) -> torch.Tensor:
    halves = flat.view(torch.int16)[1:1025]
    return ops.rows(halves.view(E4M3)[14:].view(-1, 2)) + ops.rows(flat[2:4].view(E4M3)).sum()


def _scale_bytes(flat: torch.Tensor) -> torch.Tensor:
    return ops.rows(flat.view(40, 100).view(E8M0)[:, 1:65])


def _packed_bytes(flat: torch.Tensor) -> torch.Tensor:
    return ops.rows(flat.view(FP4)[3 : 3 + 32 * 64].view(32, 64))


def _tensor_list(x: torch.Tensor) -> torch.Tensor:
    return ops.total([x[1:], x[4:], x[8:], x[3:]])


def _mutating_op(x: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(40, 64, device=x.device)
    ops.accumulate(x[:, 1:65], out)
    return out


def _mutated_slice(x: torch.Tensor) -> torch.Tensor:
    out = torch.ones(80, 64, device=x.device)
    ops.accumulate(x[:, 3:67], out[16:56])
    return out


# -- several calls of one compiled program -------------------------------------------------------


def _offsets(*offsets: int) -> Callable[[str], Case]:
    def build(device: str) -> Case:
        base = normal(device, 40 * 64 + 16)
        calls = [(base[o : o + 40 * 64].view(40, 64).detach(),) for o in offsets]
        return Case(lambda x: ops.rows(x), calls)

    return build


def _slice_undone_by_prologue(device: str) -> Case:
    flat = finite_bytes(device, 8192)
    calls = [(flat[o : o + 4096],) for o in (1, 0, 2)]
    return Case(lambda b: ops.rows(b[15 : 15 + 64 * 32].view(E4M3).view(32, 64)), calls)


def _mutated_input(device: str) -> Case:
    def function(x: torch.Tensor) -> torch.Tensor:
        out = ops.rows(x)
        x.mul_(2)
        return out

    def call(offset: int) -> tuple[torch.Tensor]:
        return (normal(device, 40 * 64 + 16)[offset : offset + 40 * 64].view(40, 64),)

    return Case(function, [call(1), call(0), call(3)])


def _aliased_output(device: str) -> Case:
    base = normal(device, 40 * 64 + 16)[5 : 5 + 40 * 64].view(40, 64)
    return Case(lambda x: (ops.rows(x), x[1:], x), [(base,)])


def _dynamic(function: Callable[[torch.Tensor], object], *widths: int) -> Callable[[str], Case]:
    def build(device: str) -> Case:
        calls = [(normal(device, 30 + i, width),) for i, width in enumerate(widths)]
        return Case(function, calls, dynamic=True)

    return build


def _unbacked(device: str) -> Case:
    def function(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        start = at.item()
        torch._check(start >= 0)
        torch._check(start + 32 <= x.shape[1])
        return ops.rows(x.narrow(1, start, 32))

    x = normal(device, 40, 128)
    return Case(function, [(x, torch.tensor(n)) for n in (3, 16, 5)])


class _Linear(torch.nn.Module):
    """A layer whose parameter is re-pointed to misaligned memory between the calls."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.matmul(x, self.weight.t(), None)


def _parameter(*offsets: int) -> Callable[[str], Case]:
    def build(device: str) -> Case:
        flat = normal(device, 48 * 64 + 16)
        weights = [flat[o : o + 48 * 64].view(48, 64) for o in offsets]
        layer = _Linear(weights[0])

        def function(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return layer(x)

        def swapped(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            layer.weight.data = weight
            return function(x, weight)

        x = normal(device, 16, 64)
        case = Case(swapped, [(x, weight) for weight in weights])
        return case if len(offsets) > 1 else Case(function, [(x, weights[0])])

    return build


_GROUPS: dict[str, dict[str, Callable[[str], Case]]] = {
    "copies dropped": {
        "as_strided, contiguous() is no copy": simple(_contiguous_is_no_copy, (2100,)),
        "user's clone of a misaligned view": simple(_user_clone, (2100,)),
        "a column-major, b row-major": simple(_column_major_product, (64, 32), (64, 48)[::-1]),
        "transposed, scaled, contiguous()": simple(_transposed_then_scaled, (64, 32)),
        "two uses and another user of one view": simple(_two_views_of_one, (2100,)),
        "other users keep the view": simple(_other_users, (32, 65)),
    },
    "memory placed elsewhere": {
        "fresh fp8 appended by cat, rows": simple(_cat_rows, (3, 20), (5, 20)),
        "fresh fp8 appended by cat, columns": simple(_cat_columns, (16, 5), (16, 64)),
        "fresh fp8 stacked": simple(_stacked, (5, 20)),
        "fp8 split, second part": simple(_split_fp8, (32, 96)),
        "convolution, channels last": _on_integers(_convolution, (1, 16, 8, 9), (24, 16, 3, 3)),
        "transposed activation cast to fp8": simple(_transposed_cast, (64, 32), (48, 64)),
        "one row expanded": simple(_expanded_rows, (4, 64), (48, 64)),
        "slice of an extern product": simple(_extern_then_slice, (32, 16), (16, 40)),
    },
    "views": {
        "fp8 weight at an odd byte": lambda device: Case(
            _flat_weight, [(normal(device, 32, 64), finite_bytes(device, 4000))]
        ),
        "fp8 weight with padded rows": lambda device: Case(
            _padded_weight, [(normal(device, 32, 64), finite_bytes(device, 4000))]
        ),
        "biases sliced from one buffer": simple(_sliced_bias, (32, 64), (48, 64), (100,)),
        "chain of dtype views": _on_bytes(_dtype_views, (2060,)),
        "e8m0 scales, slice of rows": _on_bytes(_scale_bytes, (4000,)),
        "packed fp4 at an odd byte": _on_bytes(_packed_bytes, (4000,)),
        "list of tensors": simple(_tensor_list, (64,), dtype=BF16),
        "op that mutates another operand": simple(_mutating_op, (40, 73)),
        "op that mutates a slice": simple(_mutated_slice, (40, 73)),
    },
    "routes": {
        "aligned first, misaligned later": _offsets(0, 1, 8, 3),
        "misaligned first": _offsets(1, 0, 2),
        "slice that is aligned only by sum": _slice_undone_by_prologue,
        "misaligned input mutated": _mutated_input,
        "misaligned input returned": _aliased_output,
        "parameter misaligned": _parameter(1),
        "parameter re-pointed by .data": _parameter(0, 1, 4),
        "dynamic pitch": _dynamic(lambda x: ops.rows(x[:, :32]), 64, 80, 73),
        "dynamic pitch, computed": _dynamic(lambda x: ops.rows((x + 1)[:, 1:]), 65, 80, 73),
        "unbacked offset": _unbacked,
    },
}

