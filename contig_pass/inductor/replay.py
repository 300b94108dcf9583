"""Reports of graphs that a compile cache delivers: no pass runs on those.

When a graph was compiled, its report is stored beside Inductor's own cache files under the graph's
cache key, and added to the artifacts that ``torch.compiler.save_cache_artifacts`` collects. When
a graph is loaded, the report of that key is delivered again, marked as cached.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from contig_pass.errors import ReportError
from contig_pass.inductor import hooks
from contig_pass.report.json import from_file, to_file
from contig_pass.report.model import Report, merge

_ARTIFACT = "contig_pass_report"
_logger = logging.getLogger("contig_pass")
_installing = threading.Lock()


@dataclass
class Delivery:
    """Where one backend call's reports go.

    Attributes:
        deliver: receives each report.
        fresh: reports of the graph that is being compiled, not stored yet.
        folded: what was done to its parameters before that, once.
    """

    deliver: Callable[[Report], None]
    fresh: list[Report] = field(default_factory=list)
    folded: list[Report] = field(default_factory=list)

    def __call__(self, report: Report) -> None:
        """Deliver the report of a pass that has run."""
        if self.folded:
            report = merge([*self.folded, report])
            self.folded = []
        self.fresh.append(report)
        self.deliver(report)

    def add_folded(self, report: Report) -> None:
        """What was done to parameters, to be told with the graph's own report."""
        self.folded.append(report)

    def loaded(self, key: str | None) -> None:
        """A graph is ready to run: compiled just now, or loaded from a cache under ``key``."""
        reports, self.fresh, self.folded = self.fresh, [], []
        if key is None:
            return
        if reports:
            content = json.dumps(to_file(reports)).encode()
            _store(key, content)
        else:
            content = _stored(key)
            if content is None:
                _logger.warning(
                    "a graph came out of the compile cache without its report, which was removed "
                    "from beside it: %s; torch._inductor.config.force_disable_caches gives a new "
                    "one", _path(key)
                )
                return
            for report in from_file(json.loads(content)):
                self.deliver(replace(report, cached=True))
        _record(key, content)


_CURRENT: ContextVar[Delivery | None] = ContextVar("contig_pass_delivery", default=None)


@contextlib.contextmanager
def delivering(delivery: Delivery) -> Iterator[None]:
    """Inside the block, graphs that become ready are reported through ``delivery``."""
    install()
    token = _CURRENT.set(delivery)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def install() -> None:
    """Take notice of graphs that become ready, once a process."""
    with _installing:
        _wrap_post_compile()
        _artifact_type()


@functools.cache
def _wrap_post_compile() -> None:
    from torch._inductor.output_code import CompiledFxGraph

    original = hooks.POST_COMPILE.find()
    if original is None:
        return

    @functools.wraps(original)
    def post_compile(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        delivery = _CURRENT.get()
        if delivery is not None:
            delivery.loaded(self._fx_graph_cache_key)

    CompiledFxGraph.post_compile = post_compile  # type: ignore[method-assign]


def _path(key: str) -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()) / "contig_pass" / f"{key}.json"


def _store(key: str, content: bytes) -> None:
    path = _path(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(content)
        os.replace(file.name, path)
    except OSError as error:
        _logger.warning("the report of %s could not be kept: %s", key, error)


def _stored(key: str) -> bytes | None:
    try:
        content = _path(key).read_bytes()
        from_file(json.loads(content))
    except (OSError, ValueError, ReportError):
        return None
    return content


@functools.cache
def _artifact_type() -> Any:
    """The kind of artifact that reports are in ``torch.compiler.save_cache_artifacts``."""
    if hooks.CACHE_ARTIFACTS.find() is None:
        return None
    from torch.compiler._cache import CacheArtifact, CacheArtifactFactory

    class ReportArtifact(CacheArtifact):
        def populate_cache(self) -> None:
            _store(self.key, self.content)

        @staticmethod
        def type() -> str:
            return _ARTIFACT

    return CacheArtifactFactory.register(ReportArtifact)


def _record(key: str, content: bytes) -> None:
    if _artifact_type() is not None:
        from torch.compiler._cache import CacheArtifactManager

        CacheArtifactManager.record_artifact(_ARTIFACT, key, content)
