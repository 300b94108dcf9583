"""Rows of ``python -m benchmarks quant``: what q, k and v go through before attention.

For 16-bit attention RMS norm and rotary, compiled by plain Inductor; for our 8-bit kernel the same
and the quantisation in one op, beside the quantisation of q and k that are normed and turned. The
rate counts q and k once: that norms and samples read them again shows as a lower one. Accuracy is
that of scores: q k^T of some rows from the 8-bit operands, against fp32; less each row's mean,
which softmax does not see and smoothing of k changes. Of v it is that of the values times their
scales.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from benchmarks.speed import ours
from benchmarks.speed.accuracy import cosine, normal, some_rows
from benchmarks.speed.measure import Settings
from benchmarks.speed.rows import Prepared, Row, Shared, Task, Unavailable
from benchmarks.speed.sizes import Size
from wan_models.layers import WanRMSNorm
from wan_models.rope import apply_rope, rope_table

LEAST = {"cosine": (">=", 0.999)}
_EPS = 1e-6
_CHECKED_ROWS, _CHECKED_HEADS = 128, 2


class Projections(NamedTuple):
    """q, k and v as their linears make them, (1, L, C) bf16; weights of both norms (2, C); the
    rotary table."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    weights: torch.Tensor
    rope: torch.Tensor


def tasks(
    size: Size, settings: Settings, inductor: str, own: str
) -> tuple[list[Task], Shared[Projections]]:
    """The rows, and what they share.

    Args:
        size: of the tokens.
        settings: of the run.
        inductor, own: what the rows of either say that they count.
    """
    shared = Shared(lambda: _projections(size, settings.device))
    dim = size.config.dim
    table = 4 * size.config.head_dim  # cosines and sines in fp32, for all heads
    on_gpu = settings.device == "cuda"

    def task(name: str, counts: str, a_token: int, prepare: Any, *, required: bool = False) -> Task:
        row = Row(
            size.name, name, counts, required=required, moved=float(size.tokens * a_token),
            limits=dict(LEAST) if counts == own else {},
        )
        return Task(row, prepare)

    made = [
        task(
            "q and k: RMS norm, rotary", inductor, 2 * 4 * dim + table,
            _in_16_bits(shared, size, settings),
        ),
        task(
            "q and k: RMS norm, rotary, quantise", own, 2 * 3 * dim + table,
            _in_8_bits(shared, size, settings, fused=True), required=on_gpu,
        ),
        task(
            "q and k: quantise", own, 2 * 3 * dim, _in_8_bits(shared, size, settings, fused=False),
            required=on_gpu,
        ),
        task("v: quantise", own, 3 * dim, _values(shared, size), required=True),
    ]
    return made, shared


def _projections(size: Size, device: str) -> Projections:
    def made(seed: int) -> torch.Tensor:
        return normal(1, size.tokens, size.config.dim, device=device, seed=seed)

    weights = 1 + normal(2, size.config.dim, device=device, seed=13, std=0.1)
    rope = rope_table(size.grid, size.config.head_dim, device=device)
    return Projections(made(10), made(11), made(12), weights, rope)


def _norm(weight: torch.Tensor) -> WanRMSNorm:
    norm = WanRMSNorm(weight.shape[0], _EPS)
    norm.weight = torch.nn.Parameter(weight, requires_grad=False)
    return norm


def _turned(x: torch.Tensor, weight: torch.Tensor, rope: torch.Tensor, heads: int) -> torch.Tensor:
    """Normed and turned, (1, L, H, D), in the type of x (1, L, C)."""
    return apply_rope(_norm(weight)(x).unflatten(-1, (heads, -1)), rope)


def _in_16_bits(
    shared: Shared[Projections], size: Size, settings: Settings
) -> Callable[[], Prepared]:
    def prepare() -> Prepared:
        given = shared()
        norms = [_norm(weight) for weight in given.weights]

        def formula(
            q: torch.Tensor, k: torch.Tensor, rope: torch.Tensor
        ) -> tuple[torch.Tensor, ...]:
            heads = size.config.num_heads
            return tuple(
                apply_rope(norm(x).unflatten(-1, (heads, -1)), rope)
                for x, norm in zip((q, k), norms, strict=True)
            )

        function = ours.inductor(formula, settings)
        return Prepared(lambda: function(given.q, given.k, given.rope))

    return prepare


def _in_8_bits(
    shared: Shared[Projections], size: Size, settings: Settings, *, fused: bool
) -> Callable[[], Prepared]:
    """As the attention op launches it, up to the attention kernel."""

    def prepare() -> Prepared:
        if settings.device != "cuda":
            raise Unavailable("Triton kernels need a GPU; their formula is part of attention's")
        given = shared()
        call, readable = operands(given, size.config.num_heads, fused=fused)
        return Prepared(call, lambda: {"cosine": score_cosine(given, readable())})

    return prepare


def operands(
    given: Projections, heads: int, *, fused: bool
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Two functions that make the attention kernel's operands of q and k: as this machine's
    kernel takes them, and with k in the order of its tokens.

    Args:
        given: the projections.
        heads: H.
        fused: norm and rotary are part of it; else they are done beforehand.
    """
    from wan_models.attention import fp8_arithmetic, fp8_operands, fp8_triton

    hopper = fp8_triton.is_hopper(given.q.device)
    block = fp8_arithmetic.KEY_BLOCK
    if hopper:
        from wan_models.attention.fp8_hopper import BLOCK_N as block
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in given[:3])
    producer = fp8_operands.Producer(*given.weights, given.rope, _EPS) if fused else None
    if not fused:
        q, k = (
            _turned(x, weight, given.rope, heads)
            for x, weight in zip((given.q, given.k), given.weights, strict=True)
        )
    values = fp8_operands.quantise_values(v, None)

    def call(*, reorder: bool = hopper) -> Any:
        return fp8_operands.quantise(
            q, k, values, None, reorder=reorder, key_block=block, producer=producer
        )

    return call, lambda: call(reorder=False)


def score_cosine(given: Projections, made: Any) -> float:
    """Of the scores of some query rows, of 8-bit operands whose k lies in its tokens' order.

    Args:
        given: the projections.
        made: :class:`wan_models.attention.fp8_operands.Operands` of these.
    """
    tokens, size = given.q.shape[1], made.q.shape[-1]
    rows = some_rows(tokens, _CHECKED_ROWS, given.q.device.type)
    heads = given.q.shape[2] // size
    wide_q, wide_k = (
        _turned(x.float(), weight.float(), given.rope, heads)[0, :, :_CHECKED_HEADS]
        for x, weight in zip((given.q, given.k), given.weights, strict=True)
    )
    block = made.k.shape[1] // made.k_scales.shape[1]
    got, want = [], []
    for head in range(wide_q.shape[1]):
        scaled_k = made.k[head].float() * made.k_scales[head].repeat_interleave(block)[:, None]
        scaled_q = made.q[head, rows].float() * made.q_scales[head, rows, None]
        got.append(_centred(scaled_q @ scaled_k[:tokens].t()))
        want.append(_centred(wide_q[rows, head] @ wide_k[:, head].t()))
    return cosine(torch.stack(got), torch.stack(want))


def _centred(scores: torch.Tensor) -> torch.Tensor:
    return scores - scores.mean(-1, keepdim=True)


def _values(shared: Shared[Projections], size: Size) -> Callable[[], Prepared]:
    def prepare() -> Prepared:
        op, given, width = ours.op("fp8_values"), shared(), size.config.head_dim

        def call() -> Any:
            return op(given.v, width, None)

        def accuracy() -> dict[str, float]:
            values, scales = call()  # (H, D, S'), (H, D)
            rows = some_rows(size.tokens, _CHECKED_ROWS, given.v.device.type)
            got = (values[..., rows].float() * scales[..., None]).permute(2, 0, 1)
            return {"cosine": cosine(got.flatten(1), given.v[0, rows])}

        return Prepared(call, accuracy)

    return prepare
