"""The console script ``contig-pass``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from contig_pass.differ import command as diff
from contig_pass.doctor import command as doctor
from contig_pass.errors import ContigPassError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code: 0, 1 (it found something wrong), 2 (it failed)."""
    parser = argparse.ArgumentParser(
        prog="contig-pass", description="Layout safety for quantised kernels under torch.compile."
    )
    parser.add_argument("--version", action="version", version=f"contig-pass {_version()}")
    subparsers = parser.add_subparsers(dest="command", required=True)
    demo = subparsers.add_parser(
        "demo", help="a quantised Wan block with planted layout faults, before and after"
    )
    demo.set_defaults(run=_demo)
    diff.add_parser(subparsers)
    doctor.add_parser(subparsers)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except (ContigPassError, OSError) as error:
        print(f"contig-pass {args.command}: {error}", file=sys.stderr)
        return 2


def _demo(args: argparse.Namespace) -> int:
    del args
    try:
        # By name: contig_pass does not depend on the models that prove it.
        demo = importlib.import_module("wan_models.demo")
    except ModuleNotFoundError as error:
        raise ContigPassError(f"the demo needs the package wan_models: {error}") from error
    return demo.run(print)


def _version() -> str:
    try:
        return version("contig-pass")
    except PackageNotFoundError:
        return "from a source tree"


if __name__ == "__main__":
    sys.exit(main())
