"""Reports made by hand, for tests of what shows them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from contig_pass.report.model import Hunk, Listing, Place, Report, Row, Totals

BEFORE = Place((131, 1), 1, 1)
AFTER = Place((128, 1), 0, 64)


def row(**changes: Any) -> Row:
    """A fix of ``blocks.0.attn.q``; every field can be given."""
    fields: dict[str, Any] = {
        "kind": "fix",
        "reason": "not pointer aligned to 16 bytes",
        "rules": ("pointer aligned to 16 bytes",),
        "source": "measured",
        "op": "aten::_scaled_mm.default",
        "operand": "bias",
        "node": "_scaled_mm",
        "dtype": "bfloat16",
        "shape": (128,),
        "device": "cuda:0",
        "before": BEFORE,
        "after": AFTER,
        "order": "row",
        "copy": "contiguous_default",
        "nbytes": 512,
        "microseconds": 0.2,
        "fused": False,
        "write_back": False,
        "parameter": None,
        "once": False,
        "module": "blocks.0.attn.q",
        "file": "",
        "lineno": 0,
        "code": "",
    }
    return Row(**{**fields, **changes})


def skip(**changes: Any) -> Row:
    """A use that is left alone."""
    bare = dict.fromkeys(("after", "order", "copy", "nbytes", "microseconds"))
    return row(**{"kind": "skip", "reason": "no copy changes a size", **bare, **changes})


def layer(number: int, unchanged: int = 12, module: str = "attn.q") -> Hunk:
    """The lines of one layer: some unchanged nodes, a copy, its consumer, unchanged nodes."""
    def plain(at: int) -> tuple[str, str]:
        counter = number * 2 * unchanged + at
        memory = "bfloat16[64, 128][128, 1]@0 a64"
        return (" ", f"mul_{counter}: {memory} = aten.mul.Tensor(x_{counter}, 2)")

    view = "bfloat16[128][1]@2 a2"
    lines = [plain(at) for at in range(unchanged)]
    lines += [
        (" ", f"slice_{number}: {view} = aten.slice.Tensor(arg{number}_1, 0, 1, 129)"),
        (
            "+",
            f"contiguous_default_{number}: bfloat16[128][1]@0 a64 = "
            f"contig_pass.contiguous.default(slice_{number}, 'row')",
        ),
        ("-", f"_scaled_mm_{number}: bfloat16[64, 128][128, 1]@0 a64 = mm(x, slice_{number})"),
        (
            "+",
            f"_scaled_mm_{number}: bfloat16[64, 128][128, 1]@0 a64 = "
            f"mm(x, contiguous_default_{number})",
        ),
    ]
    lines += [plain(at) for at in range(unchanged, 2 * unchanged)]
    return Hunk(f"blocks.{number}.{module}", tuple(lines))


def report(
    rows: Sequence[Row] = (), parts: Sequence[Hunk] = (), hunks: Sequence[Hunk] = (),
    **changes: Any,
) -> Report:
    """A report of these rows, whose whole graph is ``parts``."""
    fixes = [one for one in rows if one.kind == "fix"]
    totals = Totals(
        nodes=sum(len(part.lines) for part in parts), uses=len(rows) + 10, clean=10,
        fixes=len(fixes), fixed_uses=len(fixes), skips=len(rows) - len(fixes), pins=3, checks=0,
        preparable=0, nbytes=sum(one.nbytes or 0 for one in fixes),
        microseconds=sum(one.microseconds or 0.0 for one in fixes),
    )
    fields: dict[str, Any] = {
        "graph": "model__0_inference_0", "policy": "dense", "targets": ("sm90",),
        "bandwidth": "sm90: 3.02 TB/s", "totals": totals, "rows": tuple(rows),
        "hunks": tuple(hunks),
        "listings": (Listing("model__0_inference_0", tuple(parts)),) if parts else (),
    }
    return Report(**{**fields, **changes})


def sample(tmp_path: Path) -> Report:
    """Three kinds of fixes and a skip over four layers, with a source file."""
    source = tmp_path / "model.py"
    source.write_text("".join(f"    step_{n}(x)\n" for n in range(1, 41)))
    line = {"file": str(source), "lineno": 20, "code": "step_20(x)"}
    rows = [
        *(row(module=f"blocks.{n}.attn.q", node=f"_scaled_mm_{n}", copy=f"contiguous_default_{n}",
              **line) for n in range(4)),
        row(module="head", op="aten::mm", operand="mat2", nbytes=9000, microseconds=10.0,
            rules=("dense",), reason="not dense", node="mm"),
        row(module="blocks.0.fc", operand="weight", nbytes=10000, microseconds=2.0, fused=True,
            node="fc_mm", copy="c2"),
        skip(module="head", op="aten::_int_mm", operand="self", rules=("a multiple of 16",)),
    ]
    return report(rows, [layer(n) for n in range(4)])
