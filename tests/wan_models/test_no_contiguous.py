"""No model code makes a tensor contiguous to please a kernel: contig_pass does that.

Every place where the source copies a tensor to dense memory, or asks whether it lies there, is
listed here with its reason. What is written to please a kernel has no reason that is one.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import wan_models

PACKAGE = Path(wan_models.__file__).parent
#: Names by which memory is made dense or judged. ``memory_format`` is also a keyword of copies.
NAMES = {
    "contiguous", "clone", "is_contiguous", "memory_format", "ascontiguousarray",
    "require_contiguous",
}
#: What makes memory whose layout is chosen, so that a ``copy_`` into it is a relayout.
MAKERS = {"empty", "empty_like", "empty_strided", "new_empty", "new_zeros", "zeros", "zeros_like"}

#: Module, function and name: how often, and why it is no service to a kernel.
REASONS = {
    ("attention/contracts.py", "dense", "is_contiguous"): (
        1, "a result, not an operand: its fake promises one layout, its kernels return two"
    ),
    ("attention/contracts.py", "dense", "copy_ into new_empty"): (1, "the same"),
    ("attention/fp8_operands.py", "_turns", "memory_format"): (
        1, "the rotary table is copied in any case, into half its bytes: the order of that copy"
    ),
    ("attention/fp8_arithmetic.py", "reference", "copy_ into new_empty"): (
        1, "a result: the op's fake promises it dense, whatever layout the product has on a CPU"
    ),
    ("attention/sage.py", "_sage_3", "clone"): (
        1, "the kernel writes to its keys, and they are the caller's"
    ),
    ("attention/sage.py", "_sage_3", "memory_format"): (1, "the order of that copy"),
    ("checkpoint/quantised.py", "weight", "clone"): (
        1, "a file's transposed weight is turned once, while loading"
    ),
    ("checkpoint/quantised.py", "weight", "memory_format"): (1, "the order of that copy"),
    ("checkpoint/reader.py", "realigned", "clone"): (
        1, "a view into a mapped file is moved once, while loading"
    ),
    ("checkpoint/save.py", "_raw", "clone"): (1, "what is written to a file is its bytes"),
    ("checkpoint/save.py", "_raw", "memory_format"): (1, "the order of those bytes"),
    ("model.py", "forward", "contiguous"): (
        1, "no kernel demands it: all norms of all blocks read the stream by rows, "
        "3 to 31% of the time by diffusers#14236; and blocks alike are to compile once"
    ),
    ("quant/fp4_triton.py", "run_few_rows", "clone"): (
        1, "words of two numbers are read, which start on 4 bytes: a few rows of x, moved if not"
    ),
    ("quant/fp4_triton.py", "run_few_rows", "memory_format"): (1, "the order of that copy"),
    ("quant/fp8.py", "channel_scales", "clone"): (
        1, "one scale is repeated for every channel, once, while the layer is made"
    ),
    ("quant/fp8.py", "channel_scales", "memory_format"): (1, "the order of that copy"),
    ("quant/fused.py", "dense", "is_contiguous"): (
        1, "a result, not an operand: fakes promise one layout, formulas on a CPU return any"
    ),
    ("quant/fused.py", "dense", "copy_ into new_empty"): (1, "the same"),
    ("quant/rows_linear.py", "product_into", "contiguous"): (
        1, "one scale is repeated for every column: there is no dense one to be asked for"
    ),
    ("quant/nvfp4.py", "unswizzle_scales", "clone"): (
        1, "the padding of a file's scales would be kept alive by a view, while loading"
    ),
    ("recorder.py", "digest", "contiguous"): (1, "a name for values, whatever their layout"),
    ("recorder.py", "recording.compute", "contiguous"): (
        2, "stands for a kernel, after the operands' layouts are recorded"
    ),
}


def found(path: Path, module: str) -> Iterator[tuple[str, str, str]]:
    """(module, function, name) of every such place in one file."""
    tree = ast.parse(path.read_text())

    def visit(node: ast.AST, function: tuple[str, ...]) -> Iterator[tuple[str, str, str]]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function = (*function, node.name)
        name = _name(node)
        if name is not None:
            yield module, ".".join(function), name
        for child in ast.iter_child_nodes(node):
            yield from visit(child, function)

    yield from visit(tree, ())


def _name(node: ast.AST) -> str | None:
    if isinstance(node, ast.Attribute) and node.attr in NAMES:
        return node.attr
    if isinstance(node, ast.Name) and node.id in NAMES:
        return node.id
    if isinstance(node, ast.keyword) and node.arg in NAMES:
        return node.arg
    if isinstance(node, ast.Constant) and node.value in NAMES:
        return str(node.value)  # getattr, or an op by name
    is_copy = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    if is_copy and node.func.attr == "copy_" and isinstance(node.func.value, ast.Call):
        maker = node.func.value.func
        called = maker.attr if isinstance(maker, ast.Attribute) else getattr(maker, "id", "")
        if called in MAKERS:
            return f"copy_ into {called}"
    return None


def test_every_dense_copy_has_its_reason() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 40
    counted = Counter(
        place for path in files for place in found(path, path.relative_to(PACKAGE).as_posix())
    )
    listed = {place: count for place, (count, _) in REASONS.items()}
    assert counted - Counter(listed) == Counter(), "no reason is given for these"
    assert Counter(listed) - counted == Counter(), "these are gone: take them off the list"
    assert all(reason for _, reason in REASONS.values())


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("def f(x): return x.flatten(2).contiguous()", "contiguous"),
        ("def f(x): return list(map(torch.Tensor.contiguous, x))", "contiguous"),
        ("def f(x): return getattr(x, 'contiguous')()", "contiguous"),
        ("def f(x): return torch.clone(x)", "clone"),
        ("def f(x): return x.to(d, memory_format=y)", "memory_format"),
        ("def f(x): return x if x.is_contiguous() else g(x)", "is_contiguous"),
        ("def f(x): return torch.empty(x.shape).copy_(x)", "copy_ into empty"),
        ("class C:\n async def f(self, x):\n  return x.contiguous()", "contiguous"),
    ],
)
def test_what_is_found(tmp_path: Path, source: str, name: str) -> None:
    path = tmp_path / "module.py"
    path.write_text(source)
    assert list(found(path, "module.py")) == [("module.py", "f", name)]


@pytest.mark.parametrize("source", ["def f(x): return x.flatten(2)", "x = 'x.contiguous()'"])
def test_what_is_not(tmp_path: Path, source: str) -> None:
    path = tmp_path / "module.py"
    path.write_text(source)
    assert list(found(path, "module.py")) == []
