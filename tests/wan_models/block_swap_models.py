"""Small models, and blocks of one matrix, for the tests of block swap."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from wan_models import TINY, WanModel, model_inputs
from wan_models.quant import quantize_

GRID = (2, 2, 3)
SMALL = replace(
    TINY, dim=128, ffn_dim=256, num_heads=1, num_layers=5, text_dim=32, text_len=8
)


def model(config=SMALL, recipe: str | None = None, seed: int = 0) -> WanModel:
    torch.manual_seed(seed)
    made = WanModel(config).eval().requires_grad_(False)
    for parameter in made.parameters():  # zero biases and unit norms would be alike everywhere
        parameter.add_(torch.randn_like(parameter) * 0.05)
    if recipe is not None:
        quantize_(made.bfloat16(), recipe)
    return made


def inputs(made: WanModel, **options):
    return model_inputs(made.config, GRID, dtype=made.dtype, **options)


@torch.no_grad()
def run(made: nn.Module, *args, **kwargs) -> torch.Tensor:
    return made(*args, **kwargs)


def tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().flatten().view(torch.uint8).tolist())


class Toy(nn.Module):
    """Blocks of one matrix each, whose layout a test chooses."""

    def __init__(self, *weights: torch.Tensor) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ToyBlock(weight) for weight in weights)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for each in self.blocks:
            x = each(x)
        return x


class ToyBlock(nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.fail = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fail:
            raise ArithmeticError("planted")
        return (x @ self.weight).tanh()


def toy(count: int = 5, size: int = 8) -> Toy:
    torch.manual_seed(0)
    return Toy(*(torch.randn(size, size) for _ in range(count)))
