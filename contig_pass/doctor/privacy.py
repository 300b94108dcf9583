"""Take out of a report what says whose machine it is."""

from __future__ import annotations

import getpass
import os
import platform
import re
import sys
import tempfile
from pathlib import Path
from typing import Any


def scrubbed(value: Any) -> Any:
    """``value``, made of dicts, lists and strings, with private places and names replaced.

    Paths below the Python installation, the working directory and the home directory lose that
    part, and the names of user and host are replaced wherever they stand as a word.
    """
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, dict):
        return {key: scrubbed(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [scrubbed(item) for item in value]
    return value


def _text(text: str) -> str:
    for place, word in _places():
        text = re.sub(re.escape(place) + r"(?![\w.-])", word, text)
    for name, word in _names():
        text = re.sub(rf"(?<![A-Za-z0-9-]){re.escape(name)}(?![A-Za-z0-9-])", word, text)
    return text


def _places() -> list[tuple[str, str]]:
    """Directories, longest first; none that is so short that it would match anything."""
    package = Path(__file__).parents[2]
    found = {
        sys.prefix: "<python>", sys.base_prefix: "<python>", os.getcwd(): "<working directory>",
        str(Path.home()): "~", tempfile.gettempdir(): "<tmp>", str(package): "<contig_pass>",
    }
    places = [(place, word) for place, word in found.items() if len(place) > 3]
    return sorted(places, key=lambda pair: -len(pair[0]))


def _names() -> list[tuple[str, str]]:
    try:
        user = getpass.getuser()
    except (KeyError, ImportError, OSError):
        user = ""
    found = ((user, "<user>"), (platform.node(), "<host>"))
    # That somebody is root says nothing of them.
    return [(name, word) for name, word in found if name not in ("", "root", "localhost")]
