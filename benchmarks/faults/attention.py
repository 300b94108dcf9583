"""Programs around scaled dot product attention, restricted to one backend each."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.faults.program import (
    BF16,
    Case,
    Planted,
    Program,
    in_bytes,
    inner_stride,
    planted_program,
)

BATCH, HEADS, TOKENS, HEAD_DIM = 2, 3, 192, 64

_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def kernel(backend: str, device: str) -> Callable[..., torch.Tensor]:
    """Attention by one backend: on CUDA the real one, on a CPU an op that stands for it."""
    if device == "cpu":
        return getattr(torch.ops.faults, backend)

    def restricted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(_BACKENDS[backend]):
            return F.scaled_dot_product_attention(q, k, v)

    return restricted


def _faults() -> Iterator[tuple[str, Callable[[torch.Tensor], Planted]]]:
    """The rows measured for attention: name and layout of a (B, H, L, D) tensor."""
    row = HEAD_DIM * BF16.itemsize
    yield "base off 2 B", lambda v: in_bytes(v, 2)
    yield "base off 8 B", lambda v: in_bytes(v, 8)
    yield "pitch odd in elements", lambda v: in_bytes(v, 0, 2)
    yield "pitch padded by 16 B", lambda v: in_bytes(v, 0, row)
    yield "last dim stride 2", lambda v: inner_stride()


def _planted(
    backend: str, fault: Callable[[torch.Tensor], Planted], positions: tuple[int, ...], inside: bool
) -> Callable[[str], Case]:
    def build(device: str) -> Case:
        shape = (BATCH, HEADS, TOKENS, HEAD_DIM)
        values = [torch.randn(shape, device=device, dtype=BF16) for _ in range(3)]
        faults = {i: fault(values[i]) for i in positions}
        return planted_program(kernel(backend, device), values, faults, inside=inside)

    return build


def _chunks(backend: str, offset: int) -> Callable[[str], Case]:
    def build(device: str) -> Case:
        attend = kernel(backend, device)
        fused = torch.randn(
            BATCH, TOKENS, 3 * HEADS * HEAD_DIM + offset, device=device, dtype=BF16
        )

        def function(fused: torch.Tensor) -> torch.Tensor:
            parts = fused[..., offset:].chunk(3, dim=-1)
            q, k, v = (p.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for p in parts)
            return attend(q, k, v)

        return Case(function, [(fused,)])

    return build


def programs() -> Iterator[Program]:
    """The measured rows, with the faulty tensors as inputs and as views made in the graph."""
    for backend in _BACKENDS:
        group = f"attention, {backend}"
        yield Program("chunks of a fused projection", group, _chunks(backend, 0))
        yield Program("chunks of a projection off by 1 element", group, _chunks(backend, 1))
        for name, fault in _faults():
            for inside in (False, True):
                where = "views" if inside else "inputs"
                yield Program(
                    f"q, k, v {name}, {where}", group, _planted(backend, fault, (0, 1, 2), inside)
                )
        off = _faults_by_name()["base off 2 B"]
        yield Program("only v base off 2 B, view", group, _planted(backend, off, (2,), True))


def _faults_by_name() -> dict[str, Callable[[torch.Tensor], Planted]]:
    return dict(_faults())
