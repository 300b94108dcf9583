"""What can be wrong with a checkpoint, collected, and raised as one error."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Problem(NamedTuple):
    """One tensor that does not fit.

    Attributes:
        kind: ``"missing"``, ``"extra"``, ``"shape"``, ``"dtype"``, ``"format"``, ``"truncated"``,
            ``"corrupt"`` or ``"twice"``.
        name: the tensor, as the file calls it or would call it.
        detail: what is wrong and what would be right; may be empty for missing and extra ones.
    """

    kind: str
    name: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.name}" + (f" ({self.detail})" if self.detail else "")


class CheckpointError(ValueError):
    """A checkpoint that does not fit, with every reason; nothing was loaded.

    Attributes:
        problems: one for each tensor.
    """

    def __init__(self, path: object, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        super().__init__(
            f"{path} cannot be loaded, {count} problem{'s' if count > 1 else ''}: "
            + "; ".join(map(str, self.problems))
        )
