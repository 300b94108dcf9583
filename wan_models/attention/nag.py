"""Normalised attention guidance: attention to one text, pushed away from that to another."""

from __future__ import annotations

from typing import NamedTuple

import torch


class NagParams(NamedTuple):
    """Strengths of :func:`guide`: floats, or 0-d fp32 tensors that may change at run time.

    Attributes:
        scale: s, how far to push; 1 leaves the wanted attention as it is.
        tau: the largest growth of the 1-norm.
        alpha: share of the guided result in the outcome.
    """

    scale: torch.Tensor | float = 11.0
    tau: torch.Tensor | float = 2.5
    alpha: torch.Tensor | float = 0.25

    def as_tensors(self, device: torch.device | str | None = None) -> NagParams:
        """The same as 0-d fp32 tensors, so that compiled code is not bound to the numbers."""
        return NagParams(*(scalar(value, device) for value in self))


def scalar(
    value: torch.Tensor | float, device: torch.device | str | None = None
) -> torch.Tensor:
    """A 0-d fp32 tensor of a strength."""
    return torch.as_tensor(value, dtype=torch.float32, device=device)


DEFAULTS = NagParams()


def guide(
    z_pos: torch.Tensor, z_neg: torch.Tensor, params: NagParams = DEFAULTS
) -> torch.Tensor:
    """g = s z+ - (s - 1) z-, shrunk where its 1-norm outgrows tau times that of z+, then blended.

    r = |g| / |z+|, 10 where that is not a number; where r > tau, g becomes
    g * tau |z+| / (|g| + 1e-7). The outcome is alpha g + (1 - alpha) z+. Norms are over the last
    dimension, so the heads must be merged.

    Args:
        z_pos, z_neg: (..., C), attention to the wanted and the unwanted text.
        params: s, tau and alpha.

    Returns:
        (..., C) in the dtype of ``z_pos``; computed in fp32.

    Raises:
        ValueError: the shapes differ.
    """
    if z_pos.shape != z_neg.shape:
        raise ValueError(
            f"guidance: z_pos {tuple(z_pos.shape)} and z_neg {tuple(z_neg.shape)} must be alike"
        )
    scale, tau, alpha = params
    wanted, unwanted = z_pos.float(), z_neg.float()
    guided = wanted * scale - unwanted * (scale - 1)
    norm = wanted.abs().sum(-1, keepdim=True)
    guided_norm = guided.abs().sum(-1, keepdim=True)
    ratio = guided_norm / norm
    ratio = torch.where(ratio.isnan(), 10.0, ratio)
    shrunk = guided * (norm * tau / (guided_norm + 1e-7))
    guided = torch.where(ratio > tau, shrunk, guided)
    return (guided * alpha + wanted * (1 - alpha)).to(z_pos.dtype)
