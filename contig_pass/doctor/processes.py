"""Work in processes of its own, several at once, each with a limit of time.

The processes are forked: what the parent has imported costs them nothing. The parent must not have
touched a GPU, since a CUDA context does not survive a fork.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any

import torch

from contig_pass.doctor.errors import DoctorError

CRASH, TIMEOUT, FAILED = "crash", "timeout", "failed"


@dataclass(frozen=True)
class Ended:
    """How one piece of work ended.

    Attributes:
        value: what it returned.
        problem: ``""``, :data:`CRASH`, :data:`TIMEOUT`, or :data:`FAILED` for an exception.
        message: the problem in one line.
    """

    value: Any = None
    problem: str = ""
    message: str = ""


@dataclass
class _Running:
    number: int
    process: multiprocessing.process.BaseProcess
    receiver: connection.Connection
    deadline: float


def run_all(
    works: Sequence[Callable[[], Any]],
    *,
    jobs: int,
    timeout: float,
    ended: Callable[[int, Ended], None] = lambda number, end: None,
) -> list[Ended]:
    """Run each of ``works`` in a process of its own.

    Args:
        works: return something that can be pickled.
        jobs: how many processes at a time.
        timeout: seconds that one may take.
        ended: called with the position of each when it has ended, in order of ending.

    Raises:
        DoctorError: this process has used a GPU, or this system has no ``fork``.
    """
    _check_forkable()
    results: list[Ended | None] = [None] * len(works)
    waiting = list(enumerate(works))[::-1]
    running: list[_Running] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_started(*waiting.pop(), timeout))
            for one, end in _ended(running):
                running.remove(one)
                results[one.number] = end
                ended(one.number, end)
    finally:
        for one in running:
            _stop(one)
    return [end for end in results if end is not None]


def run_one(work: Callable[[], Any], timeout: float) -> Ended:
    """Run ``work`` in a process of its own; see :func:`run_all`."""
    return run_all([work], jobs=1, timeout=timeout)[0]


def one_line(error: BaseException) -> str:
    """An error's type and the first line of its message, at most 300 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(": ")[:300]


def _check_forkable() -> None:
    if "fork" not in multiprocessing.get_all_start_methods():
        raise DoctorError(f"the doctor needs os.fork, which {sys.platform} does not have")
    if torch.cuda.is_initialized():
        raise DoctorError(
            "this process has used a GPU already, which its children could not; run the command "
            "`contig-pass doctor`"
        )


def _started(number: int, work: Callable[[], Any], timeout: float) -> _Running:
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def child() -> None:
        _silence()
        torch.set_num_threads(1)  # the parent's pool of threads is not there after a fork
        try:
            end = Ended(work())
        except Exception as error:
            end = Ended(None, FAILED, one_line(error))
        sender.send(end)

    process = multiprocessing.get_context("fork").Process(target=child, daemon=True)
    process.start()
    sender.close()
    return _Running(number, process, receiver, time.monotonic() + timeout)


def _silence() -> None:
    """Kernels and compilers print what is told in the result as well; a crash is no surprise."""
    faulthandler.disable()
    with open(os.devnull, "wb") as nowhere:
        for stream in (1, 2):
            os.dup2(nowhere.fileno(), stream)


def _ended(running: Sequence[_Running]) -> list[tuple[_Running, Ended]]:
    """Those that have ended, at least one; they are stopped."""
    ends: list[tuple[_Running, Ended]] = []
    while not ends:
        patience = min(one.deadline for one in running) - time.monotonic()
        ready = connection.wait([one.receiver for one in running], max(patience, 0.0))
        for one in running:
            if one.receiver in ready:
                ends.append((one, _received(one)))
            elif time.monotonic() >= one.deadline:
                _stop(one)
                ends.append((one, Ended(None, TIMEOUT, "did not end in time")))
    return ends


def _received(one: _Running) -> Ended:
    try:
        return one.receiver.recv()
    except EOFError:
        one.process.join()
        return Ended(None, CRASH, _exit_words(one.process.exitcode))
    finally:
        _stop(one)


def _stop(one: _Running) -> None:
    # A context that a kernel broke may not let its process end by itself.
    one.process.kill()
    one.process.join()
    one.receiver.close()


def _exit_words(code: int | None) -> str:
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"
