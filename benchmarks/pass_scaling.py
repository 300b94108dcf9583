"""``python -m benchmarks pass-scaling``: what the layout pass costs as graphs grow.

Graphs of 1,000 to 100,000 nodes are made of equal layers: elementwise ops, views and one
``_scaled_mm`` with a misaligned bias, padded rows in the activation and a clean weight. Each is
analysed, planned, rewritten and reported. Required: at most 1 s for 10,000 nodes, and time per
node that does not grow; and on the tiny Wan block at most 3% of the time that compiling takes.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from tabulate import tabulate
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

import contig_pass
from benchmarks.machine import write_json
from benchmarks.wan import tiny_block
from contig_pass.options import Options
from contig_pass.pipeline import repair

SIZES = (1_000, 3_000, 10_000, 30_000, 100_000)
SECONDS_PER_10K = 1.0
#: Time per node at the largest size over that at the smallest.
GROWTH = 1.5
COMPILE_SHARE = 0.03
#: Elementwise nodes a layer besides those around the product: the Wan block has 10 products among
#: about 300 nodes.
ELEMENTWISE = 20

_aten = torch.ops.aten


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser("pass-scaling", help="time of the layout pass on large graphs")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each size (median)")
    parser.add_argument("--no-compile", action="store_true", help="leave out the Wan block")
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    parser.set_defaults(run=run)


def layered_graph(nodes: int) -> tuple[fx.GraphModule, frozenset[str]]:
    """A graph of about ``nodes`` nodes with a planted fault in every layer, and its inputs."""
    fp8 = torch.float8_e4m3fn
    mode = FakeTensorMode()
    graph = fx.Graph()
    values: dict[str, torch.Tensor] = {}

    def given(name: str, value: torch.Tensor) -> fx.Node:
        node = graph.placeholder(name)
        node.meta["val"] = value
        return node

    def call(key: str, op: torch._ops.OpOverload, *args: object, **kwargs: object) -> fx.Node:
        node = graph.call_function(op, args, kwargs)
        if key not in values:  # layers are equal, so one layer's fake tensors serve all
            fake_args = fx.node.map_arg(args, lambda a: a.meta["val"])
            values[key] = op(*fake_args, **kwargs)
        node.meta["val"] = values[key]
        return node

    with mode:
        x = given("x", torch.empty(64, 128, dtype=torch.bfloat16))
        weight = given("weight", torch.empty(128, 128, dtype=fp8))
        biases = given("biases", torch.empty(400, dtype=torch.bfloat16))
        scale = given("scale", torch.empty(()))
        while len(graph.nodes) < nodes:
            shifted = call("add", _aten.add.Scalar, x, 1)
            padded = call("pad", _aten.constant_pad_nd.default, shifted, [0, 3])
            narrow = call("convert", torch.ops.prims.convert_element_type.default, padded, fp8)
            rows = call("slice", _aten.slice.Tensor, narrow, 1, 1, 129)
            turned = call("t", _aten.permute.default, weight, [1, 0])
            bias = call("bias", _aten.slice.Tensor, biases, 0, 1, 129)
            out = call(
                "mm", _aten._scaled_mm.default,
                rows, turned, scale, scale, bias, None, torch.bfloat16,
            )
            act = call("gelu", _aten.gelu.default, out)
            for step in range(ELEMENTWISE):
                act = call(f"mul{step}", _aten.mul.Tensor, act, shifted)
            x = call("residual", _aten.add.Tensor, act, x)
        graph.output((x,))
    inputs = frozenset(n.name for n in graph.nodes if n.op == "placeholder")
    return fx.GraphModule(torch.nn.Module(), graph), inputs


def time_pass(nodes: int, repeats: int) -> tuple[int, int, float]:
    """Nodes, fixes and median seconds of the pass on a graph of about ``nodes`` nodes."""
    seconds = []
    for _ in range(repeats):
        module, inputs = layered_graph(nodes)
        size = len(module.graph.nodes)
        started = time.perf_counter()
        report = repair(module.graph, Options(), inputs, name="layers", pinning=True)
        seconds.append(time.perf_counter() - started)
    return size, report.totals.fixes, statistics.median(seconds)


def wan_share() -> tuple[float, float]:
    """Seconds of the pass and of the whole cold compile on the tiny quantised Wan block."""
    torch._dynamo.reset()
    contig_pass.forget_reports()
    block, inputs = tiny_block()
    with torch._inductor.config.patch(force_disable_caches=True), torch.no_grad():
        compiled = torch.compile(block, backend=contig_pass.contig_safe)
        started = time.perf_counter()
        compiled(*inputs)
        total = time.perf_counter() - started
    return sum(report.seconds for report in contig_pass.last_reports()), total


def run(args: argparse.Namespace) -> int:
    """Print the tables; 1 if a requirement is missed."""
    time_pass(SIZES[0], 1)  # import and warm up
    rows, per_node, passed = [], [], True
    for nodes in SIZES:
        size, fixes, seconds = time_pass(nodes, args.repeats)
        per_10k = seconds / size * 10_000
        per_node.append(per_10k)
        ok = per_10k <= SECONDS_PER_10K
        passed &= ok
        rows.append((size, fixes, seconds, per_10k, "ok" if ok else "MISSED"))
    headers = ("nodes", "fixes", "seconds", "s per 10,000 nodes", f"<= {SECONDS_PER_10K} s")
    print(tabulate(rows, headers, floatfmt=".3f"))
    growth = per_node[-1] / per_node[0]
    passed &= growth <= GROWTH
    summary = f"pass-scaling: time per node grows {growth:.2f}x to {SIZES[-1]} nodes"
    content: dict[str, object] = {
        "columns": ["nodes", "fixes", "seconds", "seconds per 10,000 nodes", "verdict"],
        "rows": rows,
        "growth": growth,
    }
    if not args.no_compile:
        spent, total = wan_share()
        content["wan block"] = {"pass seconds": spent, "compile seconds": total}
        passed &= spent <= COMPILE_SHARE * total
        summary += f"; Wan block: pass {spent:.3f} s of {total:.1f} s ({spent / total:.2%})"
    if args.json:
        write_json(args.json, "pass-scaling", content)
    print(f"{summary}: {'ok' if passed else 'MISSED'}")
    return 0 if passed else 1
