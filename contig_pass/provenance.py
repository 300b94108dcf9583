"""Where in the user's program an FX node comes from."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import fx

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')
_ROOTS = re.compile(r"^([GL]\[['\"]\w+['\"]\]|[GL]__\w+?__+|self)\.?")
_SUBMODULE = re.compile(r"(?:\._modules)?\[['\"]([^'\"\]]+)['\"]\]")


@dataclass(frozen=True)
class Origin:
    """A line of the user's source and the module it ran in.

    Attributes:
        file: path of the source file, empty if unknown.
        lineno: line number, 0 if unknown.
        code: the line's text.
        module: dotted path of the module, empty at the top.
    """

    file: str
    lineno: int
    code: str
    module: str

    @property
    def line(self) -> str:
        """``file:line``, or words where that is not known."""
        return f"{self.file}:{self.lineno}" if self.file else "an unknown source line"


def origin_of(node: fx.Node) -> Origin:
    """The origin of ``node``: the innermost frame of its stack trace, its innermost module."""
    trace = node.meta.get("stack_trace") or ""
    frames = list(_FRAME.finditer(trace))
    if not frames:
        return Origin("", 0, "", module_path(node))
    last = frames[-1]
    following = trace[last.end() :].strip().splitlines()
    code = following[0].strip() if following else ""
    return Origin(last["file"], int(last["line"]), code, module_path(node))


def module_path(node: fx.Node) -> str:
    """Dotted path of the innermost module that ``node`` was traced in, from the compiled root."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    path = _ROOTS.sub("", path)
    return _SUBMODULE.sub(r".\1", path).strip(".")


def parameter_name(source: str) -> str:
    """Dotted path of a parameter or buffer from Dynamo's name of where it was found."""
    path = _ROOTS.sub("", source)
    path = re.sub(r"\._(?:modules|parameters|buffers)(?=\[)", "", f".{path}")
    return re.sub(r"\[['\"]?([^'\"\]]+)['\"]?\]", r".\1", path).replace("..", ".").strip(".")


def repeated(module: str) -> str:
    """``module`` with layer numbers as ``*``, so that equal blocks have one name."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)", "*", module)
