"""Forward and backward: gradients have layouts of their own, which nobody wrote down."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from benchmarks.faults.program import Case, Program, around, integers, window

ops = torch.ops.faults


def programs() -> Iterator[Program]:
    """Every program of this file."""
    for name, build in _PROGRAMS.items():
        yield Program(name, "training", build)


def _gradients(run: Callable[..., Any]) -> Callable[..., Any]:
    """Outputs, and the gradients of every argument that wants one, for uneven cotangents."""

    def step(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = run(*args)
        leaves = [arg for arg in args if arg.requires_grad]
        weights = torch.arange(out.numel(), device=out.device).view(out.shape) % 5 - 2.0
        return (out, *torch.autograd.grad((out * weights).sum(), leaves))

    return step


def _leaf(device: str, offset: int, *shape: int) -> torch.Tensor:
    flat = integers(device, torch.Size(shape).numel() + 16)
    return window(flat, offset, *shape).detach().requires_grad_()


def _trained(
    function: Callable[..., torch.Tensor],
    *shapes: tuple[int, ...],
    calls: tuple[tuple[int, ...], ...],
) -> Callable[[str], Case]:
    """One call per tuple of offsets, one leaf per shape."""

    def build(device: str) -> Case:
        leaves = [
            tuple(_leaf(device, o, *shape) for o, shape in zip(call, shapes, strict=True))
            for call in calls
        ]
        return around(function, _gradients, leaves, grad=True)

    return build


def _slice_and_transpose(w: torch.Tensor) -> torch.Tensor:
    return ops.scaled(w[:, 1:]).t() @ torch.ones(w.shape[0], 4, device=w.device)


def _two_layers(x: torch.Tensor, v: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return ops.linear(ops.linear(x, v).relu(), w)


def _tied(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return ops.linear(ops.linear(x, w), w.t())


def _saved_view(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return ops.linear((x * 2)[:, 1:], w)[:, 1:].relu()


def _checkpointed(x: torch.Tensor, v: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return ops.scaled(checkpoint(_two_layers, x, v, w, use_reentrant=False)[:, 1:])


def _expanded_gradient(x: torch.Tensor) -> torch.Tensor:
    return ops.scaled(x).sum(0, keepdim=True).expand(4, -1)


def _descent(device: str) -> Case:
    """Three steps of gradient descent on a parameter that does not start on 16 bytes."""
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(window(integers(device, 64 * 64 + 16), 1, 64, 64))

    def forward(x: torch.Tensor) -> torch.Tensor:
        return ops.linear(x, layer.weight).relu()

    def stepping(run: Callable[..., Any]) -> Callable[..., Any]:
        def step(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            out = run(x)
            (gradient,) = torch.autograd.grad(out.sum(), [layer.weight])
            with torch.no_grad():
                layer.weight.sub_(gradient.sign())
            return out, gradient

        return step

    return around(forward, stepping, [(integers(device, 16, 64),) for _ in range(3)], grad=True)


_LAYERS = ((16, 64), (48, 64), (32, 48))

_PROGRAMS: dict[str, Callable[[str], Case]] = {
    "slice forward, transposed gradient": _trained(
        _slice_and_transpose, (16, 33), calls=((0,), (1,))
    ),
    "two linear layers": _trained(_two_layers, *_LAYERS, calls=((0, 0, 0),)),
    "two linear layers, misaligned leaves": _trained(
        _two_layers, *_LAYERS, calls=((1, 0, 3), (0, 2, 0), (0, 0, 0))
    ),
    "one weight both ways": _trained(_tied, (16, 64), (48, 64), calls=((0, 1), (1, 0))),
    "misaligned view saved for backward": _trained(
        _saved_view, (16, 65), (48, 64), calls=((0, 0), (1, 3))
    ),
    "recomputed in backward": _trained(_checkpointed, *_LAYERS, calls=((0, 1, 2), (3, 0, 0))),
    "expanded gradient": _trained(_expanded_gradient, (16, 64), calls=((0,), (1,))),
    "steps of a misaligned parameter": _descent,
}
