"""``contig-pass diff TARGET``: trace a model without a GPU and show what would be done to it.

Exit codes: 0, done, and with ``--compare`` no violation is new; 1, new violations with
``--compare`` (a key that the earlier report has not, or more uses of one that it has), or any
violation with ``--check``; 2, bad input. The JSON of ``--json`` is described in
:mod:`contig_pass.report.json`; equal programs on equal versions give equal bytes.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from contig_pass.contracts.target import Target, parse_target
from contig_pass.differ.compare import compare, read_report, render, violations
from contig_pass.differ.targets import WanOptions, resolve
from contig_pass.differ.tracing import trace
from contig_pass.errors import OptionError, ReportError, TargetError
from contig_pass.inductor.faking import Faking
from contig_pass.plan import AUDIT, CONTRACT, DENSE
from contig_pass.report.model import Report
from contig_pass.report.write import check_sink, write_file

_EXIT_CODES = """\
exit codes:
  0  done; with --compare, no violation is new
  1  with --compare: a violation is new, or more uses break a rule than before;
     with --check: there is a violation at all
  2  bad input: no such target, a callable that returns something else, an
     unreadable or foreign report, a file that cannot be written

A violation is a rule that a use breaks or is not known to keep, whether a copy
repairs it or not. It is known by its module with block numbers as *, its op, its
operand and its rule. The JSON is described in contig_pass/report/json.py; the
same program on the same versions gives the same bytes.
"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register ``diff``; its ``run`` returns the exit code."""
    parser = subparsers.add_parser(
        "diff",
        help="what contig_safe would do to a whole model, traced without a GPU",
        description="Trace a model with fake tensors for a GPU that need not be there, and show "
        "which operands break a kernel's demands, which copies repair them, and at what price. "
        "Nothing is computed.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "program", metavar="TARGET",
        help="wan:NAME of the zoo, such as wan:t2v-14b, or module:callable, which is called "
        "without arguments, on torch's meta device, and returns (model, args, kwargs)",
    )
    parser.add_argument(
        "--target", default="sm90", metavar="DEVICE",
        help="whose demands count: sm90 (default), sm100, sm120, ..., or cpu",
    )
    parser.add_argument(
        "--policy", default=DENSE, choices=(DENSE, CONTRACT, AUDIT),
        help="as in the backend's options"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"),
        help="where the fake tensors are; by default where the callable puts them, and the CPU for "
        "wan:NAME and for meta tensors; cuda needs a CUDA build of torch, and no GPU",
    )
    parser.add_argument("--json", metavar="F", help="write the report as JSON")
    parser.add_argument("--html", metavar="F", help="write the report as HTML")
    parser.add_argument(
        "--compare", metavar="OLD.json",
        help="show what changed since a report that --json wrote; exit 1 if violations are new",
    )
    parser.add_argument("--check", action="store_true", help="exit 1 if there is any violation")
    wan = parser.add_argument_group("for wan:NAME")
    wan.add_argument("--quantization", metavar="RECIPE", help="of the linears; default: none")
    wan.add_argument("--attention", metavar="MODE", help="default: sdpa")
    wan.add_argument("--resolution", metavar="WxH", help="in pixels; default: 832x480")
    wan.add_argument("--frames", type=int, metavar="N", help="default: 81")
    wan.add_argument("--batch", type=int, metavar="N", help="default: 1")
    wan.add_argument("--size", choices=("full", "tiny"), help="default: full")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, say: Callable[[str], None] | None = None) -> int:
    """Carry out ``diff``; returns the exit code, 0 or 1.

    Args:
        args: as :func:`add_parser` declares them.
        say: prints; by default to standard output.

    Raises:
        ContigPassError: bad input, which the CLI tells in one line with exit code 2.
    """
    say = say or _say
    started = time.perf_counter()
    target = _target(args.target)
    for flag, path in (("json", args.json), ("html", args.html)):
        _check_path(flag, path)
    earlier = read_report(args.compare) if args.compare else None
    _check_device(args.device)
    options = WanOptions(
        args.quantization, args.attention, args.resolution, args.frames, args.batch, args.size
    )
    faking = Faking(args.device)
    program = resolve(args.program, target, options, faking)
    report = trace(program, target, args.policy, faking, listing=args.html is not None)
    say(str(report))
    for path in (args.json, args.html):
        if path:
            write_file(path, [untimed(report)])
    changes = compare(earlier, report) if earlier is not None else None
    if changes is not None:
        say(render(changes) + "\n")
    say(
        f"{report.totals.nodes} nodes traced for {target.name} in "
        f"{time.perf_counter() - started:.1f} s, peak memory {_peak_megabytes():.0f} MB"
    )
    worse = changes is not None and changes.worse
    return int(worse or (args.check and bool(violations(report))))


def untimed(report: Report) -> Report:
    """``report`` without the time that the pass took, so that equal programs give equal files."""
    return replace(report, seconds=0.0)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


def _target(text: str) -> Target:
    target = parse_target(text)
    if target is None:
        raise OptionError(f"--target {text!r}: use cpu, or a CUDA architecture such as sm90")
    return target


def _check_path(flag: str, path: str | None) -> None:
    """Fail before anything is traced if the file could not be written."""
    if path is None:
        return
    if not path.endswith(f".{flag}"):
        raise ReportError(f"--{flag} {path!r}: use a path that ends in .{flag}")
    check_sink(path)


def _check_device(device: str | None) -> None:
    if device == "cuda" and torch.version.cuda is None:
        raise TargetError(
            f"--device cuda: torch {torch.__version__} is built without CUDA and cannot slice "
            "fake CUDA tensors; use --device cpu, whose report is the same"
        )


def _peak_megabytes() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Kilobytes on Linux, bytes on macOS.
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)
