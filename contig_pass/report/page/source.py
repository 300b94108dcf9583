"""Excerpts of the user's source files, as they read when a report is rendered."""

from __future__ import annotations

import os
import tokenize
from collections.abc import Sequence
from typing import Any

from contig_pass.report.copies import Copy
from contig_pass.report.model import Row

#: Lines shown on each side of the one that a row names.
CONTEXT = 5
#: Longest line of an excerpt, in characters; generated files have longer ones.
_LONGEST = 400


class Excerpts:
    """The excerpts that rows refer to by number; each file is read once.

    Attributes:
        found: ``{file, lineno, first, lines, stale}`` each. ``lines`` is empty where the file
            cannot be read. ``stale``: the line does not read as it did when it was traced.
    """

    def __init__(self) -> None:
        self.found: list[dict[str, Any]] = []
        self._numbers: dict[tuple[str, int], int] = {}
        self._files: dict[str, Sequence[str]] = {}

    def number_of(self, row: Row | Copy) -> int | None:
        """The number of the excerpt around the source line of ``row``; ``None``: it has none."""
        if not row.file:
            return None
        key = (row.file, row.lineno)
        if key not in self._numbers:
            self._numbers[key] = len(self.found)
            self.found.append(self._excerpt(row))
        return self._numbers[key]

    def _excerpt(self, row: Row | Copy) -> dict[str, Any]:
        lines = self._lines(row.file)
        at = row.lineno - 1
        if not 0 <= at < len(lines):
            lines = ()
        first = max(at - CONTEXT, 0)
        shown = [line[:_LONGEST] for line in lines[first : at + CONTEXT + 1]]
        return {
            "file": row.file,
            "lineno": row.lineno,
            "short": os.path.basename(row.file),
            "first": first + 1,
            "lines": shown,
            "stale": bool(shown and row.code and row.code not in lines[at]),
            "code": row.code,
        }

    def _lines(self, path: str) -> Sequence[str]:
        if path not in self._files:
            try:
                with tokenize.open(path) as file:  # honours the encoding that the file declares
                    self._files[path] = file.read().splitlines()
            except (OSError, SyntaxError, ValueError):
                self._files[path] = ()
        return self._files[path]
