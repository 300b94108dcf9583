"""FP8 linear layers, built from any ``nn.Linear``."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from wan_models.quant.recipes import E4M3, quantize, quantize_weight, recipe_named

#: ``_scaled_mm`` wants K and N to be multiples of this.
SIZE_MULTIPLE = 16
#: Output types of the kernel; it adds a bias of the same type.
COMPUTE_TYPES = (torch.bfloat16, torch.float16)


def fp8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    input_scale: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """y = (s_x * s_w) * Q(x) Q(W)^T + b with Q(x) = e4m3(clamp(x / s_x)), here with s_x = 1.

    Args:
        x: (..., K), left unchanged.
        weight: (N, K) e4m3; its transpose is the column-major operand that the kernel wants.
        weight_scale, input_scale: fp32, one element; the input scale is the static 1.
        bias: (N,) in the compute type, or None.

    Returns:
        (..., N) in the dtype of ``x``. Computed in bf16 or fp16; an fp32 ``x`` computes in bf16,
        since ``_scaled_mm`` takes no bias with an fp32 result.
    """
    compute = x.dtype if x.dtype in COMPUTE_TYPES else torch.bfloat16
    rows = quantize(x.reshape(-1, x.shape[-1]))
    out = torch._scaled_mm(
        rows,
        weight.t(),
        scale_a=input_scale,
        scale_b=weight_scale,
        bias=None if bias is None else bias.to(compute),
        out_dtype=compute,
    )
    return out.reshape(*x.shape[:-1], weight.shape[0]).to(x.dtype)


class KeepsQuantizedTypes(nn.Module):
    """A module whose e4m3 and fp32 tensors keep their types when it is cast.

    ``module.half()`` or ``module.to(torch.bfloat16)`` would otherwise widen the weight and narrow
    the scales, which ``_scaled_mm`` takes in fp32 alone. Moves between devices work as ever.
    """

    def _apply(
        self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> KeepsQuantizedTypes:
        def keep(tensor: torch.Tensor) -> torch.Tensor:
            made = fn(tensor)
            if made.dtype == tensor.dtype or tensor.dtype not in (E4M3, torch.float32):
                return made
            return tensor.to(made.device)

        return super()._apply(keep, recurse)


class Fp8Linear(KeepsQuantizedTypes):
    """A linear layer with an e4m3 weight, computed by ``torch._scaled_mm``. For inference.

    Buffers: ``weight`` (N, K) e4m3, ``weight_scale`` and ``input_scale`` fp32 of shape (),
    ``bias`` (N,) bf16 or fp16, or None. Needs a CPU, or a CUDA device of capability 8.9 or later.
    """

    def __init__(
        self, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer(
            "input_scale", torch.ones((), dtype=torch.float32, device=weight.device)
        )
        self.register_buffer("bias", bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, recipe: str) -> Fp8Linear:
        """Quantise ``linear`` by the recipe called ``recipe``.

        Raises:
            ValueError: unknown recipe, or sizes that the kernel does not take.
        """
        obstacle = unfit(linear)
        if obstacle is not None:
            raise ValueError(obstacle)
        weight, scale = quantize_weight(linear.weight.detach(), recipe_named(recipe))
        bias = None
        if linear.bias is not None:
            # A wider bias would be cast in every call: the kernel adds it in its output type.
            kept = linear.bias.dtype if linear.bias.dtype in COMPUTE_TYPES else torch.bfloat16
            bias = linear.bias.detach().to(kept, copy=True)
        return cls(weight, scale, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., K), 1-D to any number of dimensions. Returns (..., N)."""
        return fp8_linear(x, self.weight, self.weight_scale, self.input_scale, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


def unfit(linear: nn.Linear) -> str | None:
    """Why ``linear`` cannot be an FP8 linear; ``None`` if it can."""
    for name, size in (("K", linear.in_features), ("N", linear.out_features)):
        if size % SIZE_MULTIPLE:
            return f"{name}={size} is not a multiple of {SIZE_MULTIPLE}, as _scaled_mm demands"
    return None


class QuantizedRow(NamedTuple):
    """What :func:`quantize_` did to one linear: dotted name, action, reason."""

    name: str
    action: str
    reason: str


def quantize_(module: nn.Module, recipe: str, skip: Sequence[str] = ()) -> list[QuantizedRow]:
    """Replace the linears of ``module``, in place, by FP8 linears.

    Args:
        module: any module.
        recipe: name of a recipe, see :mod:`wan_models.quant.recipes`.
        skip: linears that stay in high precision, by exact dotted name; ``*`` stands for exactly
            one component, as in ``"blocks.*.cross_attn.k"``. Never a substring.

    Returns:
        One row for every name of an ``nn.Linear``, in order. A linear with several names is
        treated as one: replaced once, or kept if any of its names is skipped.

    Raises:
        ValueError: unknown recipe, a ``skip`` entry that names no linear, or a ``module`` that
            is itself a linear: nothing holds it, so nothing can hold its replacement.
    """
    recipe_named(recipe)
    if isinstance(module, nn.Linear):
        raise ValueError("quantize_ replaces linears inside a module: use Fp8Linear.from_linear")
    linears = [
        (name, child)
        for name, child in module.named_modules(remove_duplicate=False)
        if isinstance(child, nn.Linear)
    ]
    patterns = {entry: _pattern(entry) for entry in skip}
    for entry, pattern in patterns.items():
        if not any(pattern.fullmatch(name) for name, _ in linears):
            raise ValueError(f"skip={entry!r} names no linear of {type(module).__name__}")
    kept = {
        linear: f"named in skip by {entry!r}"
        for entry, pattern in reversed(patterns.items())
        for name, linear in linears
        if pattern.fullmatch(name)
    }
    rows: list[QuantizedRow] = []
    made: dict[nn.Linear, Fp8Linear] = {}
    for name, linear in linears:
        reason = kept.get(linear) or unfit(linear)
        if reason is not None:
            rows.append(QuantizedRow(name, "kept", reason))
            continue
        parent, _, leaf = name.rpartition(".")
        if linear not in made:
            made[linear] = Fp8Linear.from_linear(linear, recipe)
        setattr(module.get_submodule(parent), leaf, made[linear])
        rows.append(QuantizedRow(name, "quantised", recipe))
    return rows


def _pattern(entry: str) -> re.Pattern[str]:
    return re.compile(re.escape(entry).replace(r"\*", r"[^.]+"))
