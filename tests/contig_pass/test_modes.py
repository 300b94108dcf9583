"""Ways to compile: modes, freezing, blocks by themselves, threads and processes."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import contig_pass
from tests import kernels


class Layer(torch.nn.Module):
    """A misaligned weight, one in the wrong order, and a misaligned view of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.randn(513)[1:].view(16, 32), requires_grad=False)
        self.v = torch.nn.Parameter(torch.randn(32, 16), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return kernels.rows(self.w) + kernels.columns(self.v).t() + kernels.rows(x[:, 1:])


@pytest.fixture(autouse=True)
def contracts() -> Iterator[None]:
    with kernels.contracts(), torch.no_grad():
        kernels.received.clear()
        yield


def _check(compiled: object, layer: torch.nn.Module) -> None:
    for offset in (0, 1, 3):
        x = torch.randn(16 * 33 + 4)[offset : offset + 16 * 33].view(16, 33)
        expected = layer(x)
        kernels.received.clear()
        assert torch.equal(compiled(x), expected)
        assert kernels.bad() == []


@pytest.mark.parametrize(
    "mode", ["max-autotune-no-cudagraphs", "reduce-overhead", "max-autotune", "default"]
)
def test_modes(mode: str) -> None:
    layer = Layer()
    _check(torch.compile(layer, backend="contig_safe", mode=mode), layer)


def test_freezing_folds_the_relayout_of_a_parameter() -> None:
    class Frozen(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.randn(513)[1:].view(16, 32), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return kernels.several([self.w, x])

    layer, x = Frozen(), torch.randn(16, 33)
    expected = layer(x)
    with torch._inductor.config.patch(freezing=True):
        compiled = torch.compile(layer, backend="contig_safe")
        seen = []
        for _ in range(2):
            kernels.received.clear()
            assert torch.equal(compiled(x), expected)
            assert kernels.bad() == []
            seen.append(kernels.received[0].address)
    assert seen[0] == seen[1]  # a constant, not a copy a call
    (row,) = contig_pass.last_reports()[-1].fixes
    assert row.once


def test_the_report_says_what_prepare_would_save() -> None:
    torch.compile(Layer(), backend="contig_safe")(torch.randn(16, 33))
    report = contig_pass.last_reports()[-1]
    named = {row.parameter for row in report.fixes if row.parameter}
    assert named <= {"w", "v"}
    assert "v" in named
    assert report.totals.preparable >= 2 * 16 * 32 * 4
    assert "contig_pass.prepare(model, ...) copies them once" in " ".join(str(report).split())


def test_blocks_compiled_one_by_one_and_as_regions() -> None:
    blocks = torch.nn.ModuleList(Layer() for _ in range(3))
    for block in blocks:
        block.compile(backend="contig_safe")
    for block in blocks:
        x = torch.randn(16, 33)
        kernels.received.clear()
        out = block(x)
        assert kernels.bad() == []
        assert torch.equal(out, block.forward(x))


def test_threads_do_not_disturb_one_another() -> None:
    layers = [Layer() for _ in range(6)]
    x = torch.randn(16, 33)
    expected = [layer(x) for layer in layers]
    results: dict[int, object] = {}

    def work(number: int) -> None:
        backend = "contig_safe" if number % 2 else "inductor"
        try:
            with torch.no_grad():
                results[number] = torch.compile(layers[number], backend=backend)(x)
        except Exception as error:
            results[number] = error

    kernels.received.clear()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(layers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, want in enumerate(expected):
        assert torch.equal(results[number], want)
    # Three operands of each of the three layers that plain Inductor compiled are as they were.
    assert len(kernels.bad()) == 9


_CHILDREN = """
import multiprocessing, sys, torch, contig_pass
from tests import kernels

def work(queue):
    with kernels.contracts(), torch.no_grad():
        kernels.received.clear()
        function = torch.compile(lambda b: kernels.rows(b[1:513].view(32, 16)),
                                 backend="contig_safe")
        b = torch.arange(600.0)
        right = torch.equal(function(b), b[1:513].view(32, 16) * 2)
        queue.put(right and not kernels.bad())

if __name__ == "__main__":
    start = sys.argv[1]
    context = multiprocessing.get_context(start)
    queue = context.Queue()
    if start == "fork":
        work(queue)
        assert queue.get()
    children = [context.Process(target=work, args=(queue,)) for _ in range(2)]
    for child in children: child.start()
    print(all(queue.get(timeout=200) for _ in children))
    for child in children: child.join()
"""


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_processes(tmp_path: Path, start: str) -> None:
    root = Path(__file__).parents[2]
    script = tmp_path / "children.py"
    script.write_text(_CHILDREN)
    done = subprocess.run(
        [sys.executable, str(script), start], capture_output=True, text=True, check=False,
        cwd=root, env={**__import__("os").environ, "PYTHONPATH": str(root)}, timeout=400,
    )
    assert done.stdout.strip() == "True", done.stderr[-2000:]
