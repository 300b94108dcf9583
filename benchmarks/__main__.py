"""``python -m benchmarks SUBCOMMAND``: exits 1 when a required row fails; the last line printed
is the summary."""

from __future__ import annotations

import argparse
import sys

from benchmarks import accuracy, clean, pass_scaling, peer, prologue, sanitizer_overhead
from benchmarks.coverage import command as coverage
from benchmarks.faults import command as faults
from benchmarks.speed import commands as speed

SUBCOMMANDS = (
    faults, pass_scaling, prologue, clean, peer, coverage, accuracy, sanitizer_overhead, speed
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    subparsers = parser.add_subparsers(dest="command", required=True)
    for subcommand in SUBCOMMANDS:
        subcommand.add_parser(subparsers)
    args = parser.parse_args()
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
