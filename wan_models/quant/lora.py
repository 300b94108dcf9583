"""LoRAs on plain and quantised linears: merged into the weight, or added to the product.

y = base(x) + strength * (alpha / r) * (x down^T) up^T, with down (r, K) and up (N, r). The sum
goes to the linear's result, so a weight scale never touches it. Strength and alpha are tensors:
changing them recompiles nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F

from wan_models.quant.linear import KeepsTypes, QuantizedLinear


class LoraDelta(KeepsTypes):
    """What one LoRA adds to a linear's result.

    Buffers: ``down`` (r, K) and ``up`` (N, r) of a float type, which a cast of the module
    changes; ``alpha`` and ``strength`` fp32 of shape (), which it does not.
    """

    def __init__(
        self, down: torch.Tensor, up: torch.Tensor, alpha: torch.Tensor, strength: torch.Tensor
    ) -> None:
        super().__init__()
        self.register_buffer("down", down)
        self.register_buffer("up", up)
        self.register_buffer("alpha", alpha)
        self.register_buffer("strength", strength)

    def keeps(self, tensor: torch.Tensor) -> bool:
        return tensor is self.alpha or tensor is self.strength

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., K). Returns (..., N) in the type of ``x``."""
        inner = F.linear(x, self.down.to(x.dtype))
        # In fp32: next to a bf16 tensor the factor would be rounded to bf16.
        factor = self.strength * self.alpha / self.down.shape[0]
        return F.linear((inner.float() * factor).to(x.dtype), self.up.to(x.dtype))

    def extra_repr(self) -> str:
        return f"rank={self.down.shape[0]}"


class LoraStack(nn.ModuleDict):
    """The unmerged LoRAs of one linear, by name."""

    def forward(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """``out``, the linear's result for ``x``, with every LoRA added."""
        for delta in self.values():
            out = out + delta(x)
        return out


class WithLora:
    """Mixed into the class of a plain linear by :func:`attach_lora`: adds ``self.lora``.

    A class rather than a hook: Dynamo guards on a module's class, not on its hooks, so a compiled
    caller would go on without the LoRA.
    """

    #: The class of the linear before.
    plain: type[nn.Linear]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., K). Returns (..., N)."""
        return self.lora(x, super().forward(x))

    def __reduce_ex__(self, protocol: int) -> tuple[object, ...]:
        # Pickle and deepcopy look classes up by name, and this one has none in any module.
        return _blank, (self.plain,), self.__dict__


@functools.cache
def _with_lora(plain: type[nn.Linear]) -> type[nn.Linear]:
    """The class of linears of type ``plain`` that have LoRAs."""
    return type(f"{plain.__name__}WithLora", (WithLora, plain), {"plain": plain})


def _blank(plain: type[nn.Linear]) -> nn.Linear:
    made = _with_lora(plain)
    return made.__new__(made)


def attach_lora(
    linear: nn.Linear | QuantizedLinear,
    down: torch.Tensor,
    up: torch.Tensor,
    alpha: float | torch.Tensor | None = None,
    strength: float | torch.Tensor = 1.0,
    name: str = "lora",
) -> None:
    """Add a LoRA to ``linear`` without changing its weight. Several add up.

    Copies of ``down`` and ``up`` are kept in the type the linear computes in, on its device, as
    ``linear.lora[name]``; they move with it and are part of its ``state_dict``.

    Args:
        linear: a plain or quantised linear. The class of a plain one becomes one of its own kind
            with :class:`WithLora`.
        down, up: (r, K) and (N, r), of any float type.
        alpha: a number or tensor of one element; None means r.
        strength: a number or tensor of one element, copied; change it by
            :func:`set_lora_strength`.
        name: what to call it; no dots.

    Raises:
        ValueError: another kind of module, shapes that do not fit it, or a name that is taken or
            cannot be one.
    """
    _check(linear, down, up)
    if not name or "." in name or hasattr(LoraStack(), name):
        raise ValueError(f"name={name!r}: use letters, digits, - and _, and no name of ModuleDict")
    stack = getattr(linear, "lora", None)
    if stack is not None and name in stack:
        raise ValueError(f"{type(linear).__name__} has a LoRA called {name!r}: detach it first")
    plain = isinstance(linear, nn.Linear)
    dtype = linear.weight.dtype if plain else linear.compute_dtype
    device = next(linear.parameters() if plain else linear.buffers()).device
    delta = LoraDelta(
        down.detach().to(device, dtype, copy=True),
        up.detach().to(device, dtype, copy=True),
        _number(down.shape[0] if alpha is None else alpha, "alpha", device),
        _number(strength, "strength", device),
    )
    if stack is None:
        stack = linear.lora = LoraStack()
        if plain:
            _become(linear, _with_lora(type(linear)))
    stack[name] = delta


def detach_lora(module: nn.Module, name: str = "lora") -> int:
    """Take the LoRA called ``name`` off every linear in ``module``, itself included.

    Returns:
        How many linears had it.

    Raises:
        ValueError: none had it.
    """
    holders = _holders(module, name)
    for linear in holders:
        del linear.lora[name]
        if len(linear.lora) == 0:
            if isinstance(linear, WithLora):
                del linear.lora
                _become(linear, linear.plain)
            else:
                linear.lora = None
    return len(holders)


def _become(linear: nn.Module, kind: type[nn.Module]) -> None:
    linear.__class__ = kind
    if torch.__version__ < "2.12":
        # Dynamo of torch 2.11 does not guard the class of torch's own modules: compiled callers
        # would go on as they were.
        torch.compiler.reset()


def set_lora_strength(
    module: nn.Module, strength: float | torch.Tensor, name: str = "lora"
) -> int:
    """Change the strength of the LoRA called ``name`` on every linear in ``module``.

    In place, so nothing is recompiled and captured graphs see it.

    Args:
        module: a linear or anything that holds linears.
        strength: a number or tensor of one element.
        name: as given to :func:`attach_lora`.

    Returns:
        How many linears have it.

    Raises:
        ValueError: none has it, or a tensor of several elements.
    """
    holders = _holders(module, name)
    for linear in holders:
        buffer = linear.lora[name].strength
        buffer.copy_(_number(strength, "strength", buffer.device))
    return len(holders)


@torch.no_grad()
def merge_lora_(
    linear: nn.Linear | QuantizedLinear,
    down: torch.Tensor,
    up: torch.Tensor,
    alpha: float | torch.Tensor | None = None,
    strength: float | torch.Tensor = 1.0,
) -> None:
    """Add strength * (alpha / r) * up down to the weight of ``linear``, in place.

    The sum is made in fp32. A quantised weight is dequantised, added to and quantised anew by
    its recipe, with new scales at the old addresses: better merge before quantising, which
    rounds once. Arguments and errors are those of :func:`attach_lora`.
    """
    _check(linear, down, up)
    plain = isinstance(linear, nn.Linear)
    device = next(linear.parameters() if plain else linear.buffers()).device
    alpha = _number(down.shape[0] if alpha is None else alpha, "alpha", device)
    factor = _number(strength, "strength", device) * alpha / down.shape[0]
    delta = up.to(device, torch.float32) @ down.to(device, torch.float32) * factor
    if plain:
        linear.weight.copy_(linear.weight.float() + delta)
    else:
        linear.requantise_(linear.dequantised() + delta)


def _holders(module: nn.Module, name: str) -> list[nn.Module]:
    """The linears in ``module`` with a LoRA called ``name``."""
    holders = [linear for linear in _linears_with_loras(module) if name in linear.lora]
    if not holders:
        names = sorted({known for linear in _linears_with_loras(module) for known in linear.lora})
        raise ValueError(
            f"no linear of {type(module).__name__} has a LoRA called {name!r}: there are "
            f"{', '.join(map(repr, names)) or 'none'}"
        )
    return holders


def _linears_with_loras(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.modules():
        if isinstance(getattr(child, "lora", None), LoraStack):
            yield child


def _check(linear: nn.Module, down: torch.Tensor, up: torch.Tensor) -> None:
    if not isinstance(linear, nn.Linear | QuantizedLinear):
        raise ValueError(
            f"{type(linear).__name__} takes no LoRA: use an nn.Linear or a quantised linear"
        )
    rows, columns = linear.out_features, linear.in_features
    fits = down.dim() == up.dim() == 2 and down.shape[0] == up.shape[1] > 0
    if not fits or down.shape[1] != columns or up.shape[0] != rows:
        raise ValueError(
            f"down {tuple(down.shape)} and up {tuple(up.shape)} do not fit a linear of K={columns} "
            f"and N={rows}: use (r, {columns}) and ({rows}, r)"
        )
    if not (down.is_floating_point() and up.is_floating_point()):
        raise ValueError(f"down is {down.dtype} and up {up.dtype}: use float types")


def _number(value: float | torch.Tensor, what: str, device: torch.device) -> torch.Tensor:
    """``value`` as a new fp32 tensor of shape ()."""
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise ValueError(f"{what} has shape {tuple(value.shape)}: use one element")
        return value.detach().to(device, torch.float32, copy=True).reshape(())
    return torch.tensor(value, dtype=torch.float32, device=device)
