"""A browser for the tests of the HTML report."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from contig_pass.report.html import to_html
from contig_pass.report.model import Report
from tests.browser import Page, browser, find_chromium


@pytest.fixture(scope="session")
def chromium() -> Iterator[Page]:
    executable = find_chromium()
    if executable is None:
        reason = (
            "NO BROWSER TEST RAN: there is no Chromium. Install one (apt-get install chromium) or "
            "name one in the variable CHROMIUM"
        )
        warnings.warn(reason, stacklevel=1)
        pytest.skip(reason)
    with browser(executable) as page:
        yield page


@pytest.fixture
def page(chromium: Page) -> Iterator[Page]:
    chromium.shape(1280)
    chromium.media()
    yield chromium
    assert chromium.problems == []
    assert all(url.startswith("file:") for url in chromium.requests)


@pytest.fixture
def show(page: Page, tmp_path: Path) -> Callable[..., Page]:
    """Opens reports as a page; the test fails if that page complains or asks for anything."""

    def show(*reports: Report) -> Page:
        path = tmp_path / "report.html"
        path.write_text(to_html(reports), encoding="utf-8")
        page.open(path)
        page.settle()
        assert page.requests == [path.as_uri()]
        return page

    return show
