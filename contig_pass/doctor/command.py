"""``contig-pass doctor``: what works on this machine, and whether the contracts hold on it.

Exit codes: 0, fine; 1, a contract disagrees with this machine, nothing at all could be verified
with ``--verify``, or the self-test of the private hooks failed; 2, bad input. The JSON of
``--json`` is described in :mod:`contig_pass.doctor.examination`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from contig_pass.doctor.errors import DoctorError

_EXIT_CODES = """\
exit codes:
  0  fine
  1  with --verify: a contract disagrees with this machine, or nothing could be
     tried; or the self-test of the private hooks failed
  2  bad input: no such device, no such program, a file that cannot be written

With --verify a layout that the contract allows must give the right value, and one
that it forbids must not, in eager mode or compiled. "stricter" is a forbidden
layout that this machine takes, where the contract says that some do.
"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register ``doctor``; its ``run`` returns the exit code."""
    parser = subparsers.add_parser(
        "doctor",
        help="what works on this machine, and whether the contracts hold on it",
        description="Versions, GPU, attention kernels and quantised products with the reason why "
        "some do not work, private hooks of torch, compile caches; with --verify every contract "
        "tried on this machine.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--verify", action="store_true",
        help="try legal and illegal layouts of every operand, each in a process of its own",
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), help="default: cuda where there is a GPU"
    )
    parser.add_argument(
        "--only", default="", metavar="TEXT",
        help="with --verify: programs whose name contains this, such as '_scaled_mm row-wise'",
    )
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes at a time")
    parser.add_argument(
        "--timeout", type=float, default=120, metavar="S", help="seconds for one process"
    )
    parser.add_argument(
        "--json", metavar="F", help="write everything, without names and private paths, as JSON"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, say: Callable[[str], None] | None = None) -> int:
    """Carry out ``doctor``; returns the exit code, 0 or 1.

    Args:
        args: as :func:`add_parser` declares them.
        say: prints; by default to standard output.

    Raises:
        ContigPassError: bad input, which the CLI tells in one line with exit code 2.
    """
    say = say or _say
    _check(args)
    # torch then asks the driver's library whether there is a GPU, and can still fork.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    # What follows imports every module that it looks at, which other commands need not wait for.
    from contig_pass.doctor.examination import examine, to_json
    from contig_pass.doctor.machine import default_device
    from contig_pass.doctor.text import to_text, verified_text
    from contig_pass.doctor.verify import verify

    device = args.device or default_device()
    if device == "cuda" and default_device() != "cuda":
        raise DoctorError("--device cuda: torch sees no CUDA device; use --device cpu")
    found = examine(device, args.jobs, args.timeout)
    say(to_text(found))
    if args.verify:
        verification = verify(
            device, only=args.only, jobs=args.jobs, timeout=args.timeout, progress=_progress
        )
        found = replace(found, verification=verification)
        say("\n" + verified_text(verification))
    if args.json:
        Path(args.json).write_text(json.dumps(to_json(found), indent=1) + "\n", encoding="utf-8")
    return 0 if found.fine else 1


def _check(args: argparse.Namespace) -> None:
    """Fail before anything is examined."""
    if args.jobs < 1:
        raise DoctorError(f"--jobs {args.jobs}: use at least 1")
    if not args.timeout > 0:
        raise DoctorError(f"--timeout {args.timeout:g}: use a number of seconds above 0")
    if args.only and not args.verify:
        raise DoctorError("--only says what to verify: use it with --verify")
    if args.json is None:
        return
    path = Path(args.json)
    if path.suffix != ".json":
        raise DoctorError(f"--json {args.json!r}: use a path that ends in .json")
    if not path.parent.is_dir():
        raise DoctorError(f"--json {args.json!r}: the folder {str(path.parent)!r} does not exist")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise DoctorError(f"--json {args.json!r}: no file can be written there")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


def _progress(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
