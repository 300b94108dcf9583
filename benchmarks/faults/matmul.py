"""Programs around the scaled matrix products: every row that was measured, and more."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from benchmarks.faults.program import (
    BF16,
    E4M3,
    Case,
    Planted,
    Program,
    dense,
    expanded,
    in_bytes,
    inner_stride,
    planted_program,
    transposed,
)

M, K, N = 256, 512, 384
A, B, SCALE_A, SCALE_B, BIAS = range(5)
TENSOR_WISE, ROW_WISE = "tensor-wise", "row-wise"

_Fault = Callable[[torch.Tensor], Planted]


def scaled_mm(
    a: torch.Tensor,
    w: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """a (M, K) times the transpose of w (N, K)."""
    return torch._scaled_mm(a, w.t(), scale_a, scale_b, bias, out_dtype=BF16)


def operand_values(
    device: str, scaling: str, *, m: int = M, k: int = K, n: int = N
) -> list[torch.Tensor]:
    """Random a, w, scale_a, scale_b and bias."""
    a = torch.randn(m, k, device=device).to(E4M3)
    w = torch.randn(n, k, device=device).to(E4M3)
    bias = torch.randn(n, device=device, dtype=BF16)
    if scaling == TENSOR_WISE:
        scales = [torch.rand((), device=device) + 0.5 for _ in range(2)]
    else:
        scales = [torch.rand(m, 1, device=device) + 0.5, torch.rand(1, n, device=device) + 0.5]
    return [a, w, *scales, bias]


def _measured(scaling: str) -> Iterator[tuple[str, int, _Fault]]:
    """The rows measured for ``_scaled_mm``: name, position of the operand, layout."""
    for offset in (1, 2, 4, 8, 16, 32):
        fault = lambda v, offset=offset: in_bytes(v, offset)  # noqa: E731
        yield f"a off {offset} B", A, fault
        yield f"b off {offset} B", B, fault
    paddings = (1, 2, 4, 8, 12, 16, 64, K) if scaling == TENSOR_WISE else (4, 8, 16, 64)
    for padding in paddings:
        fault = lambda v, padding=padding: in_bytes(v, 0, padding)  # noqa: E731
        yield f"a pitch K+{padding}", A, fault
        if padding in (1, 8, 16):
            yield f"b pitch K+{padding}", B, fault
    yield "a inner stride 2", A, lambda v: inner_stride()
    yield "a column-major", A, lambda v: transposed()
    yield "b row-major", B, lambda v: transposed()
    yield "a expanded", A, expanded
    for elements in (1, 2, 3, 4, 6, 8):
        yield (
            f"bias off {elements} elements", BIAS,
            lambda v, elements=elements: in_bytes(v, 2 * elements),
        )
    yield "bias strided", BIAS, lambda v: inner_stride()
    yield "scale_b off 1 element", SCALE_B, lambda v: in_bytes(v, 4)
    if scaling == ROW_WISE:
        yield "scale_a off 1 element", SCALE_A, lambda v: in_bytes(v, 4)
        yield "scale_b strided", SCALE_B, lambda v: inner_stride()


def _planted(
    scaling: str, position: int, fault: _Fault, inside: bool
) -> Callable[[str], Case]:
    def build(device: str) -> Case:
        values = operand_values(device, scaling)
        planted = fault(values[position])
        if position == A and fault is expanded:
            values[A] = values[A][:1].expand(M, K).contiguous()
        return planted_program(scaled_mm, values, {position: planted}, inside=inside)

    return build


def _shape(m: int, k: int, n: int) -> Callable[[str], Case]:
    def build(device: str) -> Case:
        values = operand_values(device, TENSOR_WISE, m=m, k=k, n=n)
        return planted_program(scaled_mm, values, {A: dense()}, inside=False)

    return build


def programs() -> Iterator[Program]:
    """The measured rows, each with the operand as an input and as a view made in the graph."""
    for scaling in (TENSOR_WISE, ROW_WISE):
        for name, position, fault in _measured(scaling):
            for inside in (False, True):
                where = "view" if inside else "input"
                yield Program(
                    f"{name}, {where}", f"_scaled_mm, {scaling}",
                    _planted(scaling, position, fault, inside),
                )
    group = "_scaled_mm, shapes"
    yield Program("dense and aligned", group, _shape(M, K, N))
    yield Program("M = 1", group, _shape(1, K, N))
    yield Program("M = 255", group, _shape(255, K, N))
    yield Program("K not a multiple of 16", group, _shape(M, 520, N), illegal=True)
    yield Program("N not a multiple of 16", group, _shape(M, K, 390), illegal=True)
    yield from _others()


# -- other forms and other products --------------------------------------------------------------


def _others() -> Iterator[Program]:
    group = "other products"
    yield Program("out= with bias off 1 element", group, _out_form)
    yield Program("functional.scaled_mm, b off 1 B", group, _functional)
    yield Program("scales sliced from a stack", group, _stacked_scales)
    yield Program("1x128 scales row-major", group, _blocks)
    yield Program("1x128 scales off 1 element", group, _blocks_off)
    for offset in (1, 4):
        yield Program(f"_int_mm, a off {offset} B", group, _int_mm(A, offset, 0))
    yield Program("_int_mm, b pitch K+1", group, _int_mm(B, 0, 1))
    yield Program("grouped, a off 1 B", group, _grouped(A, 1, 0))
    yield Program("grouped, b off 8 B", group, _grouped(B, 8, 0))
    yield Program("grouped, a pitch K+8", group, _grouped(A, 0, 8))


def _out_form(device: str) -> Case:
    values = operand_values(device, TENSOR_WISE)
    fault = in_bytes(values[BIAS], 2)

    def function(
        a: torch.Tensor, w: torch.Tensor, sa: torch.Tensor, sb: torch.Tensor, buffer: torch.Tensor
    ) -> torch.Tensor:
        out = torch.empty(M, N, dtype=BF16, device=a.device)
        torch._scaled_mm(a, w.t(), sa, sb, fault.take(buffer), out_dtype=BF16, out=out)
        return out

    return Case(function, [(*values[:BIAS], fault.store(values[BIAS]))])


def _functional(device: str) -> Case:
    from torch.nn.functional import ScalingType
    from torch.nn.functional import scaled_mm as functional_scaled_mm

    values = operand_values(device, TENSOR_WISE)
    fault = in_bytes(values[B], 1)

    def function(
        a: torch.Tensor, buffer: torch.Tensor, sa: torch.Tensor, sb: torch.Tensor
    ) -> torch.Tensor:
        return functional_scaled_mm(
            a, fault.take(buffer).t(), sa, ScalingType.TensorWise, sb, ScalingType.TensorWise,
            output_dtype=BF16,
        )

    sa, sb = (scale.reshape(1) for scale in values[SCALE_A:BIAS])
    return Case(function, [(values[A], fault.store(values[B]), sa, sb)])


def _stacked_scales(device: str) -> Case:
    a, w, _, _, bias = operand_values(device, TENSOR_WISE)
    stack = torch.rand(8, device=device) + 0.5

    def function(a: torch.Tensor, w: torch.Tensor, stack: torch.Tensor, bias: torch.Tensor):
        first = scaled_mm(a, w, stack[1], stack[2], bias)
        return first, scaled_mm(a, w, stack[5], stack[0], None)

    return Case(function, [(a, w, stack, bias)])


def _block_values(device: str) -> tuple[torch.Tensor, ...]:
    a, w, _, _, _ = operand_values(device, TENSOR_WISE)
    scale_a = torch.rand(M, K // 128, device=device) + 0.5
    scale_b = torch.rand(N // 128, K // 128, device=device) + 0.5
    return a, w, scale_a, scale_b


def _blockwise(
    a: torch.Tensor, w: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor
) -> torch.Tensor:
    return torch._scaled_mm(a, w.t(), scale_a, scale_b.t(), out_dtype=BF16)


def _blocks(device: str) -> Case:
    return Case(_blockwise, [_block_values(device)])


def _blocks_off(device: str) -> Case:
    a, w, scale_a, scale_b = _block_values(device)
    turned = scale_a.t().contiguous()
    fault = in_bytes(turned, 4)

    def function(a: torch.Tensor, w: torch.Tensor, buffer: torch.Tensor, scale_b: torch.Tensor):
        return _blockwise(a, w, fault.take(buffer).t(), scale_b)

    return Case(function, [(a, w, fault.store(turned), scale_b)])


def _int_mm(position: int, offset: int, padding: int) -> Callable[[str], Case]:
    def build(device: str) -> Case:
        values = [
            torch.randint(-9, 9, shape, device=device, dtype=torch.int8)
            for shape in ((M, K), (N, K))
        ]
        fault = {position: in_bytes(values[position], offset, padding)}
        return planted_program(
            lambda a, w: torch._int_mm(a, w.t()), values, fault, inside=True
        )

    return build


def _grouped(position: int, offset: int, padding: int) -> Callable[[str], Case]:
    def build(device: str) -> Case:
        a = torch.randn(M, K, device=device).to(E4M3)
        w = torch.randn(2, N, K, device=device).to(E4M3)
        scale_a = torch.rand(M, device=device) + 0.5
        scale_b = torch.rand(2, N, device=device) + 0.5
        offs = torch.tensor([128, M], device=device, dtype=torch.int32)
        values = [a, w]
        fault = in_bytes(values[position], offset, padding)
        values[position] = fault.store(values[position])

        def function(a: torch.Tensor, w: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
            operands = [a, w]
            operands[position] = fault.take(operands[position])
            sa, sb, ends = rest
            return torch._scaled_grouped_mm(
                operands[A], operands[B].transpose(1, 2), sa, sb, offs=ends, out_dtype=BF16,
                use_fast_accum=True,
            )

        return Case(function, [(*values, scale_a, scale_b, offs)])

    return build
