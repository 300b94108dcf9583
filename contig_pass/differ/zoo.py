"""Models of the zoo for a GPU that is not there.

contig_pass does not depend on the models that prove it: they are imported by name.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from contig_pass.contracts.target import Target
from contig_pass.errors import TargetError


@dataclass(frozen=True)
class Setting:
    """One zoo model and its inputs; the fields are the options of ``contig-pass diff``."""

    name: str
    size: str
    quantization: str | None
    attention: str
    frames: int
    height: int
    width: int
    batch: int


def build(setting: Setting, target: Target) -> tuple[torch.nn.Module, Any]:
    """The model and its positional inputs, on the meta device.

    Raises:
        TargetError: wan_models is not installed, or it knows no such model or setting.
    """
    models, zoo = _module("wan_models"), _module("wan_models.zoo")
    if setting.batch < 1:
        raise TargetError(f"--batch {setting.batch}: use at least 1")
    try:
        chosen = zoo.variant(setting.name, setting.size)
        grid = models.token_grid(
            setting.frames, setting.height, setting.width,
            vae_stride=chosen.config.vae_stride, patch_size=chosen.config.patch_size,
        )
        _check_capability(setting.attention, target)
        with torch.device("meta"):
            model = zoo.build(
                setting.name, setting.size, setting.quantization, setting.attention
            )
        inputs = models.model_inputs(
            chosen.config, grid, batch=setting.batch, dtype=torch.bfloat16, device="meta",
            addons=chosen.addons,
        )
    except ValueError as error:
        raise TargetError(f"wan:{setting.name}: {error}") from error
    return model, inputs


@contextlib.contextmanager
def as_on(target: Target) -> Iterator[None]:
    """Inside the block the models take the paths that they take on ``target``.

    They ask the device of a tensor which kernels it has. A fake tensor is on no GPU, so they are
    answered for ``target``: what runs nothing needs no package and no GPU.
    """
    if target.kind != "cuda":
        yield
        return
    kernels, sdpa = (_module(f"wan_models.attention.{name}") for name in ("kernels", "sdpa"))
    fp4 = _module("wan_models.quant.fp4")
    multiplies_fp4 = (target.capability or (0, 0)) >= (10, 0)
    replaced = (
        (kernels, "check_mode", _anywhere(kernels.check_mode)),
        (fp4, "multiplies_fp4", lambda device: multiplies_fp4),
        # The form of a mask that GPU kernels read.
        (sdpa, "key_mask", sdpa.additive_mask),
    )
    before = [(module, name, getattr(module, name)) for module, name, _ in replaced]
    try:
        for module, name, function in replaced:
            setattr(module, name, function)
        yield
    finally:
        for module, name, function in before:
            setattr(module, name, function)


def _anywhere(check: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(check)
    def check_mode(mode: str, device: torch.device, **known: Any) -> None:
        check(mode, torch.device("meta"), **known)

    return check_mode


def _check_capability(mode: str, target: Target) -> None:
    """Refuse a package's kernel that is not made for ``target``."""
    demand = _module("wan_models.attention.packages").DEMANDS.get(mode)
    if demand is None:
        return
    words, fits = demand.capabilities
    if target.capability is None or not fits(target.capability):
        raise TargetError(
            f"attention mode {mode!r}: a CUDA device of compute capability {words} needed, "
            f"--target is {target.name}"
        )


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise TargetError(f"TARGET wan:NAME needs the package wan_models: {error}") from error
