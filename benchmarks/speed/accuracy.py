"""How far a result is from its reference, and inputs that are hard to quantise."""

from __future__ import annotations

import torch

#: One channel in so many is an outlier of that many times the others' size; real activations of
#: video transformers have a few such channels.
OUTLIER_EVERY, OUTLIER_FACTOR = 64, 30.0
GAUSSIAN, OUTLIERS = "Gaussian", "outlier channels"


def cosine(got: torch.Tensor, want: torch.Tensor) -> float:
    """Of the two as vectors, in fp64; NaN if either is not finite."""
    a, b = got.double().flatten(), want.double().flatten()
    return float((a @ b) / (a.norm() * b.norm()))


def relative_l1(got: torch.Tensor, want: torch.Tensor) -> float:
    """Sum of absolute errors over the sum of absolute values, in fp64."""
    a, b = got.double(), want.double()
    return float((a - b).abs().sum() / b.abs().sum())


def head_cosines(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """(H,) cosines over all rows of each head of (rows, H, D)."""
    a, b = (x.double().transpose(0, 1).flatten(1) for x in (got, want))
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))


def worst(results: dict[str, dict[str, float]]) -> dict[str, float]:
    """One accuracy out of those on several inputs, by input: each measure's worst, and each.

    A measure whose name holds "L1" is worse when greater, every other when smaller.
    """
    together: dict[str, float] = {}
    for measure in next(iter(results.values())):
        values = [result[measure] for result in results.values()]
        broken = any(value != value for value in values)
        worse = max if "L1" in measure else min
        together[measure] = float("nan") if broken else worse(values)
    for inputs, result in results.items():
        together |= {f"{measure}, {inputs}": value for measure, value in result.items()}
    return together


def with_outliers(x: torch.Tensor) -> torch.Tensor:
    """A copy with every 64th channel of the last dimension 30 times as large."""
    factors = torch.ones(x.shape[-1], device=x.device)
    factors[3::OUTLIER_EVERY] = OUTLIER_FACTOR
    return (x * factors).to(x.dtype)


def normal(
    *shape: int, device: str, seed: int, std: float = 1.0, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """Normal numbers from one seed, made in fp32."""
    generator = torch.Generator(device).manual_seed(seed)
    return (torch.randn(*shape, generator=generator, device=device) * std).to(dtype)


def some_rows(count: int, wanted: int, device: str) -> torch.Tensor:
    """``wanted`` row numbers spread evenly over ``count`` rows, first and last among them."""
    return torch.linspace(0, count - 1, min(wanted, count), device=device).round().long().unique()
