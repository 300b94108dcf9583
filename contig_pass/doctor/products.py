"""Programs of the scaled, grouped and int8 matrix products.

Values are small integers and scales powers of two, so that every sum is exact in whatever order a
kernel adds: two results are the same bit by bit, or something was read that should not have been.
Shapes: a (M, K), b (K, N), as the transpose of w (N, K).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch

from contig_pass.doctor.programs import Arguments, Program

E4M3, BF16 = torch.float8_e4m3fn, torch.bfloat16
SIZES = {"m": 256, "k": 512, "n": 384}
DIMS = {"self": ("m", "k"), "mat2": ("k", "n")}
BLOCK = 128

#: torch.nn.functional.ScalingType and SwizzleType, by value.
TENSOR, ROW, BLOCK_1X16, BLOCK_1X32, BLOCK_1X128, BLOCK_128X128 = range(6)
NO_SWIZZLE, SWIZZLE_32_4_4 = range(2)

TENSOR_WISE, ROW_WISE = "tensor-wise", "row-wise"
BY_128 = "1x128 by 128x128"
_OF_SIDE = {
    TENSOR_WISE: (TENSOR, TENSOR),
    ROW_WISE: (ROW, ROW),
    BY_128: (BLOCK_1X128, BLOCK_128X128),
    "1x128 by 1x128": (BLOCK_1X128, BLOCK_1X128),
    "128x128 by 1x128": (BLOCK_128X128, BLOCK_1X128),
}
MXFP8, NVFP4 = "MXFP8", "NVFP4"

_Sizes = Mapping[str, int]
_SCALES = ("scale_a", "scale_b")


def programs() -> Iterator[Program]:
    """Every program of this family."""
    for recipe in _OF_SIDE:
        yield _scaled_mm(recipe)
        yield _scaled_mm_v2(recipe)
    for recipe in (MXFP8, NVFP4):
        yield _micro("aten::_scaled_mm.default", recipe)
        yield _micro("aten::_scaled_mm_v2.default", recipe)
    # Forms with out= launch the same kernels, so one recipe of each kind of contract will do.
    for program in (_scaled_mm(ROW_WISE), _scaled_mm_v2(TENSOR_WISE)):
        yield _with_out(program)
    for program in (_scaled_mm(BY_128), _scaled_mm_v2(BY_128)):
        yield _with_out(replace(program, operands=_SCALES))
    for op in ("aten::_scaled_grouped_mm.default", "aten::_scaled_grouped_mm_v2.default"):
        yield _grouped(op, bias=False)
        yield _grouped(op, bias=True)
    int_mm = Program(
        "aten::_int_mm.default", "int8", _int8, SIZES, kinds=("cuda", "cpu"),
        expected=_int8_expected,
    )
    yield int_mm
    yield _with_out(int_mm, torch.int32)


# -- values --------------------------------------------------------------------------------------


def _integers(device: torch.device, *shape: int, dtype: torch.dtype = E4M3) -> torch.Tensor:
    return torch.randint(-4, 5, shape).to(dtype).to(device)


def _powers_of_two(device: torch.device, *shape: int) -> torch.Tensor:
    """0.5, 1 or 2."""
    return torch.exp2(torch.randint(-1, 2, shape).float()).to(device)


def _transposed(x: torch.Tensor) -> torch.Tensor:
    """The same values with the last two dimensions the other way round in memory."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def _padded_to_4(x: torch.Tensor) -> torch.Tensor:
    """(rows, K blocks) with zeros up to a multiple of 4 K blocks."""
    return torch.nn.functional.pad(x, (0, -x.shape[1] % 4))


def _of_elements(scale: torch.Tensor, rows: int, k: int) -> torch.Tensor:
    """The scale of every element of a (rows, K) operand, from (row blocks, K blocks)."""
    if scale.numel() == 1:
        return scale.reshape(1, 1)
    for dim, size in enumerate((rows, k)):
        if scale.shape[dim] not in (1, size):
            scale = scale.repeat_interleave(BLOCK, dim).narrow(dim, 0, size)
    return scale


def _product(
    a: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, out: torch.dtype
) -> torch.Tensor:
    """a times w transposed plus bias, exact but for the rounding to ``out``."""
    exact = a.double() @ w.double().t()
    if bias is not None:
        exact = exact + bias.double()
    return exact.float().to(out).double()


# -- _scaled_mm ----------------------------------------------------------------------------------


def _scale(device: torch.device, recipe: int, rows: int, k: int) -> torch.Tensor:
    """Scales (row blocks, K blocks) of a (rows, K) operand, dense in that order."""
    blocks = -(-k // BLOCK)
    shape = {
        TENSOR: (),
        ROW: (rows, 1),
        BLOCK_1X128: (rows, blocks),
        BLOCK_128X128: (-(-rows // BLOCK), blocks),
    }[recipe]
    return _powers_of_two(device, *shape)


def _float8(
    op: str,
    recipe: str,
    build: Callable[[str, torch.device, _Sizes], Arguments],
    expected: Callable[[Arguments], torch.Tensor],
) -> Program:
    plain = recipe in (TENSOR_WISE, ROW_WISE)
    matrices = plain or (recipe == BY_128 and op == "aten::_scaled_mm.default")
    return Program(
        op, recipe, partial(build, recipe), SIZES,
        # Block-wise scales cover whole blocks of K.
        dims=DIMS if plain else {},
        operands=None if matrices else _SCALES,
        kinds=("cuda", "cpu") if plain else ("cuda",),
        expected=expected,
    )


def _scaled_mm(recipe: str) -> Program:
    return _float8("aten::_scaled_mm.default", recipe, _first, _first_expected)


def _first(recipe: str, device: torch.device, sizes: _Sizes) -> Arguments:
    m, k, n = sizes["m"], sizes["k"], sizes["n"]
    of_a, of_b = _OF_SIDE[recipe]
    a, w = _integers(device, m, k), _integers(device, n, k)
    scale_a, scale_b = _scale(device, of_a, m, k), _scale(device, of_b, n, k)
    if of_a == BLOCK_1X128:
        scale_a = _transposed(scale_a)
    if of_b == BLOCK_1X128:
        scale_b = _transposed(scale_b)
    if of_b != TENSOR:
        scale_b = scale_b.t()
    return {
        "self": a, "mat2": w.t(), "scale_a": scale_a, "scale_b": scale_b,
        # Block-wise kernels take no bias.
        "bias": _integers(device, n, dtype=BF16) if of_a in (TENSOR, ROW) else None,
        "out_dtype": BF16,
    }


def _first_expected(given: Arguments) -> torch.Tensor:
    a, w = given["self"].float(), given["mat2"].t().float()
    scale_a, scale_b = given["scale_a"], given["scale_b"]
    right = scale_b.t() if scale_b.dim() == 2 else scale_b
    return _product(
        a * _of_elements(scale_a, *a.shape), w * _of_elements(right, *w.shape), given["bias"], BF16
    )


# -- _scaled_mm_v2 -------------------------------------------------------------------------------


def _scaled_mm_v2(recipe: str) -> Program:
    expected = partial(_second_expected, recipe)
    return _float8("aten::_scaled_mm_v2.default", recipe, _second, expected)


def _second(recipe: str, device: torch.device, sizes: _Sizes) -> Arguments:
    given = _first(recipe, device, sizes)
    of_a, of_b = _OF_SIDE[recipe]
    scale_a, scale_b = given["scale_a"], given["scale_b"]
    if of_b == BLOCK_1X128:
        scale_b = scale_b.t()  # (N, K blocks) here
    if of_a == BLOCK_128X128:
        scale_a = _padded_to_4(scale_a).t()  # (K blocks, row blocks) here, on either side
    if of_b == BLOCK_128X128:
        scale_b = _padded_to_4(scale_b.t()).t()
    return _listed(given, (scale_a, of_a, NO_SWIZZLE), (scale_b, of_b, NO_SWIZZLE))


def _listed(
    given: Arguments, a: tuple[torch.Tensor, int, int], b: tuple[torch.Tensor, int, int]
) -> Arguments:
    """Arguments of the second generation from those of the first."""
    return {
        "self": given["self"], "mat2": given["mat2"],
        "scale_a": [a[0]], "recipe_a": [a[1]], "swizzle_a": [a[2]],
        "scale_b": [b[0]], "recipe_b": [b[1]], "swizzle_b": [b[2]],
        "bias": given["bias"], "out_dtype": given["out_dtype"],
    }


def _second_expected(recipe: str, given: Arguments) -> torch.Tensor:
    of_a, of_b = _OF_SIDE[recipe]
    a, w = given["self"].float(), given["mat2"].t().float()
    blocks = -(-a.shape[1] // BLOCK)
    left, right = given["scale_a"][0], given["scale_b"][0]
    left = left.t()[:, :blocks] if of_a == BLOCK_128X128 else left
    right = right.t() if of_b in (ROW, BLOCK_128X128) else right
    right = right[:, :blocks] if of_b == BLOCK_128X128 else right
    return _product(
        a * _of_elements(left, *a.shape), w * _of_elements(right, *w.shape), given["bias"], BF16
    )


# -- micro-scaled formats ------------------------------------------------------------------------


def _micro(op: str, recipe: str) -> Program:
    second = op.startswith("aten::_scaled_mm_v2")
    build = partial(_micro_build, recipe, second)
    # Products of block scales may be rounded before they are added.
    return Program(
        op, recipe, build, SIZES, tolerance=1e-3, expected=partial(_micro_expected, recipe)
    )


def _micro_build(recipe: str, second: bool, device: torch.device, sizes: _Sizes) -> Arguments:
    m, k, n = sizes["m"], sizes["k"], sizes["n"]
    given: Arguments = {"bias": None, "out_dtype": BF16}
    # Scales of 1, so that the order in which the kernel wants them does not matter.
    if recipe == MXFP8:
        given |= {"self": _integers(device, m, k), "mat2": _integers(device, n, k).t()}
        ones, of, block = torch.full((m * n,), 127, dtype=torch.uint8), BLOCK_1X32, 32
        ones = ones.view(torch.float8_e8m0fnu)
    else:
        packed = [torch.randint(0, 256, (rows, k // 2), dtype=torch.uint8) for rows in (m, n)]
        a, w = (p.to(device).view(torch.float4_e2m1fn_x2) for p in packed)
        given |= {"self": a, "mat2": w.t()}
        ones, of, block = torch.ones(m * n).to(E4M3), BLOCK_1X16, 16
    # A column of scales for every block of K; rows padded to 128, columns to 4.
    columns = -(-(k // block) // 4) * 4
    scale_a, scale_b = (
        ones[: -(-rows // BLOCK) * BLOCK * columns].to(device).clone() for rows in (m, n)
    )
    if second:
        return _listed(given, (scale_a, of, SWIZZLE_32_4_4), (scale_b, of, SWIZZLE_32_4_4))
    return given | {"scale_a": scale_a, "scale_b": scale_b}


def _micro_expected(recipe: str, given: Arguments) -> torch.Tensor:
    a, w = given["self"], given["mat2"].t()
    if recipe == NVFP4:
        a, w = (_e2m1(x.view(torch.uint8)) for x in (a, w))
    return _product(a.float(), w.float(), given["bias"], BF16)


def _e2m1(packed: torch.Tensor) -> torch.Tensor:
    """(rows, K) values of (rows, K / 2) bytes, the first of two in the low half."""
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], device=packed.device)
    values = torch.cat((values, -values))
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
    return values[codes.long()]


# -- other forms ---------------------------------------------------------------------------------


def _with_out(program: Program, dtype: torch.dtype = BF16) -> Program:
    def build(device: torch.device, sizes: _Sizes) -> Arguments:
        given = program.build(device, sizes)
        out = torch.zeros(
            given["self"].shape[0], given["mat2"].shape[1], dtype=dtype, device=device
        )
        return given | {"out": out}

    return replace(program, op=program.op.replace(".default", ".out"), build=build)


def _int8(device: torch.device, sizes: _Sizes) -> Arguments:
    a = _integers(device, sizes["m"], sizes["k"], dtype=torch.int8)
    return {"self": a, "mat2": _integers(device, sizes["n"], sizes["k"], dtype=torch.int8).t()}


def _int8_expected(given: Arguments) -> torch.Tensor:
    return given["self"].double() @ given["mat2"].double()


def _grouped(op: str, *, bias: bool) -> Program:
    build = partial(_grouped_build, op.startswith("aten::_scaled_grouped_mm_v2"), bias)
    return Program(
        op, f"{ROW_WISE}, bias" if bias else ROW_WISE, build, SIZES,
        operands=("bias",) if bias else None, expected=_grouped_expected,
    )


def _grouped_build(second: bool, bias: bool, device: torch.device, sizes: _Sizes) -> Arguments:
    m, k, n = sizes["m"], sizes["k"], sizes["n"]
    given: Arguments = {
        "self": _integers(device, m, k), "mat2": _integers(device, 2, n, k).transpose(1, 2),
        "bias": _integers(device, 2, n, dtype=BF16) if bias else None, "out_dtype": BF16,
    }
    offs = torch.tensor([m // 2, m], dtype=torch.int32).to(device)
    scale_a, scale_b = _powers_of_two(device, m), _powers_of_two(device, 2, n)
    if second:
        return _listed(given, (scale_a, ROW, NO_SWIZZLE), (scale_b, ROW, NO_SWIZZLE)) | {
            "offs": offs
        }
    # The slower, exact accumulation is not what grouped kernels are built for.
    return given | {
        "scale_a": scale_a, "scale_b": scale_b, "offs": offs, "use_fast_accum": True
    }


def _grouped_expected(given: Arguments) -> torch.Tensor:
    scale_a, scale_b = given["scale_a"], given["scale_b"]
    if isinstance(scale_a, list):
        scale_a, scale_b = scale_a[0], scale_b[0]
    a, w = given["self"].float() * scale_a[:, None], given["mat2"].transpose(1, 2).float()
    groups, start = [], 0
    for group, end in enumerate(given["offs"].tolist()):
        weight = w[group] * scale_b[group][:, None]
        bias = None if given["bias"] is None else given["bias"][group]
        groups.append(_product(a[start:end], weight, bias, BF16))
        start = end
    return torch.cat(groups)


