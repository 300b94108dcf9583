"""``python -m contig_pass.sanitizer [--mode M] script.py args...``: a script under the sanitizer.

Exit codes: 1 if a violation was raised, 2 for a bad command line, else the script's own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from contig_pass.errors import ContigPassError
from contig_pass.sanitizer.checker import MODES, RAISE
from contig_pass.sanitizer.script import run_script

_PROGRAM = "python -m contig_pass.sanitizer"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv``; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog=_PROGRAM,
        usage=f"{_PROGRAM} [--mode {{{','.join(MODES)}}}] [--target T] (script.py | -m module) ...",
        description="Run a script; check every op's operands before its kernel is launched.",
    )
    parser.add_argument("--mode", choices=MODES, default=RAISE, help="what a violation does")
    parser.add_argument("--target", default="auto", help="whose demands count: auto, cpu, sm90")
    parser.add_argument("-m", dest="module", action="store_true", help="script is a module's name")
    parser.add_argument("script", help="path of the script, or name of the module")
    parser.add_argument("args", nargs=argparse.REMAINDER, help="what the script gets")
    options = parser.parse_args(argv)
    try:
        return run_script(
            options.script, options.args, module=options.module, mode=options.mode,
            target=options.target,
        )
    except (ContigPassError, OSError) as error:
        sys.stderr.write(f"{_PROGRAM}: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
