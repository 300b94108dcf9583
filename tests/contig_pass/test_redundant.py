"""Copies in the user's own program: the verdict on each, and what may be taken out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor.utils import fresh_cache

import contig_pass
from contig_pass.errors import OptionError
from contig_pass.fingerprint import fingerprint
from contig_pass.options import Options, parse_options
from contig_pass.report.copies import Copy
from contig_pass.report.html import to_html
from contig_pass.report.json import from_file, to_file
from contig_pass.report.text import to_text
from tests import kernels

BOTH = pytest.mark.parametrize("inner", ["aot_eager", "inductor"])


@pytest.fixture(autouse=True)
def kernel_contracts() -> Iterator[None]:
    torch._dynamo.reset()
    with kernels.contracts():
        yield


def compiled(function: Callable[..., Any], *args: Any, **options: Any) -> tuple[Any, list[Copy]]:
    """What the compiled function returns, and what became of the copies in it."""
    contig_pass.forget_reports()
    options.setdefault("inner", "aot_eager")
    result = torch.compile(function, backend="contig_safe", options=options)(*args)
    (report,) = contig_pass.last_reports()
    return result, list(report.copies)


def verdicts(function: Callable[..., Any], *args: Any, **options: Any) -> list[str]:
    return [copy.verdict for copy in compiled(function, *args, **options)[1]]


@BOTH
def test_a_call_that_returned_its_argument_is_named_with_its_line(inner: str) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return (x + 1).contiguous()

    _, (copy,) = compiled(function, torch.zeros(4, 8), inner=inner)
    assert (copy.verdict, copy.call, copy.nbytes) == ("no-op", "contiguous", 0)
    assert copy.file == __file__
    assert copy.code == "return (x + 1).contiguous()"
    assert copy.before == copy.after
    assert "returned its argument" in copy.proof


@BOTH
def test_a_copy_whose_order_nobody_can_see_is_taken_out(inner: str) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return x.t().contiguous().t() * 2 + 1

    x = torch.randn(6, 8)
    # The result has the strides of the copy.
    assert verdicts(function, x, inner=inner, remove_redundant=True) == ["needed"]

    def fixed(x: torch.Tensor) -> torch.Tensor:
        return (x.t().contiguous().t() * 2 + 1).contiguous()

    expected = fixed(x)
    for removing, verdict in ((False, "redundant"), (True, "removed")):
        torch._dynamo.reset()
        result, rows = compiled(fixed, x, inner=inner, remove_redundant=removing)
        assert rows[0].verdict == verdict
        assert rows[0].nbytes == 2 * 6 * 8 * 4
        assert "aten.clone" in rows[0].proof
        assert torch.equal(result, expected)
        assert result.stride() == expected.stride()


def nodes_of(function: Callable[..., Any], x: torch.Tensor, **options: Any) -> int:
    """Copies left in the graph that runs."""
    import contig_pass.aot_eager as room

    graphs = []
    original = room.repair

    def spy(graph: torch.fx.Graph, *args: Any, **kwargs: Any) -> Any:
        report = original(graph, *args, **kwargs)
        graphs.append(sum(n.target is torch.ops.aten.clone.default for n in graph.nodes))
        return report

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "repair", spy)
        compiled(function, x, **options)
    (count,) = graphs
    return count


def test_what_is_taken_out_is_gone_from_the_graph() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return (x.t().contiguous().t() * 2).clone().clone() + 1

    x = torch.randn(6, 8)
    assert nodes_of(function, x) == 3
    torch._dynamo.reset()
    assert nodes_of(function, x, remove_redundant=True) == 1  # the sum keeps the order of one
    kept = compiled(function, x)[0]
    torch._dynamo.reset()
    assert torch.equal(compiled(function, x, remove_redundant=True)[0], kept)


def returned(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


def returned_view(x: torch.Tensor) -> torch.Tensor:
    return x.clone().view(-1)[2:]


def returned_twice(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    y = x * 2
    return y, y.clone()


def source_written(x: torch.Tensor) -> torch.Tensor:
    kept = x.clone()
    x.add_(1)
    return kept * 2


def copy_written(x: torch.Tensor) -> torch.Tensor:
    scratch = x.clone()
    x.copy_(scratch.t() if scratch.shape[0] == scratch.shape[1] else scratch)
    return x * 2


def rounded_by_layout(x: torch.Tensor) -> torch.Tensor:
    return x.t().contiguous().exp().contiguous() * 2


def by_address(x: torch.Tensor) -> torch.Tensor:
    return x[1:].clone() @ x.t()


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (returned, "it is returned"),
        (returned_view, "it is returned"),
        (returned_twice, "it is returned"),
        (source_written, "written to"),
        (copy_written, "written to"),
        (rounded_by_layout, "reads strides"),
        (by_address, "may go by the address"),
    ],
)
def test_a_copy_that_something_depends_on_stays(
    function: Callable[..., Any], words: str
) -> None:
    x = torch.arange(25.0).view(5, 5) / 7
    same = x.clone()
    result, rows = compiled(function, x, remove_redundant=True)
    expected = function(same)
    assert rows[0].verdict == "needed"
    assert words in rows[0].proof
    for got, want in zip(*(v if isinstance(v, tuple) else (v,) for v in (result, expected)),
                         strict=True):
        assert torch.equal(got, want)
        assert got.data_ptr() != x.data_ptr() or function is copy_written
    assert torch.equal(x, same)


def test_symbolic_sizes_prove_nothing() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return (x.t().contiguous() * 2).contiguous().t().contiguous()

    x = torch.randn(6, 8)
    torch._dynamo.mark_dynamic(x, 0)
    rows = compiled(function, x, remove_redundant=True)[1]
    assert rows[0].verdict == "needed"
    assert "symbolic" in rows[0].proof
    assert rows[0].nbytes is None


def test_the_kernel_accepts_what_was_copied() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return kernels.rows(x[:, :64].contiguous())

    _, (copy,) = compiled(function, torch.zeros(32, 80), policy="contract")
    assert copy.verdict == "unneeded"
    assert copy.proof.startswith("layout_tests::rows x takes what is copied as it is, (32, 64)")
    assert copy.nbytes == 2 * 32 * 64 * 4


def test_the_pass_would_make_the_copy_itself() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return kernels.block(x[:, :64].contiguous())

    _, (copy,) = compiled(function, torch.zeros(32, 80), remove_redundant=True)
    assert copy.verdict == "unneeded"
    assert "the pass itself copies it for layout_tests::block x, which asks for" in copy.proof


def test_one_reader_that_is_bound_by_nothing_makes_it_needed() -> None:
    def function(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = x[:, :64].contiguous()
        return kernels.rows(y), y.sin()

    assert verdicts(function, torch.zeros(32, 80)) == ["needed"]


def test_inductor_itself_takes_copies_out() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return (x * 2).clone() + 1

    _, (copy,) = compiled(function, torch.zeros(4, 8), inner="inductor")
    assert copy.verdict == "compiled away"
    assert copy.nbytes == 2 * 4 * 8 * 4


@pytest.mark.usefixtures("empty_cache")
def test_a_report_from_a_cache_has_the_calls_of_this_program() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return (x * 2).contiguous().t().contiguous() @ x

    x = torch.randn(8, 8)
    assert verdicts(function, x, inner="inductor") == ["no-op", "needed"]
    torch._dynamo.reset()
    contig_pass.forget_reports()
    torch.compile(function, backend="contig_safe", options={"inner": "inductor"})(x)
    (report,) = contig_pass.last_reports()
    assert report.cached
    assert [copy.verdict for copy in report.copies] == ["no-op", "needed"]


@pytest.fixture
def empty_cache(tmp_path: Path) -> Iterator[None]:
    """Inductor's caches, on and empty."""
    configured = torch._inductor.config.patch({"force_disable_caches": False})
    with fresh_cache(dir=str(tmp_path)), configured:
        yield


def test_options_are_checked_and_keyed() -> None:
    with pytest.raises(OptionError, match="remove_redundant='yes': use True or False"):
        parse_options(None, {"remove_redundant": "yes"})
    with pytest.raises(OptionError, match="audit"):
        parse_options(None, {"remove_redundant": True, "policy": "audit"})
    with pytest.raises(OptionError, match="did you mean 'remove_redundant'"):
        parse_options(None, {"remove_redundent": True})
    on = parse_options(None, {"remove_redundant": True})
    assert on.remove_redundant
    assert fingerprint(on) != fingerprint(Options())


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(600.0), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = (x * 2).contiguous()
        return y + kernels.rows(self.weight[1:513].view(32, 16))


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_explain_names_parameters_and_modules() -> None:
    report = contig_pass.explain(Model(), torch.zeros(32, 16))
    named = [(row.module, row.parameter) for row in report.fixes]
    assert named == [(f"blocks.{n}", f"blocks.{n}.weight") for n in range(3)]
    assert [(copy.verdict, copy.module) for copy in report.copies] == [
        ("no-op", f"blocks.{n}") for n in range(3)
    ]
    text = to_text(report)
    assert "blocks.*.weight" in text
    assert "copies in your own program: 3 no-op" in text
    assert max(map(len, text.splitlines())) <= 100


def test_files_hold_the_copies() -> None:
    report = contig_pass.explain(Model(), torch.zeros(32, 16))
    content = json.loads(json.dumps(to_file([report])))
    assert from_file(content) == [report]
    for one in content["reports"]:
        del one["copies"]
    (earlier,) = from_file({**content, "version": 3})
    assert earlier.copies == ()
    assert earlier.rows == report.rows
    assert "own copy: no-op" in to_html([report])
