"""Programs of scaled dot product attention, by backend, forward and backward.

Shapes: query, key and value (B, H, L, D), bias (B, H, L, L). Two results are the same up to a
relative error far below what one element's shift gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from contig_pass.doctor.programs import Arguments, Program

SIZES = {"b": 2, "h": 3, "l": 192, "d": 64}
TOLERANCE = 0.01

_Sizes = Mapping[str, int]
_FUSED = [
    SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION
]
_QKV = ("query", "key", "value")
_MASK = (True, True, True)


def programs() -> Iterator[Program]:
    """Every program of this family."""
    takes_bias = {"flash": False, "cudnn": True, "efficient": True, "fused": True}
    for backend, with_bias in takes_bias.items():
        yield _forward(backend, bias=False)
        yield _backward(backend, bias=False)
        if with_bias:
            yield _forward(backend, bias=True)
            yield _backward(backend, bias=True)
        if backend in ("flash", "cudnn"):
            yield _backward_tokens_first(backend)
    yield Program(
        "aten::scaled_dot_product_attention.default", "bf16, any fused backend", _values, SIZES,
        tolerance=TOLERANCE, around=lambda: sdpa_kernel(_FUSED), expected=_expected,
    )
    yield Program(
        "aten::_scaled_dot_product_flash_attention_for_cpu.default", "fp32",
        partial(_values, dtype=torch.float32), SIZES, kinds=("cpu",), tolerance=1e-5,
        expected=_expected,
    )


def _op(backend: str, suffix: str = "") -> str:
    name = "fused_attention_overrideable" if backend == "fused" else f"{backend}_attention"
    return f"aten::_scaled_dot_product_{name}{suffix}.default"


def _values(
    device: torch.device, sizes: _Sizes, dtype: torch.dtype = torch.bfloat16
) -> Arguments:
    shape = tuple(sizes[name] for name in "bhld")
    return {name: torch.randn(shape).to(dtype).to(device) for name in _QKV}


def _expected(given: Arguments) -> torch.Tensor:
    """Attention in float64."""
    q, k, v = (given[name].double() for name in _QKV)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if given.get("attn_bias") is not None:
        scores = scores + given["attn_bias"].double()
    return torch.softmax(scores, -1) @ v


def _forward(backend: str, *, bias: bool) -> Program:
    return Program(
        _op(backend), "bf16, bias" if bias else "bf16", partial(_forward_values, backend, bias),
        SIZES, operands=("attn_bias",) if bias else None, tolerance=TOLERANCE,
        expected=_expected,
    )


def _forward_values(
    backend: str, bias: bool, device: torch.device, sizes: _Sizes
) -> Arguments:
    given = _values(device, sizes)
    if backend == "flash":
        return given
    shape = (sizes["b"], sizes["h"], sizes["l"], sizes["l"])
    given["attn_bias"] = torch.randn(shape).to(torch.bfloat16).to(device) if bias else None
    if backend != "fused":
        given["compute_log_sumexp"] = True
    return given


def _backward(backend: str, *, bias: bool) -> Program:
    """Gradients of q, k and v; their reference is the op itself on dense operands."""
    return Program(
        _op(backend, "_backward"), "bf16, bias" if bias else "bf16",
        partial(_backward_values, backend, bias), SIZES,
        operands=("attn_bias",) if bias else None, tolerance=TOLERANCE, outputs=3,
    )


def _backward_tokens_first(backend: str) -> Program:
    """The output and its gradient where q, k and v lie as projections split into heads do."""
    return Program(
        _op(backend, "_backward"), "bf16, tokens first", partial(_tokens_first_values, backend),
        SIZES, operands=("grad_out", "out"), tolerance=TOLERANCE, outputs=3,
    )


def _tokens_first_values(backend: str, device: torch.device, sizes: _Sizes) -> Arguments:
    given = _forward_values(backend, False, device, sizes)
    for name in _QKV:
        given[name] = given[name].transpose(1, 2).contiguous().transpose(1, 2)
    return _backward_of(backend, False, given, device)


def _backward_values(backend: str, bias: bool, device: torch.device, sizes: _Sizes) -> Arguments:
    given = _forward_values(backend, bias, device, sizes)
    return _backward_of(backend, bias, given, device)


def _backward_of(backend: str, bias: bool, given: Arguments, device: torch.device) -> Arguments:
    op = getattr(torch.ops.aten, _op(backend).removeprefix("aten::").removesuffix(".default"))
    results = op.default(**given)
    out, logsumexp = results[0], results[1]
    arguments: dict[str, Any] = {
        "grad_out_" if backend == "efficient" else "grad_out": _like(out, device),
        **{name: given[name] for name in _QKV},
        "out": out, "logsumexp": logsumexp,
        "dropout_p": 0.0, "is_causal": False,
    }
    if backend == "efficient":
        seed, offset = results[2:4]
        arguments["grad_input_mask"] = [*_MASK, bias]
    else:
        ends_q, ends_k, longest_q, longest_k, seed, offset = results[2:8]
        arguments |= {
            "cum_seq_q": ends_q, "cum_seq_k": ends_k, "max_q": longest_q, "max_k": longest_k
        }
    if backend == "fused":
        arguments["grad_input_mask"] = [*_MASK, bias]
    if backend != "flash":
        arguments["attn_bias"] = given["attn_bias"]
    return arguments | {"philox_seed": seed, "philox_offset": offset}


def _like(out: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Normal values that lie in memory as ``out`` does."""
    values = torch.randn(tuple(out.shape)).to(out.dtype).to(device)
    return torch.empty_strided(
        out.shape, out.stride(), dtype=out.dtype, device=device
    ).copy_(values)


