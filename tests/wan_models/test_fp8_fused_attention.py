"""Self-attention in 8 bits as one op from the projections on: against the steps by themselves."""

from __future__ import annotations

import importlib
import weakref

import pytest
import torch
from torch import nn
from torch.library import opcheck

import contig_pass
from tests.wan_models.attention_cases import exact, relative_error
from wan_models.attention import (
    WanSelfAttention,
    fp8_arithmetic,
    fp8_fused,
    fp8_values,
    self_attention,
)
from wan_models.attention.kernels import attention
from wan_models.layers import WanRMSNorm
from wan_models.rope import apply_rope, rope_table, rope_table_1d

EPS = 1e-6
BOUND = 0.065
OP = torch.ops.wan_models.fp8_self_attention
VALUES = torch.ops.wan_models.fp8_values


def projections(
    tokens: int = 75, size: int = 64, heads: int = 3, batch: int = 2,
    dtype: torch.dtype = torch.float32,
) -> list[torch.Tensor]:
    """q, k, v (B, L, C), both norm weights, a rotary table for all tokens but five."""
    torch.manual_seed(0)
    width = heads * size
    parts = [torch.randn(batch, tokens, width) for _ in range(3)]
    parts[0] *= torch.rand(batch, tokens, 1) * 4 + 0.1  # what a norm has to do with
    parts[1] += 1.5
    weights = [1 + 0.3 * torch.randn(width) for _ in range(2)]
    table = rope_table_1d(torch.arange(max(tokens - 5, 1)), size)
    return [x.to(dtype) for x in (*parts, *weights)] + [table]


def steps(q, k, v, q_weight, k_weight, table, eps=EPS) -> list[torch.Tensor]:
    """q, k and v (B, L, H, D) by the modules of the model."""
    size, made = 2 * table.shape[-1], []
    for x, weight in ((q, q_weight), (k, k_weight)):
        norm = WanRMSNorm(x.shape[-1], eps).to(x.dtype)
        norm.weight.data.copy_(weight)
        made.append(apply_rope(norm(x).detach().unflatten(-1, (-1, size)), table))
    return [*made, v.unflatten(-1, (-1, size))]


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("tokens", [1, 2, 40, 129, 300])
def test_values_at_any_length(tokens, size):
    parts = projections(tokens, size)
    out = fp8_fused.run(*parts, EPS, None)
    assert out.shape == (2, tokens, 3, size)
    assert out.is_contiguous()
    assert relative_error(out, exact(*steps(*parts))) < BOUND


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("lengths", [None, (300, 7)])
def test_it_is_what_the_steps_give_within_rounding(dtype, lengths):
    """Nearer to them than either is to exact attention, and no less exact than they are."""
    parts = projections(300, dtype=dtype)
    lens = None if lengths is None else torch.tensor(lengths)
    fused = fp8_fused.run(*parts, EPS, lens)
    by_steps = attention(*steps(*parts), mode="fp8", k_lens=lens)
    wide = steps(*(x.double() for x in parts[:5]), parts[5])
    expected = exact(*wide, lens)
    assert fused.dtype == dtype
    assert relative_error(fused, by_steps.double()) < 0.04
    assert relative_error(fused, expected) < 1.1 * relative_error(by_steps, expected)


def test_a_table_for_each_sample():
    parts = projections(60)
    positions = torch.stack([torch.arange(60), 5 * torch.arange(60)])
    parts[5] = rope_table_1d(positions, 64)
    assert relative_error(fp8_fused.run(*parts, EPS, None), exact(*steps(*parts))) < BOUND


def test_padding_counts_nowhere():
    parts = projections(200)
    lens = torch.tensor([200, 33])
    expected = fp8_fused.run(*parts, EPS, lens)
    parts[1][1, 33:], parts[2][1, 33:] = torch.nan, torch.inf
    assert torch.equal(fp8_fused.run(*parts, EPS, lens), expected)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_not_finite_is_seen(which):
    parts = projections(50)
    parts[which][0, 7, 3] = torch.nan
    bad = ~fp8_fused.run(*parts, EPS, None).isfinite()
    assert not bad[1].any()
    # The norm is over all heads: a row of q, or every row for a key, in the whole sample.
    seen = (bad[0, 7], bad[0], bad[0, :, 0, 3])[which]
    assert seen.all()
    assert bad.sum() == seen.numel()


def test_views_of_one_fused_projection():
    parts = projections(80)
    expected = fp8_fused.run(*parts, EPS, None)
    joined = torch.cat(parts[:3], -1)
    assert torch.equal(fp8_fused.run(*joined.chunk(3, -1), *parts[3:], EPS, None), expected)


@pytest.mark.parametrize("lengths", [None, (75, 30)])
@pytest.mark.parametrize("tokens", [75, 256, 300])
def test_opcheck(tokens, lengths):
    lens = None if lengths is None else torch.tensor(lengths)
    parts = projections(tokens, dtype=torch.bfloat16)
    joined = torch.cat(parts[:3], -1)
    for q, k, v in (parts[:3], joined.chunk(3, -1)):
        opcheck(VALUES.default, (v, 64, lens), test_utils=("test_schema", "test_faketensor"))
        arguments = (q, k, *fp8_values.run(v, 64, lens), *parts[3:], EPS, lens)
        kept = [x.clone() if torch.is_tensor(x) else x for x in arguments]
        # What test_schema compares is not implemented for e4m3 on the CPU: by hand, below.
        opcheck(OP.default, arguments, test_utils=("test_faketensor", "test_aot_dispatch_static"))
        for was, is_now in zip(kept, arguments, strict=True):
            assert not torch.is_tensor(was) or torch.equal(was.float(), is_now.float())


@pytest.mark.parametrize("tokens", [1, 255, 256, 300])
@pytest.mark.parametrize("lengths", [False, True])
def test_values_are_padded_codes_by_channel(tokens, lengths):
    torch.manual_seed(0)
    v = torch.randn(2, tokens, 192) * torch.logspace(-3, 3, 192)
    lens = torch.tensor([tokens, tokens // 2 + 1]) if lengths else None
    values, scales = fp8_values.run(v, 64, lens)
    assert values.shape == (6, 64, 256 if tokens <= 256 else 512)
    assert values.dtype == torch.float8_e4m3fn
    assert (scales.shape, scales.dtype) == ((6, 64), torch.float32)
    assert values.is_contiguous()
    assert values[..., tokens:].float().count_nonzero() == 0
    assert torch.equal(values.float().abs().amax(-1), torch.full((6, 64), 448.0))
    back = fp8_values.restored(values, scales, 2, tokens)
    expected = v.unflatten(-1, (3, 64)).clone()
    if lengths:
        expected[1, tokens // 2 + 1 :] = 0
    # Half of the last bit, or of the smallest code.
    slack = expected.abs() * 2**-4 + (scales * 2**-10).unflatten(0, (2, 1, 3))
    assert ((back - expected).abs() <= 1.001 * slack).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_values_in_8_bits_again_are_the_same(dtype):
    """So the reference, which quantises what is restored, sees what the kernel sees."""
    torch.manual_seed(0)
    v = (torch.randn(2, 500, 192) * torch.logspace(-3, 3, 192)).to(dtype)
    v[..., 5] = 0
    v[..., 6] = 1e-38
    values, scales = fp8_values.run(v, 64, None)
    again, same = fp8_arithmetic.quantise_values(
        fp8_values.restored(values, scales, 2, 500), None
    )
    assert torch.equal(again.transpose(-1, -2).flatten(0, 1), values[..., :500].float())
    torch.testing.assert_close(same.flatten(0, 2), scales, rtol=3e-7, atol=0)


def test_values_that_are_not_finite_show_in_their_scale_alone():
    v, lens = torch.randn(2, 50, 192), torch.tensor([50, 20])
    v[0, 7, 3], v[1, 10, 70], v[1, 20:, 130] = torch.nan, -torch.inf, torch.nan
    _, scales = fp8_values.run(v, 64, lens)
    bad = scales.isnan()
    assert (bad[0, 3], bad[4, 6], bad.sum()) == (True, True, 2)


def test_values_of_the_graph_have_symbolic_sizes():
    seen = []

    def keep(graph, _):
        seen.extend(
            n.meta["example_value"] for n in graph.graph.nodes if n.target is VALUES.default
        )
        return graph

    torch._dynamo.reset()
    torch.compile(lambda v: fp8_values.run(v, 64, None), backend=keep, dynamic=True,
                  fullgraph=True)(torch.randn(2, 300, 192))
    planes, _, tokens = seen[0][0].shape
    assert not isinstance(planes, int)
    assert not isinstance(tokens, int)


def test_on_the_meta_device_at_full_size():
    q = torch.empty(1, 75_600, 5120, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(5120, device="meta")
    table = torch.empty(2, 75_600, 1, 64, device="meta")
    out = fp8_fused.run(q, q, q, weight, weight, table, EPS, None)
    assert out.shape == (1, 75_600, 40, 128)
    assert out.is_contiguous()


def layer(dtype: torch.dtype = torch.bfloat16, mode: str = "fp8") -> WanSelfAttention:
    torch.manual_seed(0)
    made = WanSelfAttention(192, 3, mode=mode)
    for norm in (made.norm_q, made.norm_k):
        nn.init.normal_(norm.weight, 1, 0.3)
    return made.to(dtype).eval()


def by_steps(attn: WanSelfAttention, x, table, lens=None) -> torch.Tensor:
    return attn.o(attn.attend(*attn.project(x, table), lens).flatten(2))


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    seen, kept = [], fp8_fused.attend
    monkeypatch.setattr(fp8_fused, "attend", lambda *args: seen.append(args) or kept(*args))
    return seen


@pytest.mark.parametrize("mode", ["fp8", "auto_fp8"])
@pytest.mark.parametrize("lengths", [None, (60, 21)])
def test_the_layer_uses_it(fused_calls, mode, lengths):
    attn, table = layer(mode=mode), rope_table((3, 4, 5), 64)
    lens = None if lengths is None else torch.tensor(lengths)
    x = torch.randn(2, 60, 192).bfloat16()
    with torch.no_grad():
        out = attn(x, table, lens)
        assert len(fused_calls) == 1
        expected = by_steps(attn, x, table, lens)
    assert relative_error(out, expected.double()) < 0.04


def test_the_layer_lets_go_of_v_before_it_makes_q_and_k():
    attn, table, alive = layer(), rope_table((3, 4, 5), 64), []
    made = []
    attn.v.register_forward_hook(lambda _, args, out: made.append(weakref.ref(out)))
    for linear in (attn.q, attn.k):
        linear.register_forward_pre_hook(lambda *_: alive.append(made[0]() is not None))
    with torch.no_grad():
        attn(torch.randn(2, 60, 192).bfloat16(), table)
    assert alive == [False, False]


@pytest.mark.parametrize("case", ["mode", "rope", "norm", "eps", "head_dim"])
def test_the_layer_uses_it_nowhere_else(fused_calls, case):
    attn, table = layer(), rope_table((3, 4, 5), 64)
    x = torch.randn(2, 60, 192).bfloat16()
    if case == "mode":
        attn.mode = "sdpa"
    elif case == "rope":
        table = None
    elif case == "norm":
        attn.norm_q = nn.Identity()
    elif case == "eps":
        attn.norm_k.eps = 1e-3
    else:
        attn.num_heads, table = 2, rope_table((3, 4, 5), 96)
        attn.mode = "sdpa"
    with torch.no_grad():
        assert torch.equal(attn(x, table), by_steps(attn, x, table))
    assert not fused_calls


def test_the_layer_compiles_into_one_graph_with_the_op():
    attn, table = layer(), rope_table((3, 4, 5), 64)
    x = torch.randn(2, 60, 192).bfloat16()
    lens = torch.tensor([60, 21])
    compiled = torch.compile(
        attn, backend="contig_safe", fullgraph=True, options={"inner": "aot_eager"}
    )
    with torch.no_grad():
        assert torch.equal(compiled(x, table, lens), attn(x, table, lens))
    report = contig_pass.last_reports()[-1]
    assert report.totals.fixes == 0


@pytest.mark.parametrize("broken", ["misaligned", "pitch", "strided"])
def test_contig_safe_supplies_the_layout(broken):
    parts = projections(40, dtype=torch.bfloat16)
    expected = fp8_fused.run(*parts, EPS, None)
    width = parts[0].shape[-1]

    def function(q, k, v, *others):
        if broken == "misaligned":
            q = torch.cat([q.flatten()[:1], q.flatten()])[1:].view(q.shape)
        elif broken == "pitch":
            q = torch.nn.functional.pad(q, (0, 1))[..., :width]
        else:
            q = q.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)
        return fp8_fused.run(q, k, v, *others, EPS, None)

    if broken == "strided":
        with pytest.raises(ValueError, match="last dimension of q must be unit-stride"):
            function(*parts)
    compiled = torch.compile(
        function, backend="contig_safe", fullgraph=True, options={"inner": "aot_eager"}
    )
    assert torch.equal(compiled(*parts), expected)
    assert contig_pass.last_reports()[-1].totals.fixes == 1


def test_one_graph_for_several_lengths():
    counted = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    attn = layer()
    compiled = torch.compile(attn, backend=counted, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for rows in (4, 6, 20):  # one block of keys, and two
            table, x = rope_table((3, rows, 5), 64), torch.randn(2, 15 * rows, 192).bfloat16()
            assert torch.equal(compiled(x, table), attn(x, table))
    assert counted.frame_count == 1


def test_contracts_are_registered_once_however_often_modules_load():
    for module in (self_attention.fp8_fused, self_attention.fp8_values):
        importlib.reload(module)
    assert contig_pass.explain(
        lambda *parts: fp8_fused.run(*parts, EPS, None), *projections(dtype=torch.bfloat16)
    ).totals.fixes == 0


@pytest.mark.parametrize("operand", [2, 3, 4])
def test_contig_safe_supplies_values_and_weights(operand):
    """Eagerly those that are not as the kernels see them are refused."""
    q, k, v, *others = projections(40, dtype=torch.bfloat16)
    parts = [q, k, *fp8_values.run(v, 64, None), *others]
    op = fp8_fused.fp8_self_attention  # by now loaded anew
    expected = op(*parts, EPS, None)

    def spaced(*parts):
        parts = list(parts)
        parts[operand] = torch.stack([parts[operand]] * 2, -1)[..., 0]
        return op(*parts, EPS, None)

    name = ("values", "scales", "norm_q_weight")[operand - 2]
    with pytest.raises(ValueError, match=f"{name} must be"):
        spaced(*parts)
    compiled = torch.compile(
        spaced, backend="contig_safe", fullgraph=True, options={"inner": "aot_eager"}
    )
    assert torch.equal(compiled(*parts), expected)
    assert contig_pass.last_reports()[-1].totals.fixes == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({0: lambda x: x[..., :8]}, r"values \(6, 64, 8\) and scales \(6, 64\) must be \(6, 64, 2"),
        ({1: lambda x: x[:3]}, r"scales \(3, 64\) must be .* and \(6, 64\) for q \(2, 75, 192\)"),
        ({0: lambda x: x.view(torch.uint8)}, "must be of torch.float8_e4m3fn .* got torch.uint8"),
    ],
)
def test_other_values_are_named(changed, message):
    q, k, v, *others = projections()
    made = list(fp8_values.run(v, 64, None))
    for at, change in changed.items():
        made[at] = change(made[at])
    with pytest.raises(ValueError, match=message):
        fp8_fused.attend(q, k, *made, *others, EPS, None)


@pytest.mark.parametrize(
    ("shape", "size", "message"),
    [
        ((2, 75), 64, r"v has shape \(2, 75\) for heads of 64: use \(B, S, H \* D\)"),
        ((2, 75, 192), 128, "for heads of 128: use"),
        ((2, 75, 192), 96, "for heads of 64 or 128"),
    ],
)
def test_bad_values_are_named(shape, size, message):
    with pytest.raises(ValueError, match=message):
        fp8_values.run(torch.randn(shape), size, None)


def change(index: int, value: object) -> list:
    parts = projections()
    parts[index] = value(parts[index])
    return parts


@pytest.mark.parametrize(
    ("parts", "lens", "message"),
    [
        (lambda: change(1, lambda k: k[:, 1:]), None, r"k \(2, 74, 192\) must be .* both alike"),
        (lambda: change(1, torch.Tensor.double), None, "share a dtype, got torch.float32"),
        (lambda: change(2, torch.Tensor.double), None, "v .* of torch.float64 must be as q"),
        (lambda: change(3, lambda w: w[1:]), None, r"norm_q_weight has shape \(191,\): use \(192,"),
        (lambda: change(5, lambda t: t[..., :24]), None, "table is for heads of 48: use one for"),
        (lambda: change(5, lambda t: t.repeat(1, 2, 1, 1)), None, "is for 140 tokens of head dim"),
        (projections, torch.tensor([3]), "one length for each of 2"),
        (projections, torch.tensor([76, 1]), "from 1 to 76: use lengths from 1 to the 75 keys"),
    ],
)
def test_bad_input_is_named(parts, lens, message):
    with pytest.raises(ValueError, match=message) as raised:
        fp8_fused.run(*parts(), EPS, lens)
    assert "\n" not in str(raised.value)
