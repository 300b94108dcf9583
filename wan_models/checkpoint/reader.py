"""Reads safetensors files: headers first, then tensors as views of the mapped file.

The format: 8 bytes with the little-endian length of a JSON header, the header, then the tensors'
bytes. The header gives each tensor a type, a shape and its first and last byte, counted from the
header's end. Source: the format's public description. It is read here, not by the library of the
same name, because that stops at the first fault, and a checkpoint's faults are to be listed.
"""

from __future__ import annotations

import bisect
import json
import math
import mmap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from wan_models.checkpoint.errors import CheckpointError, Problem

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
#: A view of the file at an address that is no multiple of this is copied: kernels demand it.
ALIGNMENT = 16
#: Most bytes mapped as one, a tensor that is larger apart: Linux refuses a private mapping that is
#: larger than its memory.
WINDOW = 1 << 30
#: Longest header accepted, as in the format's own reader.
_LONGEST_HEADER = 100_000_000
_INDEX = ".safetensors.index.json"


@dataclass(frozen=True)
class Entry:
    """One tensor of a file.

    Attributes:
        name: as the file has it.
        dtype: its type.
        shape: its sizes.
        file: the file that holds it.
        start: its first byte, counted from the file's beginning.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, part: int, parts: int) -> Entry:
        """The ``part``-th of ``parts`` equal groups of rows."""
        count = self.shape[0] // parts
        skipped = part * count * math.prod(self.shape[1:]) * self.dtype.itemsize
        return replace(
            self,
            name=f"{self.name}[{part * count}:{(part + 1) * count}]",
            shape=(count, *self.shape[1:]),
            start=self.start + skipped,
        )


@dataclass
class _Window:
    """A part of a file that is mapped as one: from ``start`` to ``end``."""

    start: int
    end: int
    _mapped: mmap.mmap | None = None

    def mapped(self, path: Path) -> mmap.mmap:
        """The mapping: changes to it stay in memory. It lasts as long as anything uses it."""
        if self._mapped is None:
            with path.open("rb") as file:
                self._mapped = mmap.mmap(
                    file.fileno(), self.end - self.start, access=mmap.ACCESS_COPY, offset=self.start
                )
        return self._mapped


def _windows(entries: Iterable[Entry]) -> list[_Window]:
    """Windows of a file, each tensor whole in one of them."""
    windows: list[_Window] = []
    for entry in sorted(entries, key=lambda entry: entry.start):
        end = entry.start + entry.nbytes
        if not windows or end - windows[-1].start > WINDOW:
            start = entry.start - entry.start % mmap.ALLOCATIONGRANULARITY
            windows.append(_Window(start, end))
        windows[-1].end = max(windows[-1].end, end)
    return windows


@dataclass
class Source:
    """The tensors of a checkpoint, in one file or several.

    Attributes:
        path: what was opened.
        entries: by name.
        metadata: what the headers carry besides tensors.
        problems: of single tensors; the others can be read.
    """

    path: Path
    entries: dict[str, Entry] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    _windows: dict[Path, list[_Window]] = field(default_factory=dict)

    def view(self, entry: Entry) -> torch.Tensor:
        """The tensor on the mapped file, without copying, at whatever address the file has it.

        Writing to it changes memory alone, never the file.
        """
        stride = torch.empty(entry.shape, device="meta").stride()
        made = torch.empty(0, dtype=entry.dtype)
        if entry.nbytes == 0:
            return made.set_(made.untyped_storage(), 0, entry.shape, stride)
        if entry.file not in self._windows:
            self._windows[entry.file] = _windows(
                [each for each in self.entries.values() if each.file == entry.file]
            )
        windows = self._windows[entry.file]
        window = windows[bisect.bisect_right([each.start for each in windows], entry.start) - 1]
        # A storage of its own: tensors are not to look as if they shared one.
        raw = torch.frombuffer(
            window.mapped(entry.file),
            dtype=torch.uint8,
            count=entry.nbytes,
            offset=entry.start - window.start,
        )
        return made.set_(raw.untyped_storage(), 0, entry.shape, stride)

    def read(self, entry: Entry) -> torch.Tensor:
        """The tensor as a copy of its own."""
        return realigned(self.view(entry))


def realigned(tensor: torch.Tensor) -> torch.Tensor:
    """A fresh copy of a dense tensor, made byte by byte: its elements may lie across words."""
    size = tensor.numel() * tensor.itemsize
    # ``set_`` because ``view(dtype)`` refuses tensors of no dimensions.
    raw = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage(), 0, (size,), (1,))
    return torch.empty(0, dtype=tensor.dtype).set_(
        raw.clone().untyped_storage(), 0, tensor.shape, tensor.stride()
    )


def open_checkpoint(path: str | Path) -> Source:
    """The headers of a checkpoint.

    Args:
        path: a ``.safetensors`` file, the index of several (``….safetensors.index.json``), or a
            folder that holds one of these.

    Raises:
        FileNotFoundError: there is nothing there.
        CheckpointError: a file that is no safetensors file at all, or an index of another form.
    """
    path = Path(path)
    if path.is_dir():
        path = _only_one(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: use a safetensors file, index or folder")
    source = Source(path)
    if path.suffix == ".json":
        _read_shards(source)
    else:
        _read_header(source, path)
    return source


def _only_one(folder: Path) -> Path:
    indices = sorted(folder.glob(f"*{_INDEX}"))
    found = indices or sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "nothing"
        raise FileNotFoundError(
            f"{folder} holds {names}: name the safetensors file or index to load"
        )
    return found[0]


def _read_shards(source: Source) -> None:
    try:
        where = json.loads(source.path.read_text())["weight_map"]
        shards: dict[Path, list[str]] = {}
        for name, file in where.items():
            shards.setdefault(source.path.parent / file, []).append(name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problem = Problem("corrupt", "index", 'use JSON with an object "weight_map" of files')
        raise CheckpointError(source.path, [problem]) from error
    for path, names in shards.items():
        if not path.is_file():
            source.problems += [Problem("missing", name, f"no file {path.name}") for name in names]
            continue
        before, unread = set(source.entries), len(source.problems)
        _read_header(source, path)
        faulty = {problem.name for problem in source.problems[unread:]}
        found = source.entries.keys() - before
        source.problems += [
            Problem("missing", name, f"the index has it in {path.name}")
            for name in names
            if name not in found and name not in faulty
        ]


def _read_header(source: Source, path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > _LONGEST_HEADER:
            raise _no_header(source, path, "it does not begin with a header's length")
        if 8 + length > size:
            raise _no_header(source, path, f"the header ends at byte {8 + length} of {size}")
        try:
            header = json.loads(file.read(length))
            metadata = dict(header.pop("__metadata__", {}))
            listed = list(header.items())
        except (ValueError, TypeError, AttributeError) as error:
            raise _no_header(source, path, "the header is no JSON object") from error
    source.metadata.update(metadata)
    ends: list[tuple[int, int, str]] = []
    for name, described in listed:
        try:
            kind, shape = described["dtype"], tuple(described["shape"])
            first, last = described["data_offsets"]
        except (KeyError, TypeError, ValueError):
            source.problems.append(Problem("corrupt", name, "its entry in the header"))
            continue
        if not all(isinstance(n, int) and n >= 0 for n in (*shape, first, last)):
            source.problems.append(Problem("corrupt", name, "its entry in the header"))
            continue
        start, end = 8 + length + first, 8 + length + last
        if kind not in DTYPES:
            source.problems.append(
                Problem("dtype", name, f"{kind} is not known: use one of {', '.join(DTYPES)}")
            )
            continue
        entry = Entry(name, DTYPES[kind], shape, path, start)
        if end - start != entry.nbytes:
            source.problems.append(
                Problem("corrupt", name, f"{kind} {list(shape)} in {end - start} bytes")
            )
        elif end > size:
            source.problems.append(
                Problem("truncated", name, f"ends at byte {end} of {size} in {path.name}")
            )
        elif name in source.entries:
            source.problems.append(
                Problem("twice", name, f"in {source.entries[name].file.name} and {path.name}")
            )
        else:
            source.entries[name] = entry
            ends.append((start, end, name))
    source.problems += _overlapping(ends)


def _no_header(source: Source, path: Path, reason: str) -> CheckpointError:
    kind = "truncated" if "ends at byte" in reason else "corrupt"
    return CheckpointError(source.path, [Problem(kind, path.name, reason)])


def _overlapping(ends: Sequence[tuple[int, int, str]]) -> Iterable[Problem]:
    reach, owner = 0, ""
    for start, end, name in sorted(ends):
        if start < reach and start < end:
            yield Problem("corrupt", name, f"shares bytes with {owner}")
        if end > reach:
            reach, owner = end, name


@dataclass
class Placer:
    """Puts tensors of a checkpoint on their devices, each once.

    Attributes:
        source: the open files.
        device: for each official name, where its tensor goes.
        repaired: names whose bytes were copied because the file has them at a misaligned address.
        transposed: names that the file has with rows and columns exchanged.
        nbytes: bytes read.
    """

    source: Source
    device: Callable[[str], torch.device]
    repaired: list[str] = field(default_factory=list)
    transposed: list[str] = field(default_factory=list)
    nbytes: int = 0

    def __call__(
        self, entry: Entry, name: str, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """The tensor on its device in ``dtype`` (None keeps the file's).

        On the CPU, in the file's type and at an aligned address, that is the mapped file itself.
        """
        stored = self.source.view(entry)
        if self.device(name).type != "cpu" or dtype not in (None, entry.dtype):
            return self.moved(entry, name, dtype)
        self.nbytes += entry.nbytes
        if stored.data_ptr() % ALIGNMENT == 0:
            return stored
        self.repaired.append(name)
        return realigned(stored)

    def moved(self, entry: Entry, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor as memory of its own, on its device."""
        stored = self.source.view(entry)
        self.nbytes += entry.nbytes
        if stored.data_ptr() % entry.dtype.itemsize:  # no address to convert or send from
            stored = realigned(stored)
        return stored.to(self.device(name), dtype or entry.dtype, copy=True)
