"""Lines of the user's program, taken down cheaply while it runs and looked up when told."""

from __future__ import annotations

import contextlib
import functools
import itertools
import linecache
import os
import sys
import textwrap
import weakref
from dataclasses import dataclass
from types import CodeType
from typing import NamedTuple

import torch

import contig_pass

#: A place in running code: the code object, and the instruction in it.
Spot = tuple[CodeType, int]

_OURS = tuple(
    os.path.dirname(os.path.abspath(package.__file__)) + os.sep for package in (torch, contig_pass)
)
#: Characters of a call that are shown.
_SHOWN = 100
_GENERATED = ("<eval_with_key>", "<frozen ")
#: Frames of decorators, which call what they decorate.
_WRAPPERS = (contextlib.__file__, functools.__file__)


@dataclass(frozen=True)
class Line:
    """A line of the user's source.

    Attributes:
        file: path of the source file, empty if no Python frame of the user's was there.
        lineno: line number, 0 if unknown.
        code: the line's text, empty if the source cannot be read.
    """

    file: str = ""
    lineno: int = 0
    code: str = ""

    def __str__(self) -> str:
        if not self.file:
            return "a thread of autograd's, which runs no line of Python"
        shown = os.path.relpath(self.file) if os.path.isabs(self.file) else self.file
        shown = self.file if shown.startswith("..") else shown
        place = f"{shown}:{self.lineno}"
        return f"{place} ({self.code})" if self.code else place


NOWHERE = Line()


class Caller(NamedTuple):
    """Who calls an op: the place in the user's code, and the path of the module around it."""

    spot: Spot | None
    module: str

    @property
    def line(self) -> Line:
        """The line of the place."""
        return line_at(self.spot)


def spot() -> Spot | None:
    """Where the innermost frame outside torch and contig_pass is; ``None`` if there is none."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if not is_internal(code.co_filename):
            return code, frame.f_lasti
        frame = frame.f_back
    return None


def caller() -> Caller:
    """Who calls, now."""
    return Caller(spot(), module_path())


def line_at(place: Spot | None) -> Line:
    """The line of ``place``, with the whole call that it begins."""
    if place is None:
        return NOWHERE
    code, instruction = place
    nowhere = (None, None, None, None)
    first, last, _, _ = next(
        itertools.islice(code.co_positions(), instruction // 2, None), nowhere
    )
    first = first or code.co_firstlineno
    numbers = range(first, (last or first) + 1)
    lines = (linecache.getline(code.co_filename, number).strip() for number in numbers)
    text = textwrap.shorten(" ".join(lines), _SHOWN, placeholder=" ...")
    return Line(code.co_filename, first, text)


def module_path() -> str:
    """Dotted path of the innermost ``torch.nn.Module`` being called, from the outermost one.

    The class's name where that does not hold it; empty outside of any module.
    """
    inner = outer = None
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _CALLING:
            outer = frame.f_locals["self"]
            inner = outer if inner is None else inner
        frame = frame.f_back
    if inner is None:
        return ""
    known = _paths.get(inner)
    if known is None or known[0]() is not outer:
        found = (name for name, module in outer.named_modules() if module is inner)
        path = next(found, "") or type(inner).__name__
        known = _paths[inner] = (weakref.ref(outer), path)
    return known[1]


_CALLING = torch.nn.Module.__call__.__code__
_paths: weakref.WeakKeyDictionary[torch.nn.Module, tuple[weakref.ref, str]] = (
    weakref.WeakKeyDictionary()
)


@functools.cache
def is_internal(filename: str) -> bool:
    """Whether code of ``filename`` is torch's, contig_pass's or generated."""
    return filename.startswith((*_OURS, *_GENERATED, *_WRAPPERS))
