"""Float64 references for the attention classes, by plain loops, and what the tests share."""

from __future__ import annotations

import cmath
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from wan_models.attention import base, multitalk, self_attention, speakers
from wan_models.attention.kernels import attention

#: Three heads of sixteen, so that no two of H, D, B and T are the same.
HEADS, WIDTH, DIM = 3, 16, 48
GRID = (4, 2, 5)
FRAMES, FRAME, TOKENS = 4, 10, 40


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Weights at which every part moves the result, the norms' too."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        is_norm_weight = "norm" in name and name.endswith("weight")
        mean, std = (1.2, 0.4) if is_norm_weight else (0.0, 0.2)
        with torch.no_grad():
            parameter.normal_(mean, std, generator=generator)
    return module.eval()


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    out = x.double() @ layer.weight.double().t()
    return out if layer.bias is None else out + layer.bias.double()


def rms(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    mean_square = (x * x).sum(-1, keepdim=True) / x.shape[-1]
    return x / (mean_square + norm.eps).sqrt() * norm.weight.double()


def layer_norm(norm: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    x = x.double()
    centred = x - x.sum(-1, keepdim=True) / x.shape[-1]
    variance = (centred * centred).sum(-1, keepdim=True) / x.shape[-1]
    scaled = centred / (variance + norm.eps).sqrt()
    return scaled * norm.weight.double() + norm.bias.double()


def split(x: torch.Tensor) -> torch.Tensor:
    """(..., C) to (..., H, D)."""
    return x.reshape(*x.shape[:-1], HEADS, WIDTH)


def softmax_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lens: Sequence[int] | None = None
) -> torch.Tensor:
    """(B, L, H, D) of q (B, L, H, D) and k, v (B, S, H, D), one head of one sample at a time."""
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        keys = k.shape[1] if lens is None else lens[b]
        for h in range(q.shape[2]):
            weights = (q[b, :, h] @ k[b, :keys, h].t() / q.shape[-1] ** 0.5).softmax(-1)
            out[b, :, h] = weights @ v[b, :keys, h]
    return out


def per_frame_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, frames: int
) -> torch.Tensor:
    """q (B, T*S, H, D); k, v (B, T, A, H, D)."""
    size = q.shape[1] // frames
    parts = [
        softmax_attention(q[:, t * size : (t + 1) * size], k[:, t], v[:, t]) for t in range(frames)
    ]
    return torch.cat(parts, dim=1)


def axis_angles(position: float, width: int) -> list[float]:
    return [position * 10000.0 ** (-2 * i / width) for i in range(width // 2)]


def grid_angles(grid: tuple[int, int, int], widths: tuple[int, int, int] = (8, 4, 4)) -> list:
    """One list of D/2 angles for each token."""
    return [
        axis_angles(t, widths[0]) + axis_angles(r, widths[1]) + axis_angles(c, widths[2])
        for t in range(grid[0]) for r in range(grid[1]) for c in range(grid[2])
    ]


def turn(x: torch.Tensor, angles: Sequence[Sequence[float]]) -> torch.Tensor:
    """(B, L, H, D), pairs as complex numbers; tokens without angles stay as they are."""
    out = x.clone()
    for token, turns in enumerate(angles):
        for pair, angle in enumerate(turns):
            a, b = x[:, token, :, 2 * pair], x[:, token, :, 2 * pair + 1]
            factor = cmath.exp(1j * angle)
            out[:, token, :, 2 * pair] = a * factor.real - b * factor.imag
            out[:, token, :, 2 * pair + 1] = a * factor.imag + b * factor.real
    return out


def query(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return split(rms(layer.norm_q, linear(layer.q, x)))


def key_value(layer: nn.Module, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return split(rms(layer.norm_k, linear(layer.k, source))), split(linear(layer.v, source))


def nag(
    pos: torch.Tensor, neg: torch.Tensor, scale: float, tau: float, alpha: float
) -> torch.Tensor:
    """One row at a time."""
    out = torch.empty_like(pos)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in pos.shape[:-1])).tolist():
        place = tuple(index)
        wanted = pos[place]
        guided = scale * wanted - (scale - 1) * neg[place]
        norm, guided_norm = wanted.abs().sum().item(), guided.abs().sum().item()
        ratio = guided_norm / norm if norm else (float("inf") if guided_norm else 10.0)
        if ratio > tau:
            guided = guided * (tau * norm / (guided_norm + 1e-7))
        out[place] = alpha * guided + (1 - alpha) * wanted
    return out


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Every element within ``tolerance`` of the largest one."""
    assert actual.shape == expected.shape
    error = (actual.double() - expected).abs().max() / expected.abs().max()
    assert error < tolerance, f"off by {error:.2e} of the largest element"


def compiled(function: Callable[..., Any], **kwargs: Any) -> Callable[..., Any]:
    return torch.compile(
        function, backend="contig_safe", fullgraph=True, options={"inner": "aot_eager"}, **kwargs
    )


def assert_compiles(function: Callable[..., Any], *args: Any) -> None:
    """One graph without a break, of equal values; and the arguments are not written to."""
    tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(args) if torch.is_tensor(leaf)]
    with torch.no_grad():
        expected = function(*args)
        actual = compiled(function)(*args)
    for got, want in zip(
        torch.utils._pytree.tree_leaves(actual), torch.utils._pytree.tree_leaves(expected),
        strict=True,
    ):
        assert torch.equal(got, want)
    assert all(tensor._version == 0 for tensor in tensors)


class Call(NamedTuple):
    """What reached the kernel."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    options: dict[str, Any]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Every call of the dispatcher, in order."""
    seen: list[Call] = []

    def recording(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        seen.append(Call(q, k, v, options))
        return attention(q, k, v, **options)

    for module in (base, multitalk, self_attention, speakers):
        monkeypatch.setattr(module, "attention", recording)
    return seen
