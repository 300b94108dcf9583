"""``torch.compile(..., backend="contig_safe")``: repairs, what stays untouched, policies, options.

A repair is judged by what the kernel received (address and strides) and by the values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import entry_points

import pytest
import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import run_and_get_code

import contig_pass
from benchmarks.clean import count_code
from contig_pass.errors import LayoutViolation, OptionError, ReportError
from tests import kernels


@pytest.fixture(autouse=True)
def kernel_contracts() -> Iterator[None]:
    with kernels.contracts():
        kernels.received.clear()
        yield


def compiled(function: Callable, **kwargs: object) -> Callable:
    kwargs.setdefault("fullgraph", True)
    return torch.compile(function, backend="contig_safe", **kwargs)


def run_both(function: Callable, *args: torch.Tensor, **kwargs: object) -> contig_pass.Report:
    """Compile and compare with eager; returns the report."""
    expected = function(*args)
    kernels.received.clear()
    actual = compiled(function, **kwargs)(*args)
    for got, want in zip(
        torch.utils._pytree.tree_leaves(actual), torch.utils._pytree.tree_leaves(expected),
        strict=True,
    ):
        assert torch.equal(got, want)
    return contig_pass.last_reports()[-1]


INNERS = ("inductor", "aot_eager")


def test_the_name_is_an_entry_point() -> None:
    assert "contig_safe" in torch._dynamo.list_backends()
    (found,) = entry_points(group="torch_dynamo_backends", name="contig_safe")
    assert found.load() is contig_pass.contig_safe


@pytest.mark.parametrize("inner", INNERS)
def test_one_copy_is_shared_and_other_users_keep_the_view(inner: str) -> None:
    def function(b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        view = b[1 : 1 + 32 * 16].view(32, 16)
        return kernels.rows(view), kernels.rows(view), view, kernels.several([view, b[4:]])

    b = torch.arange(600.0)
    report = run_both(function, b, options={"inner": inner})
    assert report.totals.fixes == 1
    assert report.totals.fixed_uses == 3
    assert kernels.bad() == []
    out = compiled(function, options={"inner": inner})(b)
    assert out[2].data_ptr() == b.data_ptr() + 4  # the returned view is still a view of the input
    addresses = [seen.address for seen in kernels.received[:2]]
    assert addresses[0] == addresses[1]


def test_uses_that_want_different_orders_get_their_own_copies() -> None:
    def function(b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        view = b[3 : 3 + 512].view(32, 16)
        return kernels.matrix(view), kernels.columns(view)

    report = run_both(function, torch.arange(600.0))
    assert sorted(row.order for row in report.fixes) == ["column", "row"]
    assert kernels.bad() == []
    received = {seen.op: seen.strides for seen in kernels.received}
    assert received == {"matrix": (16, 1), "columns": (1, 32)}


def test_what_is_right_costs_nothing() -> None:
    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return kernels.rows((x + 1).relu()) + kernels.rows(y) + kernels.columns(y.t())

    args = (torch.randn(16, 16), torch.randn(16, 16))
    _, plain = run_and_get_code(torch.compile(lambda *a: function(*a), fullgraph=True), *args)
    torch._dynamo.reset()
    _, safe = run_and_get_code(compiled(function), *args)
    counts = [count_code("\n".join(codes)) for codes in (plain, safe)]
    for what in ("allocations", "fused kernels", "extern kernels"):
        assert counts[0][what] == counts[1][what]
    report = contig_pass.last_reports()[-1]
    assert report.clean
    assert report.totals.fixes == 0
    assert report.totals.pins == 1
    assert "clean: 3 uses checked, nothing inserted" in str(report)


def test_a_copy_fuses_with_its_producer() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return kernels.columns((x * 2).relu())

    x = torch.randn(32, 16)
    _, codes = run_and_get_code(compiled(function), x)
    body = codes[0].split("def call(")[1].split("def get_args")[0]
    assert body.count("cpp_fused") == 1
    (row,) = contig_pass.last_reports()[-1].fixes
    assert row.fused
    assert row.nbytes == 0
    assert kernels.bad() == []


@pytest.mark.parametrize("dtype", [torch.float8_e8m0fnu, torch.float4_e2m1fn_x2,
                                   torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("inner", INNERS)
def test_one_byte_and_packed_types(dtype: torch.dtype, inner: str) -> None:
    def function(b: torch.Tensor) -> torch.Tensor:
        return kernels.rows(b.view(dtype)[3 : 3 + 512].view(32, 16))

    b = torch.randint(1, 100, (600,), dtype=torch.uint8)
    report = run_both(function, b, options={"inner": inner})
    assert report.totals.fixes == 1
    assert kernels.bad() == []


@pytest.mark.parametrize("inner", INNERS)
def test_later_calls_with_other_offsets(inner: str) -> None:
    function = compiled(lambda x: (kernels.rows(x), x.view(-1)[4:]), options={"inner": inner})
    base = torch.arange(600.0)
    for offset in (0, 1, 4, 7, 2):
        x = base[offset : offset + 512].view(32, 16)
        out, alias = function(x)
        assert torch.equal(out, x * 2)
        assert alias.data_ptr() == x.data_ptr() + 16
    assert kernels.bad() == []
    assert len(contig_pass.last_reports()) == 1  # no call recompiled


@pytest.mark.parametrize("inner", INNERS)
def test_a_misaligned_input_that_is_written_to(inner: str) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        out = kernels.rows(x)
        x.mul_(3)
        return out

    function_compiled = compiled(function, options={"inner": inner})
    for offset in (1, 0, 3):
        base = torch.arange(600.0)
        x = base[offset : offset + 512].view(32, 16)
        want = x.clone()
        assert torch.equal(function_compiled(x), want * 2)
        assert torch.equal(x, want * 3)
    assert kernels.bad() == []


def test_dynamic_shapes() -> None:
    function = compiled(lambda x: kernels.rows((x + 1)[:, 1:]), dynamic=True)
    for rows, columns in ((8, 17), (9, 21), (12, 40)):
        x = torch.randn(rows, columns)
        assert torch.equal(function(x), (x + 1)[:, 1:] * 2)
    assert kernels.bad() == []
    assert len(contig_pass.last_reports()) == 1
    (row,) = contig_pass.last_reports()[-1].fixes
    assert any(isinstance(size, str) for size in row.shape)


def test_cat_does_not_move_what_is_pinned() -> None:
    def function(past: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        new = (x + 1).to(torch.float8_e4m3fn)
        return kernels.rows(new), torch.cat([past, new], 1).float()

    past = torch.randn(16, 5).to(torch.float8_e4m3fn)
    run_both(function, past, torch.randn(16, 64))
    assert kernels.bad() == []


def test_training_repairs_forward_and_backward() -> None:
    @torch.library.custom_op("layout_tests::scaled", mutates_args=())
    def scaled(x: torch.Tensor) -> torch.Tensor:
        kernels.note("rows", x)
        return x.contiguous() * 2

    scaled.register_fake(lambda x: x.new_empty(x.shape))
    scaled.register_autograd(lambda ctx, grad: scaled(grad))
    rules = [contig_pass.UnitStrideLast(), contig_pass.AlignedPointer(16)]
    contig_pass.register_contract("layout_tests::scaled", "x", rules)
    w = torch.randn(16, 33, requires_grad=True)

    def function(w: torch.Tensor) -> torch.Tensor:
        return (scaled(w[:, 1:]).t() @ torch.ones(16, 4)).sum()

    function(w).backward()
    want, w.grad = w.grad, None
    kernels.received.clear()
    compiled(function)(w).backward()
    assert torch.equal(w.grad, want)
    assert len(kernels.received) == 2
    assert kernels.bad() == []
    assert len(contig_pass.last_reports()) == 2


# -- obstacles ------------------------------------------------------------------------------------


def test_a_size_cannot_be_repaired_and_strict_says_where() -> None:
    contig_pass.unregister_contract("layout_tests::rows", "x")
    rules = [contig_pass.AlignedPointer(16), contig_pass.Multiple(16)]
    contig_pass.register_contract("layout_tests::rows", "x", rules)

    def function(b: torch.Tensor) -> torch.Tensor:
        return kernels.rows(b[1:61].view(4, 15))

    report = run_both(function, torch.arange(64.0))
    assert report.totals.fixes == 1
    assert "size of dim -1 a multiple of 16" in report.skips[0].reason
    torch._dynamo.reset()
    with pytest.raises(Exception, match="layout_tests::rows") as caught:
        compiled(function, options={"policy": "strict"})(torch.arange(64.0))
    cause: BaseException | None = caught.value
    while cause is not None and not isinstance(cause, LayoutViolation):
        cause = getattr(cause, "inner_exception", None) or cause.__cause__ or cause.__context__
    message = str(cause or caught.value)
    for words in ("operand x", "test_backend.py:", "size of dim -1 a multiple of 16"):
        assert words in message


# -- policies ------------------------------------------------------------------------------------


def _strided_product(a: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    one = torch.ones((), device=a.device)
    return torch._scaled_mm(a[:, :32], w.t(), one, one, out_dtype=torch.bfloat16)


@pytest.fixture
def strided() -> tuple[torch.Tensor, torch.Tensor]:
    """Operands with a legal pitch that is not dense."""
    torch.manual_seed(0)
    f8 = torch.float8_e4m3fn
    return torch.randn(16, 48).to(f8), torch.randn(32, 32).to(f8)


@pytest.mark.parametrize(
    ("policy", "fixes", "skips"), [("dense", 1, 0), ("contract", 0, 1), ("strict", 0, 1),
                                   ("audit", 0, 1)],
)
def test_policies_on_a_legal_but_strided_operand(
    policy: str, fixes: int, skips: int, strided: tuple
) -> None:
    report = run_both(_strided_product, *strided, options={"policy": policy})
    assert (report.policy, report.totals.fixes, report.totals.skips) == (policy, fixes, skips)


def test_audit_changes_nothing() -> None:
    function = compiled(lambda b: kernels.rows(b[1:513].view(32, 16)),
                        options={"policy": "audit", "inner": "aot_eager"})
    function(torch.arange(600.0))
    assert len(kernels.bad()) == 1
    report = contig_pass.last_reports()[-1]
    assert report.totals.fixes == 0
    assert report.skips[0].reason == "policy audit: nothing is changed"


# -- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"policy": "tense"}, "did you mean 'dense'"),
        ({"inner": "eager"}, "'inductor' or 'aot_eager'"),
        ({"target": "h100"}, "such as 'sm90'"),
        ({"polcy": "dense"}, "did you mean 'policy'"),
        ({"max_autotun": True}, "did you mean 'max_autotune'"),
        ({"inner": "aot_eager", "max_autotune": True}, "takes no mode and no Inductor option"),
        ({"report": 3}, "a path"),
        ({"report": "report.pdf"}, ".txt"),
        ({"report": "no/such/folder/r.json"}, "does not exist"),
    ],
)
def test_bad_options_are_one_line(options: dict, words: str) -> None:
    with pytest.raises(Exception, match=words) as caught:
        compiled(lambda x: x + 1, options=options)(torch.ones(3))
    cause = getattr(caught.value, "inner_exception", caught.value)
    assert isinstance(cause, (OptionError, ReportError))
    assert "\n" not in str(cause)
    assert contig_pass.last_reports() == []


def test_bad_mode() -> None:
    with pytest.raises(Exception, match="mode"):
        compiled(lambda x: x + 1, mode="fastest")(torch.ones(3))


@pytest.mark.parametrize("mode", ["max-autotune-no-cudagraphs", "default"])
def test_modes(mode: str) -> None:
    function = torch.compile(
        lambda b: kernels.rows(b[1:513].view(32, 16)), backend="contig_safe", mode=mode
    )
    b = torch.arange(600.0)
    assert torch.equal(function(b), b[1:513].view(32, 16) * 2)
    assert kernels.bad() == []


class _Counting(CustomGraphPass):
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.calls += 1

    def uuid(self) -> str:
        return "counting"


@pytest.mark.parametrize("through", ["option", "config"])
def test_a_users_own_pass_still_runs(through: str) -> None:
    own = _Counting()
    hook = "post_grad_custom_post_pass"
    options = {hook: own} if through == "option" else {}
    patch = {} if through == "option" else {hook: own}
    with torch._inductor.config.patch(patch):
        run_both(lambda b: kernels.rows(b[1:513].view(32, 16)), torch.arange(600.0),
                 options=options)
    assert own.calls == 1
    assert kernels.bad() == []


def test_inductor_options_pass_through() -> None:
    def function(b: torch.Tensor) -> torch.Tensor:
        return kernels.rows((b + 1)[1:513].view(32, 16))

    report = run_both(function, torch.arange(600.0), options={"max_fusion_size": 1})
    assert report.totals.uses == 1


def test_each_graph_of_a_broken_model_has_its_report() -> None:
    def function(b: torch.Tensor) -> torch.Tensor:
        first = kernels.rows(b[1:513].view(32, 16))
        torch._dynamo.graph_break()
        return first + kernels.rows(b[2:514].view(32, 16))

    run_both(function, torch.arange(600.0), fullgraph=False)
    reports = contig_pass.last_reports()
    assert [report.totals.fixes for report in reports] == [1, 1]
    assert len({report.graph for report in reports}) == 2
    assert kernels.bad() == []


def test_plain_inductor_in_the_same_process_is_left_as_it_was() -> None:
    def function(b: torch.Tensor) -> torch.Tensor:
        return kernels.rows(b[1:513].view(32, 16))

    b = torch.arange(600.0)
    run_both(function, b)
    assert kernels.bad() == []
    torch._dynamo.reset()
    kernels.received.clear()
    torch.compile(function, fullgraph=True)(b)
    assert len(kernels.bad()) == 1
    assert len(contig_pass.last_reports()) == 1
