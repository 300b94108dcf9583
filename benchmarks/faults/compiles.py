"""Ways of compiling: out of a cache, by export, with weights frozen, in other modes, in threads."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.faults.program import (
    CONTIG_SAFE,
    EAGER,
    INDUCTOR,
    Case,
    Program,
    compiled,
    integers,
    window,
    windows,
)

ops = torch.ops.faults
_Function = Callable[..., Any]


def programs() -> Iterator[Program]:
    """Every program of this file."""
    for group, builders in _GROUPS.items():
        for name, build in builders.items():
            yield Program(name, group, build)


def _sliced(x: torch.Tensor) -> torch.Tensor:
    return ops.rows(x) + ops.rows((x * 2).view(-1)[1:1025].view(16, 64)).sum()


class _Layer(torch.nn.Module):
    """A product with a weight stored (K, N), row-major, and a bias."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.bias = torch.nn.Parameter(bias, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.matmul(x, self.weight, self.bias) + ops.rows(x).sum()


def _layer(device: str, offset: int) -> _Layer:
    weight = window(integers(device, 64 * 48 + 16), offset, 64, 48)
    return _Layer(weight, window(integers(device, 64), offset, 48))


# -- caches --------------------------------------------------------------------------------------


def _anew(function: _Function, mode: str, first: Sequence[tuple[str, dict]] = ()) -> _Function:
    """Every call compiles from scratch, as a new process would: only the caches remain.

    ``first`` are modes that compile and run the same program before, on copies of the arguments.
    """

    def run(*args: torch.Tensor) -> Any:
        for other, more in first:
            torch._dynamo.reset()
            compiled(function, other, **more)(*_again(args))
        torch._dynamo.reset()
        return compiled(function, mode)(*args)

    return function if mode == EAGER else run


def _again(args: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copies with the same offsets and strides."""
    copies = []
    for arg in args:
        flat = torch.empty(
            arg.untyped_storage().nbytes() // arg.element_size(),
            dtype=arg.dtype, device=arg.device,
        )
        copies.append(flat.as_strided(arg.shape, arg.stride(), arg.storage_offset()).copy_(arg))
    return copies


def _hit(function: _Function, mode: str) -> _Function:
    """As :func:`_anew`; the second call and later ones must come out of a cache."""
    run, calls = _anew(function, mode), 0

    def checked(*args: torch.Tensor) -> Any:
        nonlocal calls
        before = _hits()
        out = run(*args)
        calls += 1
        if mode in (INDUCTOR, CONTIG_SAFE) and calls > 1 and _hits() == before:
            raise RuntimeError(f"call {calls} was compiled, not taken out of the cache")
        return out

    return checked


def _hits() -> int:
    from torch._dynamo.utils import counters

    return (
        counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
    )


def _cached(
    prepare: Callable[[_Function, str], _Function], *offsets: int, function: _Function = _sliced
) -> Callable[[str], Case]:
    def build(device: str) -> Case:
        calls = [(matrix,) for matrix in windows(device, *offsets)]
        return Case(function, calls, prepare=prepare, caches=True)

    return build


def _after(*first: tuple[str, dict]) -> Callable[[_Function, str], _Function]:
    return lambda function, mode: _anew(function, mode, first)


def _other_first(function: _Function, mode: str) -> _Function:
    """Plain Inductor before contig_safe, and the other way round."""
    return _anew(function, mode, [(CONTIG_SAFE if mode == INDUCTOR else INDUCTOR, {})])


def _contract_later(function: _Function, mode: str) -> _Function:
    """The op gets its contract when the program has been compiled without."""
    from contig_pass import AlignedPointer, UnitStrideLast, register_contract

    run, calls = _anew(function, mode), 0

    def registering(x: torch.Tensor) -> Any:
        nonlocal calls
        run(*_again([x]))
        if not calls:
            register_contract("faults::late", "x", [UnitStrideLast(), AlignedPointer(16)])
        calls += 1
        return run(x)

    return registering


def _mutating(x: torch.Tensor) -> torch.Tensor:
    out = ops.rows(x)
    x.add_(1)
    return out


# -- export --------------------------------------------------------------------------------------


def _exported(
    arrange: Callable[[Any], Any], applied: bool = True
) -> Callable[[_Function, str], _Function]:
    """Export at the first call. ``arrange`` makes the program that runs from the exported one;
    ``applied``: contig_safe is ``contig_pass.apply``, not the backend."""

    def prepare(function: _Function, mode: str) -> _Function:
        runs: list[_Function] = []

        def run(*args: torch.Tensor) -> Any:
            if not runs:
                program = torch.export.export(function, tuple(_again(args)))
                if mode == CONTIG_SAFE and applied:
                    runs.append(arrange(program).module())
                else:
                    runs.append(compiled(_plain(arrange, program), mode))
            return runs[0](*args)

        return run

    def _plain(arrange: Callable[[Any], Any], program: Any) -> Any:
        return (program if applied else arrange(program)).module()

    return prepare


def _apply(program: Any) -> Any:
    import contig_pass

    return contig_pass.apply(program)


def _saved(program: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program.pt2"
        torch.export.save(program, path)
        return torch.export.load(path)


class _Sliced(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _sliced(x)


class _Filling(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        ops.fill(x[1:] * 2, x[:-1])
        return ops.rows(x[:, 1:])


def _export(
    module: Callable[[str], torch.nn.Module], prepare: Any, *offsets: int
) -> Callable[[str], Case]:
    def build(device: str) -> Case:
        calls = [(matrix,) for matrix in windows(device, *offsets)]
        return Case(module(device), calls, prepare=prepare)

    return build


# -- options and modes ---------------------------------------------------------------------------


def _with(**more: Any) -> Callable[[_Function, str], _Function]:
    return lambda function, mode: compiled(function, mode, **more)


def _frozen(module: Callable[[str], torch.nn.Module], *offsets: int) -> Callable[[str], Case]:
    return _export(module, _with(options={"freezing": True}), *offsets)


class _Both(torch.nn.Module):
    """One weight that two products want in two layouts."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.matmul(ops.matmul(x, self.weight, None), self.weight.t(), None)


def _product(x: torch.Tensor) -> torch.Tensor:
    return ops.rows((x @ x.t())[:, 1:]) + ops.rows(x[:, :39])


# -- threads -------------------------------------------------------------------------------------


def _scaled_by(factor: int) -> _Function:
    # Made anew each time, with another constant: every thread has a graph of its own.
    def function(x: torch.Tensor) -> torch.Tensor:
        return ops.rows(x) + ops.rows((x * factor).view(-1)[factor : factor + 1024].view(16, 64))[0]

    return function


def _clean(factor: int) -> _Function:
    def function(x: torch.Tensor) -> torch.Tensor:
        return ops.rows(x * factor) - factor

    return function


def _at_once(functions: Sequence[_Function], args: tuple) -> list[Any]:
    """Every function on its own argument, each in a thread, twice."""
    results: list[Any] = [None] * len(functions)
    barrier = threading.Barrier(len(functions))

    def work(number: int) -> None:
        try:
            barrier.wait()
            with torch.no_grad():  # of a thread, as grad mode is
                results[number] = [functions[number](args[number]) for _ in range(2)]
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def _threads(
    functions: Sequence[_Function], plain: Sequence[int] = (), shared: bool = False
) -> Callable[[str], Case]:
    """``functions`` in one thread each, those at ``plain`` by Inductor whatever the mode."""

    def reference(*args: torch.Tensor) -> list[Any]:
        return [[f(x) for _ in range(2)] for f, x in zip(functions, args, strict=True)]

    def prepare(function: _Function, mode: str) -> _Function:
        modes = [INDUCTOR if i in plain and mode != EAGER else mode for i in range(len(functions))]
        made = [compiled(f, m) for f, m in zip(functions, modes, strict=True)]
        if shared:
            made = [made[0]] * len(made)
        return lambda *args: _at_once(made, args)

    def build(device: str) -> Case:
        calls = [tuple(windows(device, *offsets)) for offsets in ((1, 0, 3, 2), (0, 2, 1, 4))]
        return Case(reference, calls, prepare=prepare)

    return build


_COMPILES_BOTH = _after((INDUCTOR, {}), (CONTIG_SAFE, {}), (INDUCTOR, {}))
_MODE = "max-autotune-no-cudagraphs"

_GROUPS: dict[str, dict[str, Callable[[str], Case]]] = {
    "cache hits": {
        "contig_safe after Inductor": _cached(_other_first, 0, 1),
        "Inductor, contig_safe, Inductor, contig_safe": _cached(_COMPILES_BOTH, 1, 0),
        "made for aligned inputs": _cached(_hit, 0, 1, 3),
        "made for misaligned inputs": _cached(_hit, 1, 0, 2),
        "input mutated": _cached(_hit, 0, 1, function=_mutating),
        "audit before": _cached(_after((CONTIG_SAFE, {"options": {"policy": "audit"}})), 1, 0),
        "contract registered between": _cached(
            _contract_later, 1, 0, function=lambda x: ops.late(x[:, 1:])
        ),
    },
    "export": {
        "views": _export(lambda device: _Sliced(), _exported(_apply), 0, 1, 3),
        "parameters": _export(lambda device: _layer(device, 1), _exported(_apply), 0, 1),
        "mutation": _export(lambda device: _Filling(), _exported(_apply), 0, 1),
        "applied, saved, loaded": _export(
            lambda device: _layer(device, 1), _exported(lambda ep: _saved(_apply(ep))), 0, 1
        ),
        "saved, loaded, applied": _export(
            lambda device: _layer(device, 1), _exported(lambda ep: _apply(_saved(ep))), 0, 1
        ),
        "saved, loaded, compiled": _export(
            lambda device: _layer(device, 1), _exported(_saved, applied=False), 0, 1
        ),
    },
    "freezing": {
        "row-major weight": _frozen(lambda device: _layer(device, 0), 0, 1),
        "misaligned row-major weight": _frozen(lambda device: _layer(device, 1), 1, 0),
        "one weight in two layouts": _frozen(
            lambda device: _Both(window(integers(device, 64 * 64 + 16), 1, 64, 64)), 0, 3
        ),
    },
    "modes": {
        f"{_MODE}, inputs": _export(lambda device: _product, _with(mode=_MODE), 0, 1, 3),
        f"{_MODE}, parameters": _export(
            lambda device: _layer(device, 1), _with(mode=_MODE), 0, 1, 0
        ),
        "reduce-overhead, inputs": _export(
            lambda device: _sliced, _with(mode="reduce-overhead"), 0, 1, 0, 3, 3
        ),
        "reduce-overhead, parameters": _export(
            lambda device: _layer(device, 1), _with(mode="reduce-overhead"), 0, 0, 1, 0
        ),
        "reduce-overhead, input mutated": _export(
            lambda device: _mutating, _with(mode="reduce-overhead"), 0, 1, 3
        ),
    },
    "threads": {
        "four programs": _threads([_scaled_by(i) for i in range(1, 5)]),
        "Inductor beside contig_safe": _threads(
            [_scaled_by(1), _clean(2), _scaled_by(3), _clean(4)], plain=(1, 3)
        ),
        "one compiled function": _threads([_sliced] * 4, shared=True),
    },
}
