"""Attention of a GPU in a trace that has none.

On CPU tensors ``scaled_dot_product_attention`` becomes torch's CPU kernel, whose demands are not
those of a GPU; on CUDA tensors without a GPU the choice of a kernel asks a driver that is not
there. While a graph is rehearsed for a GPU, this module takes the choice as torch takes it on the
GPU (``aten/src/ATen/native/transformers/attention.cpp`` and ``cuda/sdp_utils.cpp``), and the graph
calls the op that it would call there.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch.nn import functional as F

from contig_pass.contracts.target import Target
from contig_pass.inductor import relaxed
from contig_pass.layout import known

CUDNN, FLASH, EFFICIENT, MATH = "cudnn", "flash", "efficient", "math"

_TARGET: ContextVar[Target | None] = ContextVar("contig_pass_rehearsed", default=None)
_installing = threading.Lock()
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
#: torch's flash kernel takes head dimensions that are multiples of 8, and pads others to one.
_FLASH_MULTIPLE = 8
#: Elements by which rows of a mask lie apart where the memory-efficient kernel reads it.
_MASK_MULTIPLE = 8


@contextlib.contextmanager
def rehearsing(target: Target) -> Iterator[None]:
    """Inside the block attention is traced as it would run on ``target``."""
    relaxed.install()
    with _installing:
        _wrap_attention()
    token = _TARGET.set(target if target.kind == "cuda" else None)
    try:
        yield
    finally:
        _TARGET.reset(token)


@functools.cache
def _wrap_attention() -> None:
    op = torch.ops.aten.scaled_dot_product_attention.default
    earlier = op.py_kernels.get(_COMPOSITE) or functools.partial(op._op_dk, _COMPOSITE)

    def attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        target = _TARGET.get()
        if target is None:
            return earlier(
                query, key, value, attn_mask, dropout_p, is_causal,
                scale=scale, enable_gqa=enable_gqa,
            )
        query, key, value = map(relaxed.with_unit_stride, (query, key, value))
        chosen = choose(target, query, key, value, attn_mask, enable_gqa)
        if chosen == MATH:
            return torch.ops.aten._scaled_dot_product_attention_math.default(
                query, key, value, attn_mask, dropout_p, is_causal,
                scale=scale, enable_gqa=enable_gqa,
            )[0]
        return _CALLS[chosen](query, key, value, _additive(attn_mask, query), dropout_p, is_causal,
                              scale)

    op.py_kernels[_COMPOSITE] = attention
    op._dispatch_cache.clear()


def choose(
    target: Target,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    enable_gqa: bool = False,
) -> str:
    """The kernel that torch takes on a GPU: the first that is allowed and takes the operands.

    cuDNN comes first on data-centre Hopper and Blackwell, flash elsewhere. Kernels are allowed and
    forbidden by ``torch.nn.attention.sdpa_kernel``.

    Args:
        target: a CUDA device.
        query: (B, H, L, D).
        key, value: (B, H, S, D).
        mask: broadcastable to (B, H, L, S).
        enable_gqa: key and value may have fewer heads.

    Returns:
        ``"cudnn"``, ``"flash"``, ``"efficient"`` or ``"math"``.
    """
    major, size = (target.capability or (0, 0))[0], query.shape[-1]
    alike = query.dtype == key.dtype == value.dtype and all(
        tensor.dim() == 4 for tensor in (query, key, value)
    )
    if not alike or any(known(tensor.numel() == 0) is not False for tensor in (query, key, value)):
        return MATH
    half = query.dtype == torch.float16 or (query.dtype == torch.bfloat16 and major >= 8)
    equal_heads = size == key.shape[-1] == value.shape[-1]
    several = all(known(tensor.shape[-2] == 1) is False for tensor in (query, key))
    flash = half and major >= 8 and size <= 256 and equal_heads and mask is None
    cudnn = half and size % 8 == 0 and size <= 128 and equal_heads and several
    multiple = 8 if half else 4
    efficient = (half or query.dtype == torch.float32) and not enable_gqa and all(
        tensor.shape[-1] % multiple == 0 for tensor in (query, value)
    )
    ranked = [
        (CUDNN, cudnn and major in (9, 10) and torch._C._get_cudnn_sdp_enabled()),
        (FLASH, flash and torch._C._get_flash_sdp_enabled()),
        (EFFICIENT, efficient and torch._C._get_mem_efficient_sdp_enabled()),
        (CUDNN, cudnn and torch._C._get_cudnn_sdp_enabled()),
    ]
    return next((name for name, fits in ranked if fits), MATH)


def _additive(mask: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor | None:
    """A boolean mask as the numbers that the kernels add."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    zero = torch.zeros((), dtype=query.dtype, device=query.device)
    return torch.where(mask, zero, -torch.inf)


def _cudnn(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
    dropout_p: float, is_causal: bool, scale: float | None,
) -> torch.Tensor:
    op = torch.ops.aten._scaled_dot_product_cudnn_attention.default
    return op(query, key, value, mask, False, dropout_p, is_causal, False, scale=scale)[0]


def _flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
    dropout_p: float, is_causal: bool, scale: float | None,
) -> torch.Tensor:
    del mask  # it takes none
    size = query.shape[-1]
    missing = -size % _FLASH_MULTIPLE
    if missing:
        scale = size**-0.5 if scale is None else scale
        query, key, value = (F.pad(tensor, (0, missing)) for tensor in (query, key, value))
    op = torch.ops.aten._scaled_dot_product_flash_attention.default
    out = op(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    return out[..., :size] if missing else out


def _efficient(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
    dropout_p: float, is_causal: bool, scale: float | None,
) -> torch.Tensor:
    if mask is not None:
        mask = _padded(mask).expand(*query.shape[:3], key.shape[2])
    op = torch.ops.aten._scaled_dot_product_efficient_attention.default
    return op(query, key, value, mask, False, dropout_p, is_causal, scale=scale)[0]


def _padded(mask: torch.Tensor) -> torch.Tensor:
    """torch lays a mask out anew, with room between its rows, unless its strides fit already."""
    *pitches, last = mask.stride()
    if last == 1 and all(pitch % _MASK_MULTIPLE == 0 for pitch in pitches):
        return mask
    keys = mask.shape[-1]
    return F.pad(mask, (0, _MASK_MULTIPLE - keys % _MASK_MULTIPLE))[..., :keys]


_CALLS = {CUDNN: _cudnn, FLASH: _flash, EFFICIENT: _efficient}
