"""FlashAttention 2, 3 and 4 behind custom ops.

The ops mirror the packages' calls, one for batches and one for sequences by their bounds; padding
goes by the latter (:mod:`wan_models.attention.varlen`). All results are dense: FlashAttention 3 and
4 allocate them so in every version, FlashAttention 2 in some and in the order of q in others, where
a q that is not dense makes the op copy its result to keep the promise of its fake.
"""

from __future__ import annotations

import torch

from wan_models.attention import packages
from wan_models.attention.contracts import VECTORS, bind, dense
from wan_models.attention.varlen import pack


def run(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_lens: torch.Tensor | None, mode: str
) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v by ``mode``, ``"flash_attn_2"``, ``"_3"`` or ``"_4"``.

    Args:
        q: (B, L, H, D).
        k, v: (B, S, H, D).
        k_lens: (B,) valid keys.
        mode: checked by :func:`wan_models.attention.packages.obstacle` before.

    Returns:
        (B, L, H, D), dense.
    """
    if k_lens is None:
        return _BATCHED[mode](q, k, v)
    return _PACKED[mode](*pack(q, k, v, k_lens)).unflatten(0, q.shape[:2])


@torch.library.custom_op("wan_models::flash_attn_2", mutates_args=())
def flash_attn_2(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q (B, L, H, D), k, v (B, S, H, D), last dimensions unit-stride. Returns them dense."""
    return _output(packages.function("flash_attn_2", "flash_attn_func")(q, k, v))


@torch.library.custom_op("wan_models::flash_attn_2_varlen", mutates_args=())
def flash_attn_2_varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_bounds: torch.Tensor,
    k_bounds: torch.Tensor, q_longest: int, k_longest: int,
) -> torch.Tensor:
    """The sequences of :class:`wan_models.attention.varlen.Packed`. Returns (B*L, H, D) dense."""
    call = packages.function("flash_attn_2", "flash_attn_varlen_func")
    return _output(call(q, k, v, q_bounds, k_bounds, q_longest, k_longest))


@torch.library.custom_op("wan_models::flash_attn_3", mutates_args=())
def flash_attn_3(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q (B, L, H, D), k, v (B, S, H, D), last dimensions unit-stride. Returns them dense."""
    return _output(packages.function("flash_attn_3", "flash_attn_func")(q, k, v))


@torch.library.custom_op("wan_models::flash_attn_3_varlen", mutates_args=())
def flash_attn_3_varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_bounds: torch.Tensor,
    k_bounds: torch.Tensor, q_longest: int, k_longest: int,
) -> torch.Tensor:
    """The sequences of :class:`wan_models.attention.varlen.Packed`. Returns (B*L, H, D) dense."""
    call = packages.function("flash_attn_3", "flash_attn_varlen_func")
    return _output(call(q, k, v, q_bounds, k_bounds, q_longest, k_longest))


@torch.library.custom_op("wan_models::flash_attn_4", mutates_args=())
def flash_attn_4(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q (B, L, H, D), k, v (B, S, H, D), last dimensions unit-stride. Returns them dense."""
    return _output(packages.function("flash_attn_4", "flash_attn_func")(q, k, v))


@torch.library.custom_op("wan_models::flash_attn_4_varlen", mutates_args=())
def flash_attn_4_varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_bounds: torch.Tensor,
    k_bounds: torch.Tensor, q_longest: int, k_longest: int,
) -> torch.Tensor:
    """The sequences of :class:`wan_models.attention.varlen.Packed`. Returns (B*L, H, D) dense."""
    call = packages.function("flash_attn_4", "flash_attn_varlen_func")
    # By name: versions differ in the order.
    return _output(call(
        q, k, v, cu_seqlens_q=q_bounds, cu_seqlens_k=k_bounds, max_seqlen_q=q_longest,
        max_seqlen_k=k_longest,
    ))


@flash_attn_2.register_fake
@flash_attn_2_varlen.register_fake
@flash_attn_3.register_fake
@flash_attn_3_varlen.register_fake
@flash_attn_4.register_fake
@flash_attn_4_varlen.register_fake
def _fake(q: torch.Tensor, *_: object) -> torch.Tensor:
    return q.new_empty(q.shape)


def _output(result: object) -> torch.Tensor:
    """The output, dense; older versions return it with the log-sum-exp beside it."""
    out = result[0] if isinstance(result, tuple) else result
    if not isinstance(out, torch.Tensor):
        raise ValueError(f"flash attention returned {type(out).__name__}, not a tensor")
    return dense(out)


_BATCHED = {
    "flash_attn_2": flash_attn_2, "flash_attn_3": flash_attn_3, "flash_attn_4": flash_attn_4,
}
_PACKED = {
    "flash_attn_2": flash_attn_2_varlen,
    "flash_attn_3": flash_attn_3_varlen,
    "flash_attn_4": flash_attn_4_varlen,
}
MODES = tuple(_BATCHED)

_FLASH_2 = (
    "flash_attn/flash_attn_interface.py copies only where the last stride is not 1; misaligned "
    "operands of this kernel fault asynchronously, measured on an H100"
)
_FLASH_3 = (
    "hopper/flash_attn_interface.py copies only where the last stride is not 1; TMA descriptors "
    "take addresses and pitches that are multiples of 16 bytes"
)
_FLASH_4 = (
    "flash_attn/cute/interface.py copies only where the last stride is not 1, and promises its "
    "compiler addresses that are multiples of 16 bytes"
)
for _name, _source in (
    ("flash_attn_2", _FLASH_2), ("flash_attn_2_varlen", _FLASH_2),
    ("flash_attn_3", _FLASH_3), ("flash_attn_3_varlen", _FLASH_3),
    ("flash_attn_4", _FLASH_4), ("flash_attn_4_varlen", _FLASH_4),
):
    bind(f"wan_models::{_name}", ("q", "k", "v"), VECTORS, _source)
