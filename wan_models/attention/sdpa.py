"""Attention by torch's own kernels: ``F.scaled_dot_product_attention``, one backend by name.

Mode ``"sdpa"`` takes the fastest backend of the machine, by a rule and not by trying: see
:func:`choose`. The other modes take the backend that they name, or refuse.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from wan_models.attention import packages
from wan_models.attention.contracts import VECTORS, bind, dense
from wan_models.attention.varlen import pack

_BACKENDS = {
    "torch": None,  # torch chooses
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
MODES = ("sdpa", "sdpa_cudnn", "sdpa_flash", "sdpa_efficient", "sdpa_math")
_CUDA_ONLY = ("sdpa_cudnn", "sdpa_efficient")
#: Backends that have no kernel for wider types on CUDA.
_CUDA_HALF_ONLY = ("sdpa_cudnn", "sdpa_flash")
#: Bytes that the rows of a mask lie apart: vector loads on CUDA need them aligned.
_MASK_PITCH = 16


class Choice(NamedTuple):
    """A backend, and why it."""

    backend: str
    reason: str


def run(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_lens: torch.Tensor | None, mode: str
) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v by ``mode``, one of :data:`MODES`.

    Args:
        q: (B, L, H, D).
        k, v: (B, S, H, D).
        k_lens: (B,) valid keys.
        mode: checked by :func:`obstacle` before.

    Returns:
        (B, L, H, D); strides are the backend's: head-major from ``sdpa_math``, dense or in the
        order of q from the others.
    """
    backend = mode.removeprefix("sdpa_")
    if mode == "sdpa":
        sm, cudnn = _machine(q.device.type, q.device.index)
        backend = choose(
            sm, q.dtype, q.shape[-1], masked=k_lens is not None, cudnn=cudnn,
            unit_stride=all(x.stride(-1) == 1 for x in (q, k, v)),
            several_tokens=q.shape[1] > 1 and k.shape[1] > 1,
        ).backend
    if backend == "flash" and k_lens is not None and q.device.type == "cuda":
        # torch's flash kernel takes no mask there, but bounds of sequences.
        return sdpa_flash_varlen(*pack(q, k, v, k_lens)).unflatten(0, q.shape[:2])
    mask = None if k_lens is None else key_mask(k_lens.to(k.device), k.shape[1], q.dtype)
    chosen = _BACKENDS[backend]
    with sdpa_kernel(chosen) if chosen is not None else contextlib.nullcontext():
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask
        )
    return out.transpose(1, 2)


@torch.library.custom_op("wan_models::sdpa_flash_varlen", mutates_args=())
def sdpa_flash_varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_bounds: torch.Tensor,
    k_bounds: torch.Tensor, q_longest: int, k_longest: int,
) -> torch.Tensor:
    """torch's flash kernel over the sequences of :class:`wan_models.attention.varlen.Packed`.

    Returns (B*L, H, D), dense. Behind an op of ours because contracts speak of operands by name,
    and torch names those of its own op nowhere in public.
    """
    from torch.nn.attention.varlen import varlen_attn

    return dense(varlen_attn(q, k, v, q_bounds, k_bounds, q_longest, k_longest))


@sdpa_flash_varlen.register_fake
def _fake(q: torch.Tensor, *_: object) -> torch.Tensor:
    return q.new_empty(q.shape)


def key_mask(k_lens: torch.Tensor, keys: int, dtype: torch.dtype) -> torch.Tensor:
    """The mask of padded keys, (B, 1, 1, S).

    On a GPU it is the additive one, whose rows start on 16 bytes whatever S is: a boolean mask
    would be turned into one whose rows do not, and cuDNN reads such a mask wrongly.
    """
    if k_lens.device.type != "cuda":
        return (torch.arange(keys, device=k_lens.device) < k_lens[:, None])[:, None, None, :]
    return additive_mask(k_lens, keys, dtype)


def additive_mask(k_lens: torch.Tensor, keys: int, dtype: torch.dtype) -> torch.Tensor:
    """0 for valid keys and -inf for the others, (B, 1, 1, S), rows aligned to 16 bytes."""
    multiple = _MASK_PITCH // dtype.itemsize
    pitch = -(-keys // multiple) * multiple
    valid = torch.arange(pitch, device=k_lens.device) < k_lens[:, None]
    mask = torch.zeros(valid.shape, dtype=dtype, device=k_lens.device)
    return mask.masked_fill(~valid, -torch.inf)[:, None, None, :keys]


def choose(
    capability: tuple[int, int] | None,
    dtype: torch.dtype,
    head_dim: int,
    *,
    masked: bool,
    unit_stride: bool = True,
    several_tokens: bool = True,
    cudnn: bool = True,
) -> Choice:
    """The fastest backend that takes the arguments, by rule.

    On an H100 at Wan's shapes cuDNN does 596 TFLOPS where flash does 359 (torch 2.11, bf16, head
    dimension 128), so where cuDNN's kernels are made for the GPU it comes first; flash takes no
    mask; the memory-efficient kernel takes masks and fp32; math takes everything. The limits are
    those that torch itself checks before it calls a backend.

    Args:
        capability: of the GPU; ``None`` on any other device, where torch chooses.
        dtype: of q, k and v.
        head_dim: D.
        masked: whether keys are masked.
        unit_stride: whether the last dimension of all three is unit-stride.
        several_tokens: whether there is more than one query and more than one key.
        cudnn: whether cuDNN's attention may be used.
    """
    if capability is None:
        return Choice("torch", "not on CUDA: torch chooses")
    if not unit_stride:
        return Choice("math", "no fused kernel reads a strided last dimension")
    # By its major number: Dynamo of torch 2.11 cannot trace a comparison of such a tuple.
    major, _ = capability
    half = dtype == torch.float16 or (dtype == torch.bfloat16 and major >= 8)
    if half and major >= 8 and head_dim % 8 == 0:
        if major in (9, 10) and head_dim <= 128 and several_tokens and cudnn:
            return Choice("cudnn", "the fastest on data-centre Hopper and Blackwell")
        if not masked and head_dim <= 256:
            return Choice("flash", "the fastest without a mask")
    if (half and head_dim % 8 == 0) or (dtype == torch.float32 and head_dim % 4 == 0):
        why = "flash takes no mask" if half else "cuDNN and flash have no fp32 kernel"
        return Choice("efficient", why)
    return Choice("math", "no fused kernel takes this dtype with this head dimension")


@torch.compiler.assume_constant_result
def _machine(kind: str, index: int | None) -> tuple[tuple[int, int] | None, bool]:
    """Capability of a device, and whether torch may use cuDNN's attention; read while tracing."""
    cudnn = (
        torch.backends.cudnn.is_available()
        and torch.backends.cuda.cudnn_sdp_enabled()
        # torch refuses cuDNN's attention then
        and not torch.are_deterministic_algorithms_enabled()
    )
    return packages.capability(kind, index), cudnn


def obstacle(mode: str, kind: str, dtype: torch.dtype | None) -> str:
    """What rules ``mode`` out on a device of ``kind`` with ``dtype``, in a few words, or ``""``."""
    if mode in _CUDA_ONLY and kind not in ("cuda", "meta"):
        return f"needs a CUDA device, got {kind}"
    if mode in _CUDA_HALF_ONLY and kind == "cuda" and dtype not in (None, *packages.HALF):
        return f"needs bfloat16 or float16 on CUDA, got {dtype}"
    return ""


bind(
    "wan_models::sdpa_flash_varlen", ("q", "k", "v"), VECTORS,
    "measured on an H100, torch 2.11.0+cu130: the flash kernel faults on a misaligned operand",
)
