"""What every quantised linear has in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import nn
from torch.nn import functional as F

from wan_models.quant.recipes import E4M3, E5M2, Recipe
from wan_models.quant.rows import QuantizedRows
from wan_models.quant.rows_linear import rows_linear

#: Types that a quantised linear computes and returns in; ``_scaled_mm`` adds a bias of the same.
COMPUTE_TYPES = (torch.bfloat16, torch.float16)
#: Types of weights and scales: a cast of the module does not touch them.
KEPT_TYPES = (E4M3, E5M2, torch.uint8, torch.float32)


def compute_type(dtype: torch.dtype) -> torch.dtype:
    """bf16 or fp16 as they are, bf16 for every other type."""
    return dtype if dtype in COMPUTE_TYPES else torch.bfloat16


class KeepsTypes(nn.Module):
    """A module some of whose tensors keep their types when it is cast.

    ``module.half()`` or ``module.to(torch.bfloat16)`` would otherwise widen weights of one byte
    and narrow scales that have to be fp32. Moves between devices work as ever.
    """

    def keeps(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor``, one of this module's own, keeps its type."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        def keep(tensor: torch.Tensor) -> torch.Tensor:
            made = fn(tensor)
            if made.dtype == tensor.dtype or not self.keeps(tensor):
                return made
            return tensor.to(made.device)

        # Children judge for themselves: they would be handed ``keep`` otherwise.
        if recurse:
            for child in self.children():
                child._apply(fn)
        return super()._apply(keep, recurse=False)


class QuantizedLinear(KeepsTypes):
    """A linear layer y = x W^T + b whose weight is stored in 8 or 4 bits. For inference.

    Subclasses hold the weight and say how it is dequantised, requantised and multiplied.

    Attributes:
        out_features, in_features: N and K.
        recipe: name of the recipe, see :mod:`wan_models.quant`.
        fast: whether the weight is multiplied as it is stored, or dequantised first.
        by_row: whether activations are scaled by row: :class:`QuantizedRows` may then be given.
        lora: unmerged LoRAs, see :mod:`wan_models.quant.lora`, or None.
    """

    def __init__(self, shape: tuple[int, int], recipe: Recipe) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.recipe = recipe.name
        self.fast = recipe.fast
        self.by_row = recipe.fast and recipe.activations == "row"
        self.register_module("lora", None)
        self._ones: list[str] = []

    def dequantised(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight that the layer stands for: (N, K), computed in fp32 and cast to ``dtype``."""
        raise NotImplementedError

    def requantise_(self, weight: torch.Tensor) -> None:
        """Store another weight (N, K) by the same recipe, at the same addresses."""
        raise NotImplementedError

    def scaled_product(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., K) times the stored weight, by the scaled matrix product of a fast recipe."""
        raise NotImplementedError

    def operands(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight (N, K) e4m3 and its scales (N,) or (1,), for a product with quantised rows."""
        raise NotImplementedError

    @property
    def takes_rows(self) -> bool:
        """Whether the layer needs nothing of its input but the quantised rows."""
        return self.by_row and self.lora is None

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type in which this layer is meant to compute: that of its bias, or bf16."""
        return torch.bfloat16 if self.bias is None else compute_type(self.bias.dtype)

    def forward(self, x: torch.Tensor | QuantizedRows) -> torch.Tensor:
        """x: (..., K), 1-D to any number of dimensions. Returns (..., N) in the type of ``x``.

        Computed in bf16 or fp16; an fp32 ``x`` computes in bf16, since ``_scaled_mm`` takes no
        bias with an fp32 result. A layer that is :attr:`by_row` takes rows that are quantised
        already, and returns the type they had before.

        Raises:
            ValueError: quantised rows, but another recipe.
        """
        if isinstance(x, QuantizedRows):
            if not self.by_row:
                raise ValueError(
                    f"recipe {self.recipe!r} takes no quantised rows: give the activation itself"
                )
            out = rows_linear(x, *self.operands(), self.bias)
            return out if self.lora is None else self.lora(x.dequantised(), out)
        out = self.scaled_product(x) if self.fast else self._dequantised_product(x)
        return out if self.lora is None else self.lora(x, out)

    def _dequantised_product(self, x: torch.Tensor) -> torch.Tensor:
        # The scale is part of the weight here. On x it would save an elementwise pass over the
        # weight in eager mode when x is the shorter; compiled, it is one multiplication inside
        # the cast that is needed anyway, and a choice by length would guard on the token count.
        dtype = compute_type(x.dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(x.to(dtype), self.dequantised(dtype), bias).to(x.dtype)

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, "
            f"recipe={self.recipe!r}"
        )

    # -- constants ---------------------------------------------------------------------------

    def keeps(self, tensor: torch.Tensor) -> bool:
        return tensor.dtype in KEPT_TYPES

    def register_one(self, name: str, device: torch.device) -> None:
        """A scale that is 1 whatever a checkpoint holds: an fp32 buffer outside of state_dict."""
        one = torch.ones((), dtype=torch.float32, device=device)
        self.register_buffer(name, one, persistent=False)
        self._ones.append(name)

    def restore_ones(self) -> None:
        """Make the constants anew where their device is not the weight's.

        Loading by ``load_state_dict`` and moving do this by themselves; it is for loaders that
        set one buffer after the other.
        """
        device = next(self.buffers(recurse=False)).device
        for name in self._ones:
            if getattr(self, name).device != device:
                setattr(self, name, torch.ones((), dtype=torch.float32, device=device))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        before = {name: getattr(self, name) for name in self._ones}
        super()._apply(fn, recurse)
        for name, one in before.items():
            made = getattr(self, name)
            # ``to_empty`` makes memory without a value, and no checkpoint brings this one.
            if made is not one:
                setattr(self, name, torch.ones_like(made))
        return self

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        # An assigning load takes everything off the meta device but what no checkpoint holds.
        self.restore_ones()


def kept_bias(linear: nn.Linear) -> torch.Tensor | None:
    """A copy of the bias in the type the product adds it in; a wider one is cast in every call."""
    if linear.bias is None:
        return None
    return linear.bias.detach().to(compute_type(linear.bias.dtype), copy=True)


def checked_scale(name: str, scale: torch.Tensor) -> torch.Tensor:
    """A tensor-wise scale as fp32 of shape ().

    Raises:
        ValueError: it has more than one element.
    """
    if scale.numel() != 1:
        raise ValueError(f"{name} has shape {tuple(scale.shape)}: use one element")
    return scale.detach().to(torch.float32).reshape(())
