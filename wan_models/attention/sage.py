"""SageAttention 2 and 3 behind custom ops.

Neither kernel takes a mask, and SageAttention 3 returns no log-sum-exp by which padding could be
taken out of a result. So padded keys are cut off: the ops for padding call the kernel once for
each distinct length with that many keys, which is exactly attention over the valid keys, smoothing
and quantisation included. For that the host reads ``k_lens`` once a call; those ops are marked
unsafe for CUDA graphs. (SageAttention's own ``sageattn_varlen`` reads nothing, but is its Triton
kernel: on an H100 about 0.6 of the speed of the one that ``sageattn`` calls.)

``sageattn3_blackwell`` subtracts the mean of the keys from the caller's k, in place. The ops here
hand it a copy, so nothing of the caller's is written and the schemas' "no mutation" is true: keys
that are kept for later steps stay as they are. The modes ``sageattn_3``, ``sageattn_3_fp4`` and
``sageattn_3_fp8`` run the same FP4 kernel; there is no other.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from contig_pass import AlignedPointer
from wan_models.attention import packages
from wan_models.attention.contracts import VECTORS, bind

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
_HOST_READ = (torch.Tag.cudagraph_unsafe,)


def run(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_lens: torch.Tensor | None, mode: str
) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v by ``mode``: ``"sageattn"``, ``"sageattn_3"`` or its other names.

    Args:
        q: (B, L, H, D) with D 64 or 128.
        k, v: (B, S, H, D).
        k_lens: (B,) valid keys.
        mode: checked by :func:`wan_models.attention.packages.obstacle` before.

    Returns:
        (B, L, H, D): dense from SageAttention 2, head-major from SageAttention 3.
    """
    plain, masked = (sageattn, sageattn_masked) if mode == "sageattn" else (
        sageattn_3, sageattn_3_masked
    )
    return plain(q, k, v) if k_lens is None else masked(q, k, v, k_lens)


@torch.library.custom_op("wan_models::sageattn", mutates_args=())
def sageattn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q (B, L, H, D), k, v (B, S, H, D), last dimensions unit-stride. Returns q's shape, dense."""
    return _sage_2(q, k, v)


@torch.library.custom_op("wan_models::sageattn_masked", mutates_args=(), tags=_HOST_READ)
def sageattn_masked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_lens: torch.Tensor
) -> torch.Tensor:
    """:func:`sageattn` over the first ``k_lens[b]`` keys of each sample."""
    return _by_length(_sage_2, q, k, v, k_lens, _row_major)


@torch.library.custom_op("wan_models::sageattn_3", mutates_args=())
def sageattn_3(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q (B, L, H, D), k, v (B, S, H, D), any strides. Returns q's shape, head-major."""
    return _sage_3(q, k, v)


@torch.library.custom_op("wan_models::sageattn_3_masked", mutates_args=(), tags=_HOST_READ)
def sageattn_3_masked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_lens: torch.Tensor
) -> torch.Tensor:
    """:func:`sageattn_3` over the first ``k_lens[b]`` keys of each sample."""
    return _by_length(_sage_3, q, k, v, k_lens, _head_major)


@sageattn.register_fake
@sageattn_masked.register_fake
def _fake_row_major(q: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
    return _row_major(q)


@sageattn_3.register_fake
@sageattn_3_masked.register_fake
def _fake_head_major(q: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
    return _head_major(q)


def _row_major(q: torch.Tensor) -> torch.Tensor:
    return q.new_empty(q.shape)


def _head_major(q: torch.Tensor) -> torch.Tensor:
    batch, queries, heads, size = q.shape
    return q.new_empty((batch, heads, queries, size)).transpose(1, 2)


def _sage_2(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return packages.function("sageattn", "sageattn")(q, k, v, tensor_layout="NHD")


def _sage_3(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    kernel = packages.function("sageattn_3", "sageattn3_blackwell")
    # The kernel centres k in place, and then wants it dense in this order anyway.
    own = k.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    # A mean for every block of queries takes H * L/128 * S fp32 numbers beside the kernel (6.7 GB
    # at 75,600 tokens and 40 heads) and fails beyond 73,000 tokens; one mean for all does not.
    out = kernel(q.transpose(1, 2), own, v.transpose(1, 2), per_block_mean=False)
    return out.transpose(1, 2)


def _by_length(
    kernel: Kernel, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_lens: torch.Tensor,
    empty: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """One call of ``kernel`` for each run of samples of one length; ``empty`` makes the result."""
    lengths = [min(max(length, 0), k.shape[1]) for length in k_lens.tolist()]
    if len(set(lengths)) == 1 and lengths[0] > 0:
        return kernel(q, k[:, : lengths[0]], v[:, : lengths[0]])
    out, start = empty(q), 0
    while start < len(lengths):
        length, end = lengths[start], start + 1
        while end < len(lengths) and lengths[end] == length:
            end += 1
        part = slice(start, end)
        if length == 0:
            out[part] = 0
        else:
            out[part] = kernel(q[part], k[part, :length], v[part, :length])
        start = end
    return out


_SAGE_2 = (
    "sageattention/core.py asserts a unit last stride; its quantisers load 16 bytes at a time"
)
_SAGE_3 = (
    "sageattn3/api.py copies what is not dense in (B, H, L, D), and its quantisers read groups of "
    "32 bytes of what is"
)
for _name in ("sageattn", "sageattn_masked"):
    bind(f"wan_models::{_name}", ("q", "k", "v"), VECTORS, _SAGE_2)
for _name in ("sageattn_3", "sageattn_3_masked"):
    # k is copied before the kernel sees it.
    bind(f"wan_models::{_name}", ("q", "v"), (AlignedPointer(32),), _SAGE_3)
