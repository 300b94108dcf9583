"""Make the CPU's scaled matrix products behave as an H100's do.

The CPU kernels take any layout. Here each is replaced, through the dispatcher, so that compiled
code meets the replacement too, by one that demands what was measured on an H100 (torch
2.11.0+cu130): the demands are written out here, apart from contig_pass's contracts, so that the
two check each other. Values are those of a plain float product.

Where a demand depends on the shape (pitches of K+4 to K+12 bytes and biases off by 4 or 8 bytes
with tensor-wise scales), the emulation refuses, as the GPU did for 256 x 512 x 384.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from benchmarks.faults.recording import note

REFUSED = "CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasLtMatmulAlgoGetHeuristic`"
MAJOR = "Only multiplication of row-major and column-major matrices is supported by cuBLASLt"
BLOCK = 128


def install() -> torch.library.Library:
    """Replace the CPU kernels; they come back when the returned library is destroyed."""
    library = torch.library.Library("aten", "IMPL")
    kernels = {
        "_scaled_mm": _scaled_mm,
        "_scaled_mm_v2": _scaled_mm_v2,
        "_int_mm": _int_mm,
        "_scaled_grouped_mm": _scaled_grouped_mm,
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"(?s).*Overriding a previously registered")
        for name, kernel in kernels.items():
            if not hasattr(torch.ops.aten, name):
                continue
            library.impl(name, kernel, "CPU", allow_override=True)
            if "out" in getattr(torch.ops.aten, name).overloads():
                library.impl(f"{name}.out", _with_out(kernel), "CPU", allow_override=True)
    return library


def _with_out(kernel: Any) -> Any:
    def compute(*args: Any, out: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return out.copy_(kernel(*args, **kwargs))

    return compute


def _demand(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def _address(tensor: torch.Tensor) -> int:
    return tensor.data_ptr() % 16


def _row_major(matrix: torch.Tensor) -> bool:
    return matrix.stride(1) == 1 and matrix.stride(0) > 1


def _scaled_mm(
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale_result: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
) -> torch.Tensor:
    del scale_result, use_fast_accum
    note("_scaled_mm", a=a, b=b, scale_a=scale_a, scale_b=scale_b, bias=bias)
    _demand(a.shape[1] % 16 == 0, "Expected trailing dimension of mat1 to be divisible by 16")
    _demand(b.shape[0] % 16 == 0 and b.shape[1] % 16 == 0, "mat2 shape must be divisible by 16")
    if a.stride(1) not in (0, 1) and a.stride(0) not in (0, 1):
        a = a.contiguous()  # eager mode copies a matrix without any unit stride
    expanded = a.stride(0) == 0
    _demand((_row_major(a) or expanded) and _row_major(b.t()), MAJOR)
    for matrix in (a, b.t()):
        pitch = matrix.stride(0) * matrix.element_size()
        _demand(_address(matrix) == 0 and pitch % 16 == 0, REFUSED)
    for scale in (scale_a, scale_b):
        _demand(_address(scale) == 0, REFUSED)
    left = _expand_scale(scale_a, a.shape)
    right = _expand_scale(scale_b.t() if scale_b.dim() == 2 else scale_b, b.t().shape)
    product = (a.contiguous().float() * left) @ (b.t().contiguous().float() * right).t()
    if bias is not None:
        _demand(_address(bias) == 0, REFUSED)
        if bias.stride(0) != 1:  # the kernel reads N elements in a row, whatever the stride
            bias = bias.as_strided(bias.shape, (1,))
        product = product + bias.float()
    return product.to(out_dtype or a.dtype)


def _expand_scale(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The scale of every element of a (rows, K) operand."""
    rows, k = shape
    if scale.numel() == 1:
        return scale.reshape(())
    blocks = (k + BLOCK - 1) // BLOCK
    if scale.shape == (rows, 1):
        _demand(scale.is_contiguous() or scale.stride(0) == 1, "Invalid scaling configuration.")
        return scale.contiguous()
    if scale.shape == (rows, blocks):
        _demand(scale.stride(0) == 1, "Invalid scaling configuration.")
        return scale.contiguous().repeat_interleave(BLOCK, 1)[:, :k]
    _demand(scale.stride(1) == 1, "Invalid scaling configuration.")
    wide = scale.contiguous().repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return wide[:rows, :k]


def _scaled_mm_v2(
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: list[torch.Tensor],
    recipe_a: list[int],
    swizzle_a: list[int],
    scale_b: list[torch.Tensor],
    recipe_b: list[int],
    swizzle_b: list[int],
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    contraction_dim: list[int] | None = None,
    use_fast_accum: bool = False,
) -> torch.Tensor:
    del recipe_a, swizzle_a, recipe_b, swizzle_b, contraction_dim
    return _scaled_mm(
        a, b, scale_a[0], scale_b[0], bias, None, out_dtype, use_fast_accum
    )


def _int_mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    note("_int_mm", a=a, b=b)
    for matrix in (a, b):
        pitch = max(matrix.stride())
        _demand(matrix.data_ptr() % 4 == 0 and pitch % 4 == 0, REFUSED)
    return (a.contiguous().double() @ b.contiguous().double()).to(torch.int32)


def _scaled_grouped_mm(
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    scale_result: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
) -> torch.Tensor:
    del bias, scale_result, use_fast_accum
    note("_scaled_grouped_mm", a=a, b=b, scale_a=scale_a, scale_b=scale_b)
    _demand(a.stride(1) == 1 and b.stride(1) == 1, "Expected mat_a row-major, mat_b transposed")
    for matrix in (a, b):
        _demand(_address(matrix) == 0, "expected data_ptr to be aligned to 16 bytes")
        strides = [s for s in matrix.stride() if s != 1]
        _demand(all(s % 16 == 0 for s in strides), "strides should be multiple of 16 bytes")
    outputs, start = [], 0
    for group, end in enumerate(offs.tolist()):
        rows = slice(start, end)
        left = a[rows].contiguous().float() * scale_a[rows, None]
        right = b[group].contiguous().float() * scale_b[group]
        outputs.append(left @ right)
        start = end
    return torch.cat(outputs).to(out_dtype or torch.bfloat16)
