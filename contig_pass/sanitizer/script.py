"""Run a script as ``__main__`` under the sanitizer."""

from __future__ import annotations

import logging
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from types import ModuleType, TracebackType

from contig_pass.contracts.target import AUTO
from contig_pass.errors import ContigPassError, LayoutViolation
from contig_pass.sanitizer import sanitize
from contig_pass.sanitizer.checker import RAISE
from contig_pass.sanitizer.lines import is_internal

_logger = logging.getLogger("contig_pass")
_RUNNERS = tuple(os.path.abspath(file) for file in (__file__, runpy.__file__))


def run_script(
    script: str,
    args: Sequence[str],
    *,
    module: bool = False,
    mode: str = RAISE,
    target: str = AUTO,
) -> int:
    """Run ``script`` as Python would, under :func:`contig_pass.sanitize`.

    Args:
        script: path of a file; with ``module``, a module's dotted name.
        args: what follows the script's name in ``sys.argv``.
        module: run a module, as ``python -m`` does.
        mode, target: as for :func:`contig_pass.sanitize`.

    Returns:
        1 if a violation was raised, caught by the script or not; else the script's exit code.

    Raises:
        ContigPassError: the script cannot be read or compiled, or an option is bad.
    """
    sanitizer = sanitize(mode, target=target)
    run = _module(script) if module else _file(script)
    sys.argv = [script, *args]
    code = 0
    try:
        with sanitizer:
            run()
    except SystemExit as stopped:
        code = _exit_code(stopped.code)
    except Exception as error:
        code = 1
        # As the interpreter does it, less the frames that are not the script's.
        error.with_traceback(_of_script(error.__traceback__, isinstance(error, LayoutViolation)))
        sys.excepthook(type(error), error, error.__traceback__)
    count = len(sanitizer.findings)
    if count:
        lines = len({(f.line.file, f.line.lineno) for f in sanitizer.findings})
        _logger.warning(
            "sanitizer, mode %s: %d finding%s at %d line%s", mode,
            count, "s" * (count > 1), lines, "s" * (lines > 1),
        )
    return 1 if count and mode == RAISE else code


def _file(path: str) -> Callable[[], None]:
    try:
        with open(path, "rb") as file:
            source = file.read()
        code = compile(source, os.path.abspath(path), "exec")
    except (OSError, SyntaxError, ValueError) as error:
        raise ContigPassError(f"cannot run {path}: {error}") from error

    def run() -> None:
        main = ModuleType("__main__")
        main.__dict__.update(__file__=os.path.abspath(path), __builtins__=__builtins__)
        # It stays: what was pickled or registered to run at exit belongs to it.
        sys.modules["__main__"] = main
        sys.path[0] = os.path.dirname(os.path.abspath(path))
        exec(code, main.__dict__)

    return run


def _module(name: str) -> Callable[[], None]:
    def run() -> None:
        sys.path[0] = os.getcwd()
        runpy.run_module(name, run_name="__main__", alter_sys=True)

    return run


def _exit_code(code: object) -> int:
    if code is None or isinstance(code, int):
        return code or 0
    sys.stderr.write(f"{code}\n")
    return 1


def _of_script(traceback: TracebackType | None, ours: bool) -> TracebackType | None:
    """``traceback`` from the script's first frame on; of an error of ``ours``, to its last."""
    while traceback is not None and traceback.tb_next is not None and _runs(traceback):
        traceback = traceback.tb_next
    last = step = traceback
    while ours and step is not None:
        last = last if is_internal(step.tb_frame.f_code.co_filename) else step
        step = step.tb_next
    if ours and last is not None:
        last.tb_next = None
    return traceback


def _runs(traceback: TracebackType) -> bool:
    filename = traceback.tb_frame.f_code.co_filename
    return os.path.abspath(filename) in _RUNNERS or filename.startswith("<frozen runpy")
