"""Helpers of the Triton tests: kernels under the interpreter, and compiled without a GPU."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys

import pytest

_PRESENT = importlib.util.find_spec("triton") is not None
_VERSION = tuple(map(int, importlib.metadata.version("triton").split(".")[:2])) if _PRESENT else ()
needs_triton = pytest.mark.skipif(not _PRESENT, reason="needs the triton package")
needs_interpreter = pytest.mark.skipif(
    _VERSION < (3, 7), reason="needs triton >= 3.7: older interpreters fail under numpy 2.4"
)


def interpreted(which: str) -> list[dict]:
    """The results of :mod:`tests.wan_models.triton_cpu` for ``"fp8"`` or ``"radial"``."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.wan_models.triton_cpu", which],
        capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"},
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def compiled(kernel, types: dict[str, str], constants: dict[str, object], sm: int, **options):
    """``kernel`` compiled for an NVIDIA GPU of capability ``sm``, which need not be here.

    Args:
        types: of the runtime arguments; ``"i"`` numbers are multiples of 16, as strides are.
        constants: the constexpr arguments.
    """
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {
        n: "constexpr" if n in constants else ("i32" if types[n] == "i" else types[n])
        for n in names
    }
    aligned = {
        (at,): [["tt.divisibility", 16]]
        for at, name in enumerate(names)
        if name not in constants and (types[name] == "i" or types[name].startswith("*"))
    }
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
    return compile(source, target=GPUTarget("cuda", sm, 32), options=options)


def gluon_compiled(
    kernel, types: dict[str, str], constants: dict[str, object], unaligned: tuple[str, ...]
):
    """A Gluon ``kernel`` compiled for Hopper, four warps in its first group.

    Args:
        types: of the runtime arguments that are no i32.
        constants: the constexpr arguments.
        unaligned: runtime arguments that are not multiples of 16.
    """
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    names = kernel.arg_names
    types = types | dict.fromkeys(constants, "constexpr")
    aligned = {
        (at,): [["tt.divisibility", 16]] for at, name in enumerate(names)
        if name not in (*constants, *unaligned)
    }
    source = GluonASTSource(
        kernel, {name: types.get(name, "i32") for name in names},
        {(names.index(name),): value for name, value in constants.items()}, aligned,
    )
    return compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
