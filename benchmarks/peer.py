"""``python -m benchmarks peer``: clean models under contig_safe are what plain Inductor makes.

Each backend compiles each model in a process of its own on an empty cache, then once more after
``torch._dynamo.reset()``; plain Inductor's process does not import contig_pass, but for the Wan
block, which it compiles last, because wan_models does. Required, model by model: the same kernels,
the same calls around them, values equal bit by bit, as many graphs, and as many cache hits the
second time, at least one. Comments, paths, hashes, the words in kernels' names
(which list the graph's nodes) and Inductor's own checks that a GPU's inputs are aligned are left
out of the comparison.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from benchmarks.machine import write_json

BACKENDS = ("inductor", "contig_safe")
#: What both backends must agree on, in the order of the table.
COMPARED = ("kernels", "calls", "values", "graphs", "fx hits", "aot hits", "misses")
_SHOWN_LINES = 40

Call = Callable[..., Any]
#: What is compiled, and what is done with the outcome: the tensors to compare come of it.
Workload = tuple[Call, Callable[[Call], list[torch.Tensor]]]


def mlp() -> Workload:
    """Two bf16 linears and a GELU."""
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).bfloat16()
    x = torch.randn(32, 64, dtype=torch.bfloat16)
    return model, lambda compiled: [compiled(x)]


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(64), nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(self.norm(x)).view(batch, tokens, 3, 4, dim // 4).unbind(2)
        heads = (part.transpose(1, 2) for part in (q, k, v))
        out = nn.functional.scaled_dot_product_attention(*heads)
        return x + self.out(out.transpose(1, 2).reshape(batch, tokens, dim))


def sdpa() -> Workload:
    """A bf16 attention block with a fused qkv projection."""
    model, x = _Attention().bfloat16(), torch.randn(2, 32, 64, dtype=torch.bfloat16)
    return model, lambda compiled: [compiled(x)]


def convolutions() -> Workload:
    """Two convolutions, a batch norm and a classifier."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10),
    ).eval()
    x = torch.randn(2, 3, 16, 16)
    return model, lambda compiled: [compiled(x)]


def wan_block() -> Workload:
    """The tiny Wan block with FP8 linears."""
    from benchmarks.wan import tiny_block

    block, inputs = tiny_block("cuda" if torch.cuda.is_available() else "cpu")
    return block, lambda compiled: [compiled(*inputs)]


def training() -> Workload:
    """Forward and backward of a small model, its gradients compared.

    All numbers are small integers, so that every sum is exact in any order: on a GPU the gradients
    of plain Inductor differ in their last bits from one process to the next.
    """
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-1, 2, parameter.shape))
    x = torch.randint(-2, 3, (16, 64)).float()
    target = torch.randint(-9, 10, (16, 8)).float()

    def step(compiled: Call) -> list[torch.Tensor]:
        model.zero_grad()
        with torch.enable_grad():
            loss = nn.functional.mse_loss(compiled(x), target)
            loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters())]

    return model, step


def dynamic() -> Workload:
    """Three batch sizes: the second makes the graph dynamic, and the third needs no new one."""
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    inputs = [torch.randn(batch, 32) for batch in (4, 9, 17)]
    return model, lambda compiled: [compiled(x) for x in inputs]


class _Running(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.total.add_(x.sum(0))
        return x * self.total


def mutated_buffer() -> Workload:
    """A buffer that every call adds to; small integers, as in :func:`training`."""
    model, x = _Running(), torch.randint(-2, 3, (8, 32)).float()

    def calls(compiled: Call) -> list[torch.Tensor]:
        model.total.zero_()
        return [compiled(x), compiled(x), model.total.clone()]

    return model, calls


#: Compiled last: wan_models states contracts for its attention, and so imports contig_pass.
WAN_BLOCK = "Wan block, FP8"
MODELS: dict[str, Callable[[], Workload]] = {
    "bf16 MLP": mlp, "SDPA block": sdpa, "conv net": convolutions, WAN_BLOCK: wan_block,
    "training step": training, "dynamic shapes": dynamic, "mutated buffer": mutated_buffer,
}


# -- one backend, in its own process -------------------------------------------------------------


def normalised(code: str) -> str:
    """``code`` up to its self-test, without what the module's docstring lists."""
    code = re.split(r"\ndef (?:get_args|benchmark_compiled_module)\(", code)[0]
    code = re.sub(r"\bc[a-z2-7]{51}\b|\b[0-9a-f]{32,64}\b", "HASH", code)
    code = re.sub(r"(?<=[\"'])/[^\"'\s]+/", "PATH/", code)
    code = re.sub(r"\b(cpp|triton_[a-z]+)_fused_\w*?(_\d+)\b", r"\1_fused\2", code)
    # C++ directives begin like comments of Python, but without a blank.
    kept = (line for line in code.splitlines() if not re.match(r"\s*(#( |$)|//)", line))
    return "\n".join(line for line in kept if line.strip() and "copy_if_misaligned(" not in line)


def split(code: str) -> tuple[str, str]:
    """The kernels' source, and the body that calls them."""
    kernels, mark, body = code.partition("def call(")
    return kernels, mark + body


def observe(backend: str, name: str) -> dict[str, Any]:
    """Compile and run one model from an empty cache, then once more; what was seen."""
    from torch._dynamo.utils import counters
    from torch._inductor.utils import run_and_get_code

    compiler = backend
    if backend != "inductor":
        compiler = importlib.import_module("contig_pass").contig_safe
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        function, work = MODELS[name]()
    compiled = torch.compile(function, backend=compiler)
    with _empty_cache(), torch.no_grad():
        # The first graph of a process is kept under another key than later ones (torch 2.11, CUDA).
        torch.compile(lambda x: x + 1, backend=compiler)(torch.ones(2))
        counters.clear()
        tensors, codes = run_and_get_code(work, compiled)
        graphs = counters["stats"]["unique_graphs"]
        torch._dynamo.reset()
        counters.clear()
        work(compiled)
        fx, aot = counters["inductor"], counters["aot_autograd"]
        parts = [split(normalised(code)) for code in codes]
        return {
            "kernels": "\n".join(kernels for kernels, _ in parts),
            "calls": "\n".join(calls for _, calls in parts),
            "values": [_digest(tensor) for tensor in tensors],
            "graphs": graphs,
            "fx hits": fx["fxgraph_cache_hit"],
            "aot hits": aot["autograd_cache_hit"],
            "misses": fx["fxgraph_cache_miss"] + aot["autograd_cache_miss"],
        }


@contextmanager
def _empty_cache() -> Iterator[None]:
    from torch._inductor.utils import fresh_cache

    settings = {
        "force_disable_caches": False, "cpp_cache_precompile_headers": False,
        # Otherwise the shape of a reduction may be chosen by timing it.
        "deterministic": torch.cuda.is_available(),
    }
    with (
        tempfile.TemporaryDirectory() as cache, fresh_cache(dir=cache),
        torch._inductor.config.patch(settings),
    ):
        yield


def _digest(tensor: torch.Tensor) -> str:
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{tuple(tensor.shape)} {tensor.dtype} {hashlib.sha256(content).hexdigest()}"


def main(backend: str, names: list[str]) -> None:
    """Observe the named models, and print what was seen as the last line."""
    seen = {}
    for name in sorted(names, key=lambda name: name == WAN_BLOCK):
        if backend == "inductor" and name != WAN_BLOCK and "contig_pass" in sys.modules:
            raise AssertionError("plain Inductor ran beside contig_pass")
        seen[name] = observe(backend, name)
    print(json.dumps(seen))


# -- both backends side by side ------------------------------------------------------------------


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser("peer", help="clean models beside plain Inductor")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    parser.set_defaults(run=run)


def observe_all(names: list[str], jobs: int) -> dict[str, dict[str, dict[str, Any]]]:
    """What each backend's process saw of each model."""
    root = Path(__file__).parents[1]
    path = os.pathsep.join(p for p in (str(root), os.environ.get("PYTHONPATH")) if p)

    def one(backend: str) -> dict[str, dict[str, Any]]:
        printed = subprocess.run(
            [sys.executable, "-m", "benchmarks.peer", backend, *names],
            cwd=root, env={**os.environ, "PYTHONPATH": path}, check=True, stdout=subprocess.PIPE,
            text=True,
        ).stdout
        return json.loads(printed.splitlines()[-1])

    with ThreadPoolExecutor(jobs) as pool:
        return dict(zip(BACKENDS, pool.map(one, BACKENDS), strict=True))


def differing(plain: dict[str, Any], safe: dict[str, Any]) -> list[str]:
    """What the two backends disagree on, or what shows nothing."""
    unequal = [what for what in COMPARED if plain[what] != safe[what]]
    if not plain["fx hits"] + plain["aot hits"]:
        unequal.append("hits")
    return unequal


def _cell(what: str, plain: dict[str, Any], safe: dict[str, Any]) -> str:
    if isinstance(plain[what], int):
        return f"{plain[what]} / {safe[what]}"
    return "equal" if plain[what] == safe[what] else "DIFFERENT"


def run(args: argparse.Namespace) -> int:
    """Print the table; 1 if anything differs."""
    seen = observe_all(args.models, args.jobs)
    rows, differences = [], 0
    for name in args.models:
        plain, safe = (seen[backend][name] for backend in BACKENDS)
        unequal = differing(plain, safe)
        differences += bool(unequal)
        cells = [_cell(what, plain, safe) for what in COMPARED]
        rows.append((name, *cells, "MISSED" if unequal else "ok"))
        for what in set(unequal) & {"kernels", "calls"}:
            lines = difflib.unified_diff(
                plain[what].splitlines(), safe[what].splitlines(), *BACKENDS, lineterm="", n=1
            )
            print(f"{name}, {what}:", *list(lines)[:_SHOWN_LINES], sep="\n")
    headers = ("model (inductor / contig_safe)", *COMPARED, "same")
    print(tabulate(rows, headers))
    if args.json:
        write_json(args.json, "peer", {"columns": ["model", *COMPARED, "verdict"], "rows": rows})
    print(
        f"peer: {len(rows) - differences} of {len(rows)} models the same as under plain Inductor: "
        f"{'MISSED' if differences else 'ok'}"
    )
    return 1 if differences else 0


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
