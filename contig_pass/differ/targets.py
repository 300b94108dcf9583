"""What to trace: ``wan:NAME`` of the zoo, or ``module:callable`` of the user's own."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import nn

from contig_pass.contracts.target import Target
from contig_pass.differ import zoo
from contig_pass.errors import TargetError
from contig_pass.inductor.faking import Faking

WAN = "wan"
_logger = logging.getLogger("contig_pass")


@dataclass(frozen=True)
class Program:
    """Something to trace: ``model(*args, **kwargs)``.

    Attributes:
        name: what reports call it.
        model: a module or function.
        args, kwargs: what to call it with.
        around: what must hold while it is traced.
    """

    name: str
    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    around: Callable[[], contextlib.AbstractContextManager[Any]] = field(
        default=contextlib.nullcontext
    )


@dataclass(frozen=True)
class WanOptions:
    """Settings of a zoo model; ``None``: not given.

    Attributes:
        quantization: recipe of the linears; by default none.
        attention: kernel; by default ``"sdpa"``.
        resolution: ``"832x480"``, width by height in pixels; by default that.
        frames: of the video; by default 81.
        batch: samples; by default 1.
        size: ``"full"`` (default) or ``"tiny"``.
    """

    quantization: str | None = None
    attention: str | None = None
    resolution: str | None = None
    frames: int | None = None
    batch: int | None = None
    size: str | None = None

    def given(self) -> tuple[str, ...]:
        """Names of the options that are set."""
        return tuple(f.name for f in fields(self) if getattr(self, f.name) is not None)


def resolve(text: str, target: Target, options: WanOptions, faking: Faking) -> Program:
    """The program that ``text`` names, on fake tensors.

    A callable is called with the meta device as default, where a model takes no memory, and once
    more without if that fails.

    Args:
        text: ``wan:NAME`` or ``module:callable``.
        target: the device that it is traced for.
        options: of a zoo model.
        faking: what puts the tensors on their device.

    Raises:
        TargetError: there is no such thing, it cannot be made, or the callable returns something
            else than (model, args, kwargs).
    """
    module, colon, name = text.partition(":")
    if not colon or not module or not name:
        raise TargetError(
            f"TARGET {text!r}: use wan:NAME, such as wan:t2v-14b, or module:callable"
        )
    if module == WAN:
        return _from_zoo(text, name, target, options, faking)
    if options.given():
        flags = ", ".join(f"--{option}" for option in options.given())
        raise TargetError(f"TARGET {text!r} takes no {flags}: that is for wan:NAME")
    return _from_callable(text, module, name, faking)


def _from_zoo(
    text: str, name: str, target: Target, options: WanOptions, faking: Faking
) -> Program:
    width, height = parse_resolution(options.resolution or "832x480")
    setting = zoo.Setting(
        name=name,
        size=options.size or "full",
        quantization=options.quantization,
        attention=options.attention or "sdpa",
        frames=81 if options.frames is None else options.frames,
        height=height,
        width=width,
        batch=1 if options.batch is None else options.batch,
    )
    model, inputs = zoo.build(setting, target)
    faking.place(model)
    said = [
        setting.size, setting.quantization or "unquantised", setting.attention,
        f"{width}x{height}", f"{setting.frames} frames", f"batch {setting.batch}",
    ]
    return Program(
        f"{text} ({', '.join(said)})", model, faking.placed(tuple(inputs)), {},
        lambda: zoo.as_on(target),
    )


def parse_resolution(text: str) -> tuple[int, int]:
    """``"1280x720"`` as (width, height) in pixels.

    Raises:
        TargetError: anything else.
    """
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise TargetError(f"--resolution {text!r}: use WIDTHxHEIGHT, such as 1280x720")
    return int(match[1]), int(match[2])


# -- module:callable -----------------------------------------------------------------------------


def _from_callable(text: str, module: str, name: str, faking: Faking) -> Program:
    function = _found(text, module, name)
    returned = _made(text, function)
    if not isinstance(returned, (tuple, list)) or len(returned) != 3:
        raise TargetError(f"{text} returned {_kind(returned)}: return (model, args, kwargs)")
    model, args, kwargs = returned
    if not callable(model):
        raise TargetError(f"{text} returned {_kind(model)} as its model: return a module")
    if not isinstance(args, (tuple, list)):
        raise TargetError(f"{text} returned {_kind(args)} as args: return a tuple")
    if not isinstance(kwargs, dict) or not all(isinstance(key, str) for key in kwargs):
        raise TargetError(f"{text} returned {_kind(kwargs)} as kwargs: return a dict of names")
    if isinstance(model, nn.Module):
        faking.place(model)
    return Program(text, model, faking.placed(tuple(args)), faking.placed(dict(kwargs)))


def _found(text: str, module: str, name: str) -> Callable[[], Any]:
    try:
        with _working_directory_importable():
            found: Any = importlib.import_module(module)
    except Exception as error:
        raise TargetError(f"TARGET {text!r}: {module} cannot be imported: {told(error)}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise TargetError(f"TARGET {text!r}: {module} has no {name}")
        found = getattr(found, part)
    if not callable(found):
        raise TargetError(f"TARGET {text!r} is {_kind(found)}: name a callable without arguments")
    return found


def _made(text: str, function: Callable[[], Any]) -> Any:
    try:
        with torch.device("meta"):
            return function()
    except Exception as error:
        first = told(error)
    # It may read values while it builds, or draw them by a generator.
    _logger.info("%s raised %s on the meta device: called again with memory", text, first)
    try:
        return function()
    except Exception as error:
        raise TargetError(f"{text} raised {told(error)}") from error


@contextlib.contextmanager
def _working_directory_importable() -> Iterator[None]:
    """As ``python -m`` has it; a console script has not."""
    folder = os.getcwd()
    if folder in sys.path or "" in sys.path:
        yield
        return
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def told(error: BaseException) -> str:
    """An error in one line: its type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _kind(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return "None" if value is None else f"a value of type {type(value).__name__}"
