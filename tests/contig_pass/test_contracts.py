"""The built-in contracts against what was measured on an H100, row by row.

Each call is traced with fake tensors and judged for ``sm90`` without being compiled. What the
measurement shows as refused, wrong or asynchronous must be a violation of that operand; what it
shows as accepted must not.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import ScalingType

from contig_pass.analysis import Use, analyse
from contig_pass.contracts import REGISTRY
from contig_pass.contracts.registry import op_name, resolve_op, tensor_operands
from contig_pass.contracts.target import Target
from contig_pass.layout import Layout

H100 = Target("cuda", (9, 0))
F8, BF16 = torch.float8_e4m3fn, torch.bfloat16
M, K, N = 256, 512, 384


def uses_of(function: Callable[..., object], *args: object) -> dict[str, Use]:
    """Uses of the only bound call in ``function``, by operand."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, args)
        graph = make_fx(function)(*fake).graph
    inputs = frozenset(node.name for node in graph.nodes if node.op == "placeholder")
    found = analyse(graph, aligned_inputs=inputs, density=False, target=H100).uses
    return {use.operand.name: use for use in found}


def broken(function: Callable[..., object], *args: object) -> set[str]:
    return {name for name, use in uses_of(function, *args).items() if not use.clean}


def at(nbytes: int, shape: tuple[int, ...], dtype: torch.dtype, pad: int = 0) -> torch.Tensor:
    """A view that starts ``nbytes`` after an aligned address, with ``pad`` bytes between rows."""
    columns = shape[-1] * dtype.itemsize + pad
    rows = torch.Size(shape[:-1]).numel()
    flat = torch.zeros(nbytes + rows * columns + 64, dtype=torch.uint8, device="meta")
    rows_of = flat[nbytes : nbytes + rows * columns].view(dtype).view(*shape[:-1], -1)
    return rows_of[..., : shape[-1]]


def _product(scale_a: tuple[int, ...], scale_b: tuple[int, ...], **planted: torch.Tensor) -> set:
    values = {
        "a": at(0, (M, K), F8), "w": at(0, (N, K), F8), "sa": at(0, scale_a or (1,), torch.float32),
        "sb": at(0, scale_b or (1,), torch.float32), "bias": at(0, (N,), BF16), **planted,
    }

    def function() -> torch.Tensor:
        sa, sb = values["sa"], values["sb"]
        return torch.ops.aten._scaled_mm(
            values["a"], values["w"].t(), sa if scale_a else sa[0], sb if scale_b else sb[0],
            values["bias"], None, BF16,
        )

    return _broken_of_meta(function)


def _broken_of_meta(function: Callable[[], object]) -> set[str]:
    """Like :func:`broken` for a function that makes its own meta tensors."""
    graph = make_fx(function, tracing_mode="real")().graph
    uses = analyse(graph, aligned_inputs=frozenset(), density=False, target=H100).uses
    return {use.operand.name for use in uses if not use.clean}


SCALINGS = {"tensor-wise": ((), ()), "row-wise": ((M, 1), (1, N))}


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(
    ("planted", "expected"),
    [
        ({}, set()),
        *(({"a": at(o, (M, K), F8)}, {"self"}) for o in (1, 2, 4, 8)),
        *(({"w": at(o, (N, K), F8)}, {"mat2"}) for o in (1, 2, 4, 8)),
        *(({"a": at(o, (M, K), F8), "w": at(o, (N, K), F8)}, set()) for o in (16, 32)),
        *(({"a": at(0, (M, K), F8, p)}, {"self"}) for p in (1, 2, 8)),
        *(({"a": at(0, (M, K), F8, p)}, set()) for p in (16, 64, K)),
        *(({"w": at(0, (N, K), F8, p)}, {"mat2"}) for p in (1, 8)),
        ({"w": at(0, (N, K), F8, 16)}, set()),
        *(({"bias": at(2 * e, (N,), BF16)}, {"bias"}) for e in (1, 2, 3, 4, 6)),
        ({"bias": at(16, (N,), BF16)}, set()),
        ({"bias": at(0, (2 * N,), BF16)[::2]}, {"bias"}),
    ],
)
def test_scaled_mm_as_measured(
    scaling: str, planted: dict[str, torch.Tensor], expected: set[str]
) -> None:
    assert _product(*SCALINGS[scaling], **planted) == expected


def test_scales_of_a_scaled_product() -> None:
    assert _product((), (), sb=at(4, (1,), torch.float32)) == {"scale_b"}
    assert _product((M, 1), (1, N), sa=at(4, (M, 1), torch.float32)) == {"scale_a"}
    assert _product((M, 1), (1, N), sb=at(16, (1, N), torch.float32)) == set()


def test_functional_scaled_mm_finds_operands_in_lists() -> None:
    uses = uses_of(
        lambda a, w, s: torch.nn.functional.scaled_mm(
            a, w.t(), s[1:2], ScalingType.TensorWise, s[4:5], ScalingType.TensorWise,
            output_dtype=BF16,
        ),
        torch.zeros(M, K).to(F8), torch.zeros(N, K).to(F8), torch.zeros(8),
    )
    assert set(uses) == {"self", "mat2", "scale_a[0]", "scale_b[0]"}
    assert not uses["scale_a[0]"].clean
    assert uses["scale_b[0]"].clean
    assert all("scaled_mm" in use.contract.op for use in uses.values())


def test_block_scales_must_be_outer_major() -> None:
    a, w = torch.zeros(M, K).to(F8), torch.zeros(N, K).to(F8)
    rows = torch.zeros(M, K // 128)
    blocks = torch.zeros(N // 128, K // 128)

    def function(a: torch.Tensor, w: torch.Tensor, sa: torch.Tensor, sb: torch.Tensor):
        return torch.ops.aten._scaled_mm(a, w.t(), sa, sb.t(), None, None, BF16)

    assert broken(function, a, w, rows, blocks) == {"scale_a"}
    assert broken(function, a, w, rows.t().contiguous().t(), blocks) == set()


def test_int8_products() -> None:
    a, w = torch.zeros(M, K, dtype=torch.int8), torch.zeros(N, K, dtype=torch.int8)
    flat = torch.zeros(M * K + 16, dtype=torch.int8)

    def function(x: torch.Tensor, w: torch.Tensor, offset: int = 0) -> torch.Tensor:
        return torch._int_mm(x[offset : offset + M * K].view(M, K), w.t())

    assert broken(lambda f, w: function(f, w, 1), flat, w) == {"self"}
    assert broken(lambda f, w: function(f, w, 4), flat, w) == set()
    assert broken(lambda a, w: torch._int_mm(a, w.t()), a, w) == set()
    assert broken(lambda a, w: torch._int_mm(a, w), a, torch.zeros(K, N, dtype=torch.int8)) == set()


def test_every_contract_states_its_source_and_binds_a_real_operand() -> None:
    families = {"_scaled_mm", "_scaled_mm_v2", "_scaled_grouped_mm", "_int_mm",
                "_scaled_dot_product_flash_attention", "_scaled_dot_product_cudnn_attention",
                "_scaled_dot_product_efficient_attention",
                "_scaled_dot_product_flash_attention_for_cpu"}
    seen = set()
    for contract in REGISTRY.contracts():
        op = resolve_op(contract.op)
        assert op_name(op) == contract.op
        assert contract.operand in tensor_operands(op)
        assert len(contract.source) > 10
        assert contract.describe()
        seen.add(contract.op.split("::")[1].split(".")[0])
    assert families <= seen
    assert "aten::_scaled_mm.out" in {c.op for c in REGISTRY.contracts()}


@pytest.mark.parametrize("name", ["flash", "cudnn", "efficient"])
def test_attention_wants_16_bytes_everywhere(name: str) -> None:
    op = f"aten::_scaled_dot_product_{name}_attention.default"
    bound = {c.operand: c for c in REGISTRY.contracts() if c.op == op}
    assert {"query", "key", "value"} <= set(bound)
    assert ("attn_bias" in bound) == (name != "flash")
    good = at(0, (2, 3, 64, 64), BF16)
    for contract in bound.values():
        assert all(rule.check(Layout.of(good)) for rule in contract.rules)
        for wrong in (
            at(2, (2, 3, 64, 64), BF16), at(8, (2, 3, 64, 64), BF16),
            at(0, (2, 3, 64, 64), BF16, 2), at(0, (2, 3, 64, 128), BF16)[..., ::2],
        ):
            assert not all(rule.check(Layout.of(wrong)) for rule in contract.rules)
        assert all(rule.check(Layout.of(at(0, (2, 3, 64, 64), BF16, 16))) for rule in
                   contract.rules)


def _padded_blocks(pitch: int, blocks: int, rows: int = 3) -> torch.Tensor:
    return torch.zeros(rows, pitch)[:, :blocks]


@pytest.mark.parametrize(("pitch", "blocks", "right"), [
    (4, 4, True), (8, 4, False), (8, 5, True), (5, 5, False), (12, 5, False),
])
def test_rows_of_128x128_scales_are_padded_to_four(pitch: int, blocks: int, right: bool) -> None:
    k = blocks * 128
    a, w = torch.zeros(M, k).to(F8), torch.zeros(N, k).to(F8)
    rows = torch.zeros(blocks, M).t()

    def function(a: torch.Tensor, w: torch.Tensor, sa: torch.Tensor, sb: torch.Tensor):
        return torch.ops.aten._scaled_mm(a, w.t(), sa, sb.t(), None, None, BF16)

    found = broken(function, a, w, rows, _padded_blocks(pitch, blocks))
    assert found == (set() if right else {"scale_b"})


def _heads(tokens_first: bool, pad: int = 0) -> torch.Tensor:
    """(B, H, L, D) bf16 with the memory of (B, L, H, D), or its own."""
    shape = (2, 64, 3, 64) if tokens_first else (2, 3, 64, 64)
    value = at(0, shape, BF16, pad)
    return value.transpose(1, 2) if tokens_first else value


@pytest.mark.parametrize("tokens_first", [False, True])
def test_cudnn_backward_takes_the_output_as_the_forward_returned_it(tokens_first: bool) -> None:
    """Its graph is kept by the strides of q, k and v alone."""

    def broken_by(grad_out: torch.Tensor, out: torch.Tensor) -> set[str]:
        q, k, v = (_heads(tokens_first) for _ in "qkv")
        sums = torch.zeros(2, 3, 64, 1, device="meta")
        seed = torch.zeros((), dtype=torch.int64, device="meta")

        def function(grad_out: torch.Tensor, q: torch.Tensor, k, v, out, sums, seed):
            return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
                grad_out, q, k, v, out, sums, seed, seed, None, None, None, 64, 64, 0.0, False
            )

        return broken(function, grad_out, q, k, v, out, sums, seed)

    usual, other = _heads(tokens_first), _heads(not tokens_first)
    assert broken_by(usual, usual) == set()
    assert broken_by(other, usual) == {"grad_out"}
    assert broken_by(usual, other) == {"out"}
    assert broken_by(_heads(tokens_first, 16), _heads(tokens_first, 16)) == {"grad_out", "out"}


def test_efficient_backward_takes_the_output_with_tokens_first() -> None:
    op = "aten::_scaled_dot_product_efficient_attention_backward.default"
    bound = {c.operand: c for c in REGISTRY.contracts() if c.op == op}

    def fine(operand: str, value: torch.Tensor) -> bool:
        return all(rule.check(Layout.of(value)) for rule in bound[operand].rules)

    assert fine("out", _heads(True))
    assert not fine("out", _heads(True, 16))
    assert not fine("out", _heads(False))
    # What is not dense it copies by itself.
    assert fine("grad_out_", _heads(True, 2))
    assert not fine("grad_out_", at(2, (2, 64, 3, 64), BF16).transpose(1, 2))
