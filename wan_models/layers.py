"""Norms, the feed-forward and the modulation of a Wan block."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class ConstantEps:
    """A norm whose ``eps`` can be had as a constant of a graph.

    Under ``dynamic=True`` the attribute would be an input of the graph instead, which AOTAutograd
    then finds to be a number after all, and has everything traced again.
    """

    eps: float

    @torch.compiler.assume_constant_result
    def constant_eps(self) -> float:
        return self.eps


class WanRMSNorm(ConstantEps, nn.Module):
    """y = x * rsqrt(mean(x^2) + eps) * weight over the last dimension.

    For q and k that is the whole model dimension, before the heads are split. Computed in fp32
    and cast back before the weight is applied, as the official model does. The result has the
    dtype of ``x``, also where a checkpoint keeps the weight in fp32.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., dim)."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.constant_eps())
        return (normed.to(x.dtype) * self.weight).to(x.dtype)


class WanLayerNorm(ConstantEps, nn.LayerNorm):
    """Layer norm over the last dimension, computed in fp32 and cast back."""

    def __init__(self, dim: int, eps: float = 1e-6, *, affine: bool = False) -> None:
        super().__init__(dim, eps=eps, elementwise_affine=affine)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., dim)."""
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        eps = self.constant_eps()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, eps).to(x.dtype)


class WideLinear(nn.Linear):
    """A linear layer computed in fp32 whatever the type of its parameters.

    For the time embedding: every block adds what it makes to its own modulation, in fp32.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., K). Returns (..., N) fp32."""
        bias = None if self.bias is None else self.bias.float()
        return F.linear(x.float(), self.weight.float(), bias)


def feed_forward(dim: int, ffn_dim: int) -> nn.Sequential:
    """Linear, tanh-approximated GELU, Linear; parameters are named ``0`` and ``2``."""
    return nn.Sequential(
        nn.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, dim)
    )


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x * (1 + scale) + shift in fp32. x: (B, L, C); shift, scale: (B, 1 or L, C) fp32."""
    return x.float() * (1 + scale) + shift


def time_frequencies(timesteps: torch.Tensor, dim: int) -> torch.Tensor:
    """Sinusoidal embedding: cosines of t * 10000^(-2k/dim), then sines, computed in fp64.

    Args:
        timesteps: any shape.
        dim: even width of the embedding.

    Returns:
        (*timesteps.shape, dim) fp32.
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float64, device=timesteps.device) / half
    angles = timesteps.to(torch.float64)[..., None] * torch.pow(10000.0, -exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()
