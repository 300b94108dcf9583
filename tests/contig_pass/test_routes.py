"""Routes by which bad memory reaches a kernel besides views: written operands, subgraphs, opaque
ops, attention that no kernel would take. Each judged by address, strides and value."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import contig_pass
from contig_pass.errors import LayoutViolation
from tests import kernels

_LIBRARY = torch.library.Library("route_tests", "DEF")


def _shifted(x: torch.Tensor) -> torch.Tensor:
    buffer = torch.zeros(x.numel() + 1)
    buffer[1:] = x.reshape(-1)
    return buffer[1:].view(x.shape)


def _fill(x: torch.Tensor, out: torch.Tensor) -> None:
    kernels.note("rows", x)
    kernels.note("several", out)
    out.add_(x.sum())


_LIBRARY.define("shifted(Tensor x) -> Tensor")
_LIBRARY.impl("shifted", _shifted, "CompositeExplicitAutograd")
torch.library.register_fake("route_tests::shifted", lambda x: x.new_empty(x.shape), lib=_LIBRARY)
_LIBRARY.define("fill(Tensor x, Tensor(a!) out) -> ()")
_LIBRARY.impl("fill", _fill, "CompositeExplicitAutograd")
torch.library.register_fake("route_tests::fill", lambda x, out: None, lib=_LIBRARY)
_LIBRARY.define("turned(Tensor x) -> Tensor")
_LIBRARY.impl("turned", lambda x: x.t().contiguous().t(), "CompositeExplicitAutograd")
torch.library.register_fake("route_tests::turned", lambda x: x.new_empty(x.shape), lib=_LIBRARY)
_PITCHED: list[tuple[int, tuple[int, ...]]] = []


def _pitched(x: torch.Tensor) -> torch.Tensor:
    _PITCHED.append((x.data_ptr() % 16, x.stride()))
    return x.float()


_LIBRARY.define("pitched(Tensor x) -> Tensor")
_LIBRARY.impl("pitched", _pitched, "CompositeExplicitAutograd")
torch.library.register_fake(
    "route_tests::pitched", lambda x: torch.empty_like(x, dtype=torch.float32), lib=_LIBRARY
)
pitched = torch.ops.route_tests.pitched
fill, shifted = torch.ops.route_tests.fill, torch.ops.route_tests.shifted


@pytest.fixture(autouse=True)
def contracts() -> Iterator[None]:
    with kernels.contracts(), torch.no_grad():
        for operand in ("x", "out"):
            rules = [contig_pass.AlignedPointer(16)]
            contig_pass.register_contract("route_tests::fill", operand, rules)
        yield


def run(function: Callable, *args: torch.Tensor, **kwargs: object) -> contig_pass.Report:
    """Compile, compare outputs and mutated inputs with eager mode, look at what kernels got."""
    copies = [torch.empty_like(a).copy_(a) for a in args]
    expected = function(*copies)
    kernels.received.clear()
    kwargs.setdefault("fullgraph", True)
    actual = torch.compile(function, backend="contig_safe", **kwargs)(*args)
    leaves = torch.utils._pytree.tree_leaves
    for got, want in zip(leaves((actual, args)), leaves((expected, copies)), strict=True):
        assert got is want is None or torch.equal(got, want)
    assert kernels.received
    assert kernels.bad() == []
    return contig_pass.last_reports()[-1]


def _slice_of_computed(b: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(40)
    fill(b[1:9], out[3:])
    return out * 2


def _slice_of_input(b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    fill(b[1:9], out[3:9])
    return out.sum()


def _two_slices_one_after_the_other(b: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(40)
    fill(b[1:9], out[3:9])
    fill(b[1:9], out[7:19])
    return out


def _strided(b: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(8, 9).t()
    fill(b[1:9], out[1:, 1:])
    return out


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (_slice_of_computed, [16]), (_slice_of_input, [16, 30]),
        (_two_slices_one_after_the_other, [16]), (_strided, [16]),
    ],
)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("inner", ["inductor", "aot_eager"])
def test_what_an_op_writes_reaches_its_place(
    function: Callable, shapes: list[int], dynamic: bool, inner: str
) -> None:
    args = [torch.arange(float(n)) for n in shapes]
    report = run(function, *args, dynamic=dynamic, options={"inner": inner})
    assert any(row.write_back for row in report.fixes)
    assert not report.skips


@pytest.mark.parametrize(
    "parts",
    [
        lambda x: x.split(1), lambda x: x.split([1, 3]), lambda x: x.unbind(), lambda x: x.chunk(2),
        lambda x: x.tensor_split(3),
    ],
    ids=["split", "split with sizes", "unbind", "chunk", "tensor_split"],
)
@pytest.mark.parametrize("inner", ["inductor", "aot_eager"])
def test_parts_of_an_input_that_is_misaligned_at_a_later_call(
    parts: Callable[[torch.Tensor], Sequence[torch.Tensor]], inner: str
) -> None:
    compiled = torch.compile(
        lambda x: kernels.rows(parts(x)[0]), backend="contig_safe", fullgraph=True,
        options={"inner": inner},
    )
    for offset in (0, 1):
        x = torch.arange(20.0)[offset : offset + 16].view(4, 4)
        expected = kernels.rows(parts(x)[0])
        kernels.received.clear()
        assert torch.equal(compiled(x), expected)
        assert kernels.received
        assert kernels.bad() == []


def test_a_misaligned_input_that_an_op_writes_to() -> None:
    def function(b: torch.Tensor, out: torch.Tensor) -> None:
        fill(b[4:9], out)

    run(function, torch.arange(16.0), torch.ones(30)[1:])


def test_two_arguments_that_write_to_one_base_are_reported() -> None:
    @torch.library.custom_op("route_tests::both", mutates_args={"a", "b"})
    def both(a: torch.Tensor, b: torch.Tensor) -> None:
        kernels.note("several", torch.zeros(4))
        a.add_(1)
        b.add_(2)

    contig_pass.register_contract("route_tests::both", "a", [contig_pass.AlignedPointer(16)])

    def function(x: torch.Tensor) -> torch.Tensor:
        base = x + 1
        both(base[1:5], base[9:12])
        return base

    report = run(function, torch.arange(16.0))
    (skip,) = report.skips
    assert skip.reason == "the op writes to this operand, and a copy would lose what it writes"


def test_memory_of_an_opaque_op_is_looked_at_when_the_graph_runs() -> None:
    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = shifted(x)
        return kernels.rows(y), kernels.rows(y[4:]), kernels.several([y, x]), y

    report = run(function, torch.randn(16, 16))
    assert report.totals.checks == 2
    assert "2 looked at when the graph runs" in str(report)


def test_an_aligned_result_of_an_opaque_op_is_not_copied() -> None:
    def function(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = kernels.rows(x)
        return kernels.rows(y), y

    compiled = torch.compile(function, backend="contig_safe")
    kernels.received.clear()
    _, y = compiled(torch.randn(16, 16))
    assert kernels.received[1].address == y.data_ptr()


def test_a_fake_that_lies_is_named_under_strict() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.route_tests.turned(x) + 1

    with pytest.raises(LayoutViolation, match=r"route_tests::turned.*stride 1==8") as caught:
        torch.compile(function, backend="contig_safe", options={"policy": "strict"})(
            torch.randn(4, 8)
        )
    assert "\n" not in str(caught.value)


# -- subgraphs -----------------------------------------------------------------------------------


def test_one_subgraph_called_with_two_offsets() -> None:
    region = torch.compiler.nested_compile_region(lambda x: kernels.rows(x))

    def function(b: torch.Tensor) -> torch.Tensor:
        return region(b[:512].view(32, 16)) + region(b[1:513].view(32, 16))

    report = run(function, torch.randn(520))
    (row,) = report.fixes
    assert (row.op, row.order, row.before.offset) == ("subgraph", "strides", 4)


def test_a_misaligned_result_of_a_subgraph() -> None:
    region = torch.compiler.nested_compile_region(lambda x: (x + 1)[1:])
    run(lambda b: kernels.rows(region(b)) + kernels.rows(region(b * 2)), torch.randn(520))


@pytest.mark.parametrize("taken", [True, False])
def test_control_flow(taken: bool) -> None:
    def function(which: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        x = torch.cond(
            which, lambda a: kernels.rows(a)[1:], lambda a: kernels.rows(a * 2)[1:],
            (b[1:513].view(32, 16),),
        )
        return kernels.rows(x)

    run(function, torch.tensor(taken), torch.randn(520))


# -- refused while tracing -----------------------------------------------------------------------


def _flash(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
        return torch.nn.functional.scaled_dot_product_attention(q, k, k) * 1


@pytest.mark.parametrize("order", ["safe first", "plain first"])
def test_attention_that_no_kernel_takes_as_it_is(order: str) -> None:
    q = torch.randn(1, 2, 64, 32, dtype=torch.bfloat16)[..., ::2]
    k = torch.randn(1, 2, 64, 16, dtype=torch.bfloat16)

    def plain() -> None:
        torch._dynamo.reset()
        with pytest.raises(Exception, match="No available kernel"):
            torch.compile(_flash, backend="inductor", fullgraph=True)(q, k)

    def safe() -> None:
        torch._dynamo.reset()
        out = torch.compile(_flash, backend="contig_safe", fullgraph=True)(q, k)
        assert torch.equal(out, _flash(q.contiguous(), k))
        (row,) = contig_pass.last_reports()[-1].fixes
        assert (row.operand, row.before.strides[-1], row.after.strides[-1]) == ("query", 2, 1)

    for step in (safe, plain, safe) if order == "safe first" else (plain, safe, plain):
        step()


@pytest.mark.skipif(torch.version.cuda is None, reason="fake CUDA tensors need a CUDA build")
def test_scaled_mm_refused_by_the_tracer_is_planned_and_still_refused_to_others() -> None:
    from torch._subclasses import FakeTensorMode

    from contig_pass.inductor.tracing import repairs_layouts

    reached = []

    def stop(module: torch.fx.GraphModule, inputs: object) -> Callable:
        reached.append(module)
        return lambda *args: (torch.zeros(()),)

    with FakeTensorMode(allow_non_fake_inputs=True):
        a = torch.empty(64, 32, device="cuda", dtype=torch.float8_e4m3fn).t()
        b = torch.empty(64, 48, device="cuda", dtype=torch.float8_e4m3fn)
        scale = torch.ones((), device="cuda")

    def function(a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return torch._scaled_mm(a, b, scale, scale, out_dtype=torch.bfloat16)

    for backend in (lambda *a: stop(*a), repairs_layouts(lambda *a: stop(*a))) * 2:
        torch._dynamo.reset()
        reached.clear()
        compiled = torch.compile(function, backend=backend, fullgraph=True)
        if hasattr(backend, "_contig_pass_repairs_layouts"):
            compiled(a, b, scale)
            assert reached
        else:
            with pytest.raises(Exception, match="row_major"):
                compiled(a, b, scale)
            assert not reached


def test_memory_of_an_opaque_result_is_not_taken_over() -> None:
    """Inductor would compute the sum in place, in the op's misaligned memory."""
    report = run(lambda x: kernels.rows(shifted(x) + 1), torch.randn(16, 64))
    assert report.totals.clean == 1


def test_what_is_copied_from_an_opaque_result_is_not_computed_in_it() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        out = shifted(x)
        fill(x[0] * 2, out)
        return kernels.rows(out)

    report = run(function, torch.randn(16, 64))
    assert any(row.write_back for row in report.fixes)


def _rows_and_columns(b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    fill(b[1:], out[1:, 2:])
    return out * 2


def _one_part_after_the_other(b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    fill(b[1:], out[1:])
    fill(b, out[:, 3:7])
    return out.sum()


@pytest.mark.parametrize("function", [_rows_and_columns, _one_part_after_the_other])
@pytest.mark.parametrize("dynamic", [False, True])
def test_parts_written_of_an_input_that_does_not_start_its_storage(
    function: Callable, dynamic: bool
) -> None:
    """Plain Inductor writes to the wrong place: it takes the offset from the storage's start for
    one from the input's, and that of a slice with symbolic sizes for 0."""
    compiled = torch.compile(function, backend="contig_safe", fullgraph=True, dynamic=dynamic)
    for offset, rows in ((1, 4), (5, 4), (8, 6), (0, 4)):
        b, storage = torch.arange(8.0), torch.arange(200.0)
        out = storage[offset : offset + rows * 16].view(rows, 16)
        expected_storage = storage.clone()
        expected = function(b, expected_storage[offset : offset + rows * 16].view(rows, 16))
        kernels.received.clear()
        assert torch.equal(compiled(b, out), expected)
        assert torch.equal(storage, expected_storage)
        assert kernels.received
        assert kernels.bad() == []


@pytest.mark.parametrize("dynamic", [False, True])
def test_inputs_that_share_memory_and_lie_elsewhere_at_a_later_call(dynamic: bool) -> None:
    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        return kernels.rows(y)

    compiled = torch.compile(function, backend="contig_safe", fullgraph=True, dynamic=dynamic)
    for first, second in ((1, 5), (0, 3), (4, 0), (0, 3), (1, 5)):
        flat = torch.arange(100.0)
        same = flat.clone()
        x, y = (flat[offset : offset + 64].view(4, 16) for offset in (first, second))
        expected = function(*(same[offset : offset + 64].view(4, 16) for offset in (first, second)))
        kernels.received.clear()
        assert torch.equal(compiled(x, y), expected)
        assert torch.equal(flat, same)
        assert kernels.received
        assert kernels.bad() == []


@pytest.mark.xfail(
    torch.__version__ < "2.12", strict=True,
    reason="Inductor of torch 2.11 reads a clone of an input after the input is written to",
)
def test_a_clone_of_an_input_that_is_written_to_later_keeps_its_values() -> None:
    """Found by the random programs: plain Inductor of torch 2.11 is wrong without ``block``'s."""

    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        cloned = x.clone()
        x[6:].add_(1)
        parts = cloned.unsqueeze(0)
        return kernels.block(cloned), kernels.columns(parts[:, :, 3:6, ::3])

    run(function, torch.randint(0, 3, (9, 10, 8), dtype=torch.int8))


def test_rows_too_short_to_lie_end_to_end_are_copied_with_their_pitch() -> None:
    """84 channels of bf16 at byte 88: dense rows would be 168 bytes apart, no multiple of 16."""

    def function(x: torch.Tensor) -> torch.Tensor:
        return pitched(x[..., 44:])

    rules = [
        contig_pass.UnitStrideLast(), contig_pass.AlignedPointer(16), contig_pass.AlignedPitch(16),
    ]
    contig_pass.register_contract("route_tests::pitched", "x", rules)
    x = torch.randn(2, 12, 128).bfloat16()
    expected = function(x)
    _PITCHED.clear()
    for policy in ("dense", "contract", "strict"):
        torch._dynamo.reset()
        compiled = torch.compile(
            function, backend=contig_pass.contig_safe, options={"policy": policy}
        )
        assert torch.equal(compiled(x), expected)
        assert _PITCHED.pop() == (0, (12 * 128, 128, 1))
        report = contig_pass.last_reports()[-1]
        assert [row.order for row in report.fixes] == ["strides"]
        assert report.skips == ()
