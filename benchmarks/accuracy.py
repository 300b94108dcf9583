"""``python -m benchmarks accuracy``: how far compiled, quantised classes are from fp32.

Attention classes and blocks, tiny and as in the 14B models, run under contig_safe in bf16, FP8 and
FP4 and are compared with the same weights, unquantised, and the same inputs in fp32 eager mode;
so is a self-attention in every attention mode that the machine has. Required: each row runs, is
finite, and has at least the cosine of :data:`LEAST_COSINE`. Of a block it is what the block adds
to its input that is compared: the input itself would hide the rest.

On a CPU ``torch._scaled_mm`` is computed as a float product of what it receives, since the CPU's
own takes minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from torch._inductor.utils import fresh_cache
from torch.utils._pytree import tree_leaves, tree_map

import contig_pass
from benchmarks.coverage.blocks import blocks, told_who_speaks, update
from benchmarks.coverage.cases import FP4, FP8, PLAIN, backend_options
from benchmarks.coverage.measure import AOT_EAGER, INDUCTOR, one_line
from benchmarks.coverage.sizes import SIZES, Draw
from benchmarks.coverage.variants import Variant, classes
from benchmarks.machine import write_json
from wan_models.attention.kernels import MODES, check_mode
from wan_models.quant import high_precision, quantize_
from wan_models.recorder import recording

#: By recipe. Each leaves about 1.4 times the error of the worst row on a CPU, tiny or with all
#: 7,800 tokens at the tiny width: 0.0077 in bf16, 0.090 in e4m3 (0.061 if only stored), 0.14 in
#: e5m2 (0.12), 0.25 in FP4. For each operand of a product rounding costs about 0.026 in e4m3, 0.05
#: in e5m2 and 0.095 in FP4; products in a row add up, and the softmax of scores with a spread of
#: 2.25 enlarges it. Recipes without a scale are left out: their error hangs on how small the
#: weights are.
LEAST_COSINE = {
    PLAIN: 0.9999,
    "fp8_e4m3fn_scaled": 0.996,
    FP8: 0.992,
    "fp8_e5m2_scaled": 0.985,
    "fp8_e5m2_scaled_fast": 0.980,
    "fp4_scaled": 0.940,
    FP4: 0.940,
}
#: Of a bf16 block: it rounds the sum with its input, at the input's size. Worst row 0.017.
LEAST_COSINE_OF_SUM = 0.9997
#: By attention mode; the others compute in 16 bits. ``fp8`` on a CPU: 0.058. On an H100 the kernels
#: of ``sageattn`` and ``fp8`` alone have errors of 0.039 and 0.055 on normal inputs. The whole
#: layer at the full size has a cosine of 0.9966 there by ``fp8``, and of 0.9965 by
#: ``flash_attn_3_fp8``, which has one scale for all tokens of a head.
LEAST_COSINE_OF_MODE = dict.fromkeys(("fp8", "auto_fp8", "sageattn"), 0.9965) | {
    "flash_attn_3_fp8": 0.996
} | dict.fromkeys(("sageattn_3", "sageattn_3_fp4", "sageattn_3_fp8"), 0.93)
#: Variants that are tried; the others of a class run the same linears and kernels.
CLASSES = {
    "WanSelfAttention": (
        "forward", "forward_ip, first step", "forward_radial", "forward_multitalk",
        "forward_split",
    ),
    "WanCrossAttention": ("text", "all branches"),
    "WanI2VCrossAttention": ("image separate", "image, all branches"),
    "MTVCrafterMotionAttention": ("forward",),
    "WanHuMoCrossAttention": ("forward",),
    "SingleStreamAttention": ("last frame cut",),
    "SingleStreamMultiAttention": ("two speakers",),
}
BLOCKS = (
    "text", "text and image", "text and image, fantasytalking", "text and image, fantasyportrait",
    "text and image, multitalk, maps given", "text and image, mtvcrafter", "text, humo",
    "text, ovi", "first",
)
#: What compiles a row by default: at the full size what is used, at the tiny one what is quick.
INNER = {"full": INDUCTOR, "tiny": AOT_EAGER}
LINEARS, ATTENTION = "linears", "attention"
#: Seconds by default: on an H100 all rows of both sizes take more than 240.
BUDGET = {"cuda": 480.0, "cpu": 240.0}


@dataclass
class Row:
    """One variant in one setting.

    Attributes:
        size: ``"tiny"`` or ``"full"``.
        owner, variant: class and variant.
        what: ``"linears"`` or ``"attention"``: what the setting is of.
        setting: a recipe or ``"bf16"``, or an attention mode.
        inner: what runs the repaired graph.
        error: relative L2 error to fp32; of several results the largest.
        cosine: likewise, the smallest.
        least: the cosine that is required.
        uses, fixes: of the report.
        seconds: compiling included.
        unavailable: why this machine does not have the mode; such a row is not required.
        failure: what went wrong, in one line.
    """

    size: str
    owner: str
    variant: str
    what: str
    setting: str
    inner: str
    error: float | None = None
    cosine: float | None = None
    least: float = 0.0
    uses: int = 0
    fixes: int = 0
    seconds: float = 0.0
    unavailable: str = ""
    failure: str = ""

    @property
    def name(self) -> str:
        """All that tells the row from others."""
        return f"{self.size} {self.owner}: {self.variant}, {self.what} {self.setting}"

    @property
    def ok(self) -> bool:
        """Whether it ran and is near enough."""
        return not self.failure and self.cosine is not None and self.cosine >= self.least

    @property
    def verdict(self) -> str:
        """One word, or what went wrong."""
        if self.unavailable:
            return f"not on this machine: {self.unavailable}"
        if self.failure or self.cosine is None:
            return self.failure
        return f"{'ok' if self.ok else 'MISSED'}, error {self.error:.4f}, cosine {self.cosine:.6f}"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser("accuracy", help="compiled and quantised against fp32")
    default = "cuda" if torch.cuda.device_count() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=None,
                        help="default: both on a GPU, tiny on a CPU")
    parser.add_argument("--recipes", nargs="+", choices=list(LEAST_COSINE),
                        default=[PLAIN, FP8, FP4])
    parser.add_argument("--only", metavar="TEXT", help="only rows whose name contains this")
    parser.add_argument("--inner", choices=(INDUCTOR, AOT_EAGER),
                        help="default: inductor at the full size, aot_eager at the tiny one")
    parser.add_argument("--budget", type=float,
                        help="seconds after which no row is begun; what is left then fails "
                        f"(default: {BUDGET['cuda']:.0f} on a GPU, {BUDGET['cpu']:.0f} on a CPU)")
    parser.add_argument("--json", metavar="FILE", help="write every row there")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the table; 1 if a required row fails."""
    started = time.perf_counter()
    budget = BUDGET[args.device] if args.budget is None else args.budget
    sizes = args.sizes or (["full", "tiny"] if args.device == "cuda" else ["tiny"])
    tasks = list(planned(sizes, args.recipes, args.inner, args.only))
    if not tasks:
        print(f"accuracy: no row's name contains {args.only!r}")
        return 1
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as cache, fresh_cache(dir=cache):
        for variant, group in tasks:
            late = time.perf_counter() - started > budget
            for row in measured(variant, group, args.device, late=late):
                rows.append(row)
                passed = f"[{time.perf_counter() - started:.0f} s]"
                print(passed, f"{row.name}: {row.verdict}", file=sys.stderr, flush=True)
    print(table(rows))
    required = [row for row in rows if not row.unavailable]
    failed = [row for row in required if not row.ok]
    for row in failed:
        print(f"FAILED {row.name}: {row.failure or f'cosine below {row.least}'}")
    summary = (
        f"accuracy on {args.device}: {len(required) - len(failed)} of {len(required)} rows ok, "
        f"{len(rows) - len(required)} modes not on this machine, "
        f"{time.perf_counter() - started:.0f} s"
    )
    if args.json:
        listed = [asdict(row) | {"ok": row.ok or bool(row.unavailable)} for row in rows]
        write_json(args.json, "accuracy", {"summary": summary, "rows": listed})
    print(summary)
    return 1 if failed else 0


# -- what is tried -------------------------------------------------------------------------------


def planned(
    sizes: Sequence[str], recipes: Sequence[str], inner: str | None, only: str | None
) -> Iterator[tuple[Variant, list[Row]]]:
    """Each variant with its rows, the full size first: blocks, attention modes, classes."""
    made = {(v.owner, v.name): v for v in (*classes(), *blocks(), told_who_speaks())}
    chosen_blocks = [v for v in made.values() if "Block" in v.owner and v.name in BLOCKS]
    chosen_classes = [made[owner, name] for owner, names in CLASSES.items() for name in names]
    for size in sorted(sizes, key=list(SIZES).index, reverse=True):
        tried = [(variant, LINEARS, recipes) for variant in chosen_blocks]
        dense = [mode for mode in MODES if mode != "radial"]
        tried.append((made["WanSelfAttention", "forward"], ATTENTION, dense))
        tried.append((made["WanSelfAttention", "forward_radial"], ATTENTION, ["radial"]))
        if size == "tiny":  # at the full size they run within the blocks
            tried += [(variant, LINEARS, recipes) for variant in chosen_classes]
        for variant, what, settings in tried:
            rows = [
                Row(size, variant.owner, variant.name, what, setting, inner or INNER[size])
                for setting in settings
            ]
            rows = [row for row in rows if only is None or only in row.name]
            if rows:
                yield variant, rows


# -- one variant ---------------------------------------------------------------------------------


def measured(
    variant: Variant, rows: Sequence[Row], device: str, *, late: bool = False
) -> Iterator[Row]:
    """``rows`` filled in, one after the other; an exception becomes the failure of its row.

    Args:
        variant: of all the rows.
        rows: of one size.
        device: where all of it runs.
        late: run nothing, and say so.
    """
    if late:
        yield from (replace(row, failure="not run: the budget is spent") for row in rows)
        return
    size = SIZES[rows[0].size]
    try:
        module = variant.module(size, device)
        inputs = variant.inputs(Draw(size, 1, 0, device))
        expected = in_fp32(variant, module, inputs)
    except Exception as error:
        yield from (replace(row, failure=f"reference: {one_line(error)}") for row in rows)
        return
    for row in rows:
        started = time.perf_counter()
        try:
            _fill(row, variant, module, inputs, expected)
        except Exception as error:  # the table goes on
            row.failure = one_line(error)
        row.seconds = round(time.perf_counter() - started, 2)
        yield row


def in_fp32(
    variant: Variant, module: nn.Module, inputs: tuple[Any, ...]
) -> list[torch.Tensor]:
    """The results in eager mode, with weights and inputs widened from bf16."""
    wide = copy.deepcopy(module).float()

    def widened(value: Any) -> Any:
        narrow = isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16
        return value.float() if narrow else value

    return _results(variant, variant.call(wide), tree_map(widened, inputs))


def _fill(
    row: Row,
    variant: Variant,
    module: nn.Module,
    inputs: tuple[Any, ...],
    expected: list[torch.Tensor],
) -> None:
    device = expected[0].device
    module = copy.deepcopy(module)
    if row.what == ATTENTION:
        row.least = LEAST_COSINE_OF_MODE.get(row.setting, LEAST_COSINE[PLAIN])
        try:
            head_dim = SIZES[row.size].head_dim
            check_mode(row.setting, device, dtype=torch.bfloat16, head_dim=head_dim)
        except ValueError as reason:
            row.unavailable = str(reason)
            return
        if row.setting != "radial":  # which is a method of its own
            module.mode = row.setting
    else:
        row.least = LEAST_COSINE[row.setting]
        if row.setting == PLAIN and variant.residual:
            row.least = LEAST_COSINE_OF_SUM
        if row.setting != PLAIN:
            quantize_(module, row.setting, high_precision(module))
    reports: list[contig_pass.Report] = []
    with _compiling(device):
        compiled = torch.compile(
            variant.call(module), **backend_options(row.inner, reports.append)
        )
        got = _results(variant, compiled, inputs)
    if device.type == "cuda":
        torch.cuda.synchronize()
    row.uses = sum(report.totals.uses for report in reports)
    row.fixes = sum(report.totals.fixes for report in reports)
    if [x.shape for x in got] != [x.shape for x in expected]:
        raise ValueError("the results have other shapes than in fp32")
    if not all(bool(x.isfinite().all()) for x in got):
        raise ValueError("the results are not finite")
    pairs = [(x.double(), y.double()) for x, y in zip(got, expected, strict=True)]
    row.error = max(((x - y).norm() / y.norm()).item() for x, y in pairs)
    row.cosine = min((x.flatten() @ y.flatten() / (x.norm() * y.norm())).item() for x, y in pairs)


def _results(
    variant: Variant, function: Callable[..., Any], inputs: tuple[Any, ...]
) -> list[torch.Tensor]:
    with torch.no_grad():
        out = update(variant, inputs, function(*inputs))
    return [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]


@contextlib.contextmanager
def _compiling(device: torch.device) -> Iterator[None]:
    torch._dynamo.reset()
    emulated = recording() if device.type == "cpu" else contextlib.nullcontext()
    with warnings.catch_warnings(), emulated:
        warnings.filterwarnings("ignore", message=r"(?s).*Overriding a previously registered")
        yield


# -- output --------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    """At most about 120 characters wide."""
    lines: list[tuple[object, ...]] = []
    group = None
    for row in rows:
        if (row.size, row.owner) != group:
            group = (row.size, row.owner)
            lines.append((f"-- {row.owner}, {row.size}", *("" for _ in range(7))))
        figures = ("", "") if row.error is None else (f"{row.error:.4f}", f"{row.cosine:.6f}")
        least = "" if row.unavailable else f"{row.least:g}"
        setting = row.setting if row.what == LINEARS else f"mode {row.setting}"
        verdict = "ok" if row.ok else "not here" if row.unavailable else "MISSED"
        lines.append((row.variant, setting, *figures, least, row.uses, row.fixes, verdict))
    headers = (
        "variant", "linears, or attention mode", "error", "cosine", "least", "uses", "fixes", ""
    )
    reasons = [f"{row.setting}: {row.unavailable}" for row in rows if row.unavailable]
    reasons = [f"not here: {reason}" for reason in dict.fromkeys(reasons)]
    return "\n".join([tabulate(lines, headers, disable_numparse=True), *reasons, ""])
