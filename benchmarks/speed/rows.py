"""What a command times: rows, how they are prepared, and groups that share inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, TypeVar

from benchmarks.speed.sizes import PEAK_TBS, PEAK_TFLOPS, terabytes, tflops

OK, FAILED, UNAVAILABLE, NOT_RUN = "ok", "failed", "not available", "not run"
Made = TypeVar("Made")


class Unavailable(Exception):
    """Something that a row needs is not on this machine; the message says what."""


@dataclass
class Row:
    """One line of a table.

    Attributes:
        group: the table's title: a resolution, or a shape.
        name: what is timed.
        counts: what of it: ``"GEMM only"``, ``"quantisation counted"``, ... or ``""``.
        required: whether a failure of this row is one of the command.
        flops, moved: work of one call in FLOPs and in bytes that have to be moved at least; None
            where there is no such number. A row with FLOPs is rated by these.
        peak: the key of :data:`benchmarks.speed.sizes.PEAK_TFLOPS` that the rate is held against.
        limits: the least and greatest accuracy, ``{"cosine": (">=", 0.999)}``.
        ms: median milliseconds; fastest, slowest: of the rounds; rounds: how many.
        accuracy: by name.
        figures: whatever else was measured, by name with its unit.
        status: :data:`OK`, :data:`FAILED`, :data:`UNAVAILABLE` or :data:`NOT_RUN`.
        reason: why not ok, in one line.
    """

    group: str
    name: str
    counts: str = ""
    required: bool = False
    flops: float | None = None
    moved: float | None = None
    peak: str = "fp8"
    limits: dict[str, tuple[str, float]] = field(default_factory=dict)
    ms: float | None = None
    fastest: float | None = None
    slowest: float | None = None
    rounds: int = 0
    accuracy: dict[str, float] = field(default_factory=dict)
    figures: dict[str, float | str] = field(default_factory=dict)
    status: str = NOT_RUN
    reason: str = "not reached"

    @property
    def label(self) -> str:
        """All that tells the row from others of its group."""
        return f"{self.name}, {self.counts}" if self.counts else self.name

    @property
    def tflops(self) -> float | None:
        """Rate of the products."""
        return tflops(self.flops, self.ms) if self.flops and self.ms else None

    @property
    def tbs(self) -> float | None:
        """Rate of the bytes in TB/s."""
        return terabytes(self.moved, self.ms) if self.moved and self.ms else None

    @property
    def percent(self) -> float | None:
        """Of the peak: of products where there are any, else of the memory."""
        if self.tflops is not None:
            return 100 * self.tflops / PEAK_TFLOPS[self.peak]
        return None if self.tbs is None else 100 * self.tbs / PEAK_TBS

    def inaccurate(self) -> str:
        """Which accuracy misses its limit, in one line, or ``""``."""
        for name, (sign, limit) in self.limits.items():
            got = self.accuracy.get(name)
            if got is None:
                return f"accuracy {name} was not measured (required: {sign} {limit})"
            if not holds(got, sign, limit):
                return f"accuracy {name} = {got:.5f}, required {sign} {limit}"
        return ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON; the derived rates are in it."""
        rates = {"tflops": self.tflops, "tbs": self.tbs, "percent_of_peak": self.percent}
        return {**asdict(self), **rates}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Row:
        """The inverse of :meth:`as_dict`."""
        content = {k: v for k, v in content.items() if k in cls.__dataclass_fields__}
        content["limits"] = {k: (v[0], v[1]) for k, v in content.get("limits", {}).items()}
        return cls(**content)


@dataclass
class Prepared:
    """A row that is ready to be timed.

    Attributes:
        call: what is timed.
        accuracy: measured once, after the first call.
        figures: measured once, after the accuracy.
        timed: False for a row whose figures are all there is.
        called: whether the first call, which compiles, was made already.
    """

    call: Callable[[], Any]
    accuracy: Callable[[], dict[str, float]] | None = None
    figures: Callable[[], dict[str, float | str]] | None = None
    timed: bool = True
    called: bool = False


@dataclass
class Task:
    """A row, and what makes it ready; that raises :class:`Unavailable` where it cannot be."""

    row: Row
    prepare: Callable[[], Prepared]


class Shared(Generic[Made]):
    """Something that rows of a group share, made when one first asks; an error is shared too."""

    def __init__(self, make: Callable[[], Made]) -> None:
        self._make = make
        self._made: list[Made] = []
        self._error: Exception | None = None

    def __call__(self) -> Made:
        if self._error is not None:
            raise self._error
        if not self._made:
            try:
                self._made.append(self._make())
            except Exception as error:
                self._error = error.with_traceback(None)  # whose frames would keep tensors alive
                raise
        return self._made[0]

    def drop(self) -> None:
        """Give the memory back; asked again, it is made anew."""
        self._made.clear()
        self._error = None


@dataclass
class Group:
    """Rows that share inputs and are timed in turn."""

    title: str
    tasks: list[Task]
    shared: Sequence[Shared[Any]] = ()


def holds(value: float, sign: str, limit: float) -> bool:
    """Whether ``value`` is on the right side of ``limit``; NaN is on neither."""
    return value <= limit if sign == "<=" else value >= limit
