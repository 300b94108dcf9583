"""Exact attention, layouts of its operands, and stand-ins for the packages that need a GPU.

A stand-in has its package's entry points and does to memory what the package does: which layouts
it takes, which its result has, and what it writes. Values are exact attention in float64.
"""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Callable

import pytest
import torch

from wan_models.attention import packages

E4M3 = torch.float8_e4m3fn


def exact(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_lens: torch.Tensor | None = None
) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v in float64, sample by sample and head by head."""
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    for b in range(q.shape[0]):
        keys = k.shape[1] if k_lens is None else int(k_lens[b])
        for h in range(q.shape[2]):
            scores = q[b, :, h].double() @ k[b, :keys, h].double().t() / math.sqrt(q.shape[-1])
            out[b, :, h] = torch.softmax(scores, -1) @ v[b, :keys, h].double()
    return out


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours.double() - theirs).norm() / theirs.norm()).item()


def operands(
    batch: int = 2, queries: int = 7, keys: int = 9, heads: int = 2, size: int = 64,
    dtype: torch.dtype = torch.float32,
) -> list[torch.Tensor]:
    """Random q, k and v."""
    torch.manual_seed(0)
    return [torch.randn(batch, n, heads, size).to(dtype) for n in (queries, keys, keys)]


def head_major(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def fused_chunk(x: torch.Tensor) -> torch.Tensor:
    """The last of three chunks of one projection."""
    fused = torch.full((*x.shape[:2], 3 * x.shape[2], x.shape[3]), 7.0, dtype=x.dtype)
    fused[:, :, 2 * x.shape[2] :] = x
    return fused.chunk(3, dim=2)[2]


def padded_slice(x: torch.Tensor) -> torch.Tensor:
    """Tokens cut out of a longer buffer."""
    buffer = torch.full((x.shape[0], x.shape[1] + 5, *x.shape[2:]), 7.0, dtype=x.dtype)
    buffer[:, 2:-3] = x
    return buffer[:, 2:-3]


def offset(x: torch.Tensor) -> torch.Tensor:
    """Dense, 16 bytes into its storage."""
    elements = 16 // x.element_size()
    storage = torch.full((x.numel() + elements,), 7.0, dtype=x.dtype)
    storage[elements:] = x.flatten()
    return storage[elements:].view(x.shape)


def misaligned(x: torch.Tensor) -> torch.Tensor:
    """Dense, one element into its storage."""
    storage = torch.full((x.numel() + 1,), 7.0, dtype=x.dtype)
    storage[1:] = x.flatten()
    return storage[1:].view(x.shape)


def strided(x: torch.Tensor) -> torch.Tensor:
    """The last dimension is not unit-stride."""
    return x.transpose(1, 3).contiguous().transpose(1, 3)


LAYOUTS = (head_major, fused_chunk, padded_slice, offset)


def _vectors(*tensors: torch.Tensor) -> None:
    """What kernels that load 16 bytes at a time object to."""
    for x in tensors:
        if x.stride(-1) != 1:
            raise RuntimeError("last dimension must be contiguous")
        pitches = [s for s, n in zip(x.stride()[:-1], x.shape[:-1], strict=True) if n > 1]
        if x.data_ptr() % 16 or any(s * x.element_size() % 16 for s in pitches):
            raise RuntimeError("misaligned address")


def _descaled(
    tensors: list[torch.Tensor], scales: list[torch.Tensor]
) -> list[torch.Tensor]:
    """e4m3 times one fp32 scale for each sample and head."""
    for x, scale in zip(tensors, scales, strict=True):
        assert x.dtype == E4M3
        assert scale.dtype == torch.float32
        assert scale.shape == (x.shape[0], x.shape[2])
    return [x.double() * s[:, None, :, None] for x, s in zip(tensors, scales, strict=True)]


def _batched(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    _vectors(q, k, v)
    return exact(q, k, v).to(q.dtype)


def packed_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_bounds: torch.Tensor,
    k_bounds: torch.Tensor, q_longest: int, k_longest: int,
    scales: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    """``scales`` of q, k and v, (sequences, H), where they are e4m3."""
    _vectors(q, k, v)
    assert q_bounds.dtype == k_bounds.dtype == torch.int32
    assert q_bounds.is_contiguous()
    assert k_bounds.is_contiguous()
    dtype = torch.bfloat16 if q.dtype == E4M3 else q.dtype
    out = torch.full(q.shape, torch.nan, dtype=dtype)
    at, key_at = q_bounds.tolist(), k_bounds.tolist()
    assert at[-1] == len(q)
    assert key_at[-1] == len(k)
    for i in range(len(at) - 1):
        rows, keys = slice(at[i], at[i + 1]), slice(key_at[i], key_at[i + 1])
        assert 0 <= at[i + 1] - at[i] <= q_longest
        assert 0 <= key_at[i + 1] - key_at[i] <= k_longest
        if at[i] < at[i + 1]:
            parts = [q[None, rows], k[None, keys], v[None, keys]]
            if scales is not None:
                parts = _descaled(parts, [scale[i : i + 1] for scale in scales])
            out[rows] = exact(*parts)[0].to(dtype)
    return out


def flash_attn() -> types.ModuleType:
    """flash-attn 2: results in the order of q where q is dense."""
    module = types.ModuleType("flash_attn")
    module.__version__ = "2.8.3"
    module.flash_attn_func = lambda q, k, v, **_: torch.empty_like(q).copy_(_batched(q, k, v))
    module.flash_attn_varlen_func = lambda *args, **_: torch.empty_like(args[0]).copy_(
        packed_attention(*args)
    )
    return module


def flash_attn_interface(*, returns_tuple: bool) -> types.ModuleType:
    """FlashAttention 3: dense results, beside the log-sum-exp in older versions."""
    def finish(out: torch.Tensor) -> object:
        return (out, out.new_zeros(1)) if returns_tuple else out

    module = types.ModuleType("flash_attn_interface")
    module.__version__ = "3.0.0b1" if returns_tuple else "3.0.0"
    def batched(q, k, v, q_descale=None, k_descale=None, v_descale=None):
        if q.dtype != E4M3:
            return finish(_batched(q, k, v))
        _vectors(q, k, v)
        wide = _descaled([q, k, v], [q_descale, k_descale, v_descale])
        return finish(exact(*wide).to(torch.bfloat16))

    def packed(*args, q_descale=None, k_descale=None, v_descale=None):
        scales = None if q_descale is None else [q_descale, k_descale, v_descale]
        return finish(packed_attention(*args, scales))

    module.flash_attn_func, module.flash_attn_varlen_func = batched, packed
    return module


def flash_attn_cute() -> types.ModuleType:
    """FlashAttention 4: dense results beside the log-sum-exp; bounds by name."""
    module = types.ModuleType("flash_attn.cute")
    module.__version__ = "4.0.0b28"

    def packed(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
        bounds = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        return packed_attention(q, k, v, *bounds), None

    module.flash_attn_func = lambda q, k, v: (_batched(q, k, v), None)
    module.flash_attn_varlen_func = packed
    return module


def sageattention() -> types.ModuleType:
    """SageAttention 2: results dense in the layout asked for, whatever q's strides."""
    def sageattn(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tensor_layout: str = "HND"
    ) -> torch.Tensor:
        assert tensor_layout == "NHD"
        assert q.shape[-1] in (64, 128)
        _vectors(q, k, v)
        return exact(q, k, v).to(q.dtype)

    module = types.ModuleType("sageattention")
    module.__version__ = "2.2.0"
    module.sageattn = sageattn
    return module


def sageattn3() -> types.ModuleType:
    """SageAttention 3: head-major, and the mean of the keys is subtracted from the caller's k."""
    def sageattn3_blackwell(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: None = None,
        is_causal: bool = False, per_block_mean: bool = True,
    ) -> torch.Tensor:
        assert attn_mask is None
        assert not per_block_mean
        k -= k.mean(dim=-2, keepdim=True)
        for x in (q, v):
            if x.is_contiguous() and x.shape[2] % 128 == 0 and x.data_ptr() % 32:
                raise RuntimeError("misaligned address")
        out = exact(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
        return out.to(q.dtype).contiguous()

    module = types.ModuleType("sageattn3")
    module.__version__ = "1.0.0"
    module.sageattn3_blackwell = sageattn3_blackwell
    return module


#: Compute capability at which each mode of a package runs.
CAPABILITIES = {
    "flash_attn_2": (9, 0),
    "flash_attn_3": (9, 0),
    "flash_attn_3_fp8": (9, 0),
    "flash_attn_4": (9, 0),
    "sageattn": (9, 0),
    "sageattn_3": (12, 0),
    "sageattn_3_fp4": (12, 0),
    "sageattn_3_fp8": (12, 0),
}


def install(patch: pytest.MonkeyPatch, *modules: types.ModuleType) -> None:
    """Make ``modules`` importable, and packages' metadata unknown."""
    for module in modules:
        patch.setitem(sys.modules, module.__name__, module)


def install_all(patch: pytest.MonkeyPatch) -> None:
    install(
        patch, flash_attn(), flash_attn_interface(returns_tuple=False), flash_attn_cute(),
        sageattention(), sageattn3(),
    )


def pretend(patch: pytest.MonkeyPatch, sm: tuple[int, int] | None) -> None:
    """Let every device pass for a GPU of compute capability ``sm``."""
    answer: Callable[[str, int | None], tuple[int, int] | None] = lambda kind, index: sm  # noqa: E731
    patch.setattr(packages, "capability", answer)


def pretend_for(patch: pytest.MonkeyPatch, mode: str) -> None:
    """:func:`pretend` the capability that the package behind ``mode`` needs, if there is one."""
    if mode in CAPABILITIES:
        pretend(patch, CAPABILITIES[mode])
