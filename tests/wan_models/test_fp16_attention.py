"""Our own 16-bit attention, mode "fp16": values, padding, overflow, refusals, layouts."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.library import opcheck

import contig_pass
from tests.wan_models import attention_cases as cases
from tests.wan_models.attention_cases import exact, operands, relative_error
from wan_models.attention import fp16, modes, packages
from wan_models.attention.contracts import check_vectors
from wan_models.attention.kernels import attention, check_mode

BF16, HALF = torch.bfloat16, torch.float16
BOUND = 0.004
NAMES = ("q", "k", "v")


def op(*args: object) -> torch.Tensor:
    return torch.ops.wan_models.fp16_attention(*args)


def halves(*shape: int) -> list[torch.Tensor]:
    """q, k and v as the op takes them."""
    q, k, v = operands(*shape)
    return [fp16.scaled(q).half(), k.half(), v.half()]


# -- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, HALF])
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 9), (75, 129), (130, 1), (33, 777)])
def test_values_at_any_length(dtype, size, queries, keys):
    q, k, v = operands(2, queries, keys, 3, size, dtype)
    out = fp16.run(q, k, v, None)
    assert (out.shape, out.dtype, out.is_contiguous()) == (q.shape, dtype, True)
    assert relative_error(out, exact(q, k, v)) < BOUND


@pytest.mark.parametrize("dtype", [BF16, HALF])
@pytest.mark.parametrize("layout", cases.LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("lengths", [None, (9, 4)])
def test_layouts_change_nothing(dtype, layout, lengths):
    parts, lens = operands(dtype=dtype), None if lengths is None else torch.tensor(lengths)
    out = fp16.run(*map(layout, parts), lens)
    assert torch.equal(out, fp16.run(*parts, lens))
    assert out.is_contiguous()


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("keys", [64, 333, 2000])
def test_sharp_scores_cost_what_rounding_to_bf16_costs(size, keys):
    """Of fp32 q and k: measured 1.02 to 1.09 times that, and 0.2 to 0.45 from q and k in fp16."""
    q, k, v = operands(2, 100, keys, 2, size)
    q, k, v = 4 * q, 4 * k, v.to(BF16)
    expected, narrow = exact(q, k, v), (q.to(BF16), k.to(BF16), v)
    rounding = relative_error(exact(*narrow), expected)
    assert rounding > 0.005
    assert relative_error(fp16.run(*narrow, None), expected) < 2 * rounding
    made = op(fp16.scaled(q).half(), k.half(), v.half(), None, torch.float32)
    assert relative_error(made, expected) < rounding


@pytest.mark.parametrize("size", [64, 128])
def test_the_literals_are_the_factor(size):
    assert fp16.score_factor(size) in fp16.scaled.__code__.co_consts
    expected = torch.full((3, size), fp16.score_factor(size))
    assert torch.equal(fp16.scaled(torch.ones(3, size, dtype=BF16)), expected)


# -- padding, and what is not finite --------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, HALF])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 6e4])
@pytest.mark.parametrize("of_lens", [torch.int32, torch.int64])
def test_padding_counts_nowhere(dtype, value, of_lens):
    q, k, v = operands(2, 40, 129, dtype=dtype)
    lens = torch.tensor([129, 33], dtype=of_lens)
    expected = fp16.run(q, k, v, lens)
    assert relative_error(expected, exact(q, k, v, lens)) < BOUND
    k[1, 33:], v[1, 33:] = value, value
    assert torch.equal(fp16.run(q, k, v, lens), expected)
    assert torch.equal(attention(q, k, v, mode="fp16", k_lens=lens), expected)


def test_lengths_count_as_the_nearest_that_there_is():
    q, k, v = operands(3, dtype=BF16)
    out, whole = fp16.run(q, k, v, torch.tensor([0, 99, -3])), fp16.run(q, k, v, None)
    assert torch.equal(out[1], whole[1])
    assert not out[::2].any()


def test_without_keys_or_queries():
    q, k, v = halves()
    for lens in (None, torch.tensor([0, 0])):
        out = op(cases.head_major(q), k[:, :0], v[:, :0], lens, BF16)
        assert (out.shape, out.dtype, out.is_contiguous()) == (q.shape, BF16, True)
        assert not out.any()
    assert op(q[:, :0], k, v, None, BF16).shape == (2, 0, 2, 64)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_reaches_who_reads_it_and_no_other(which):
    parts = operands(dtype=BF16)
    expected = fp16.run(*parts, None)
    parts[which][0, 3, 1, 7] = torch.nan
    reached = torch.zeros_like(expected, dtype=torch.bool)
    reached[((0, 3, 1), (0, slice(None), 1), (0, slice(None), 1, 7))[which]] = True
    out = fp16.run(*parts, None)
    assert torch.equal(out.isnan(), reached)
    assert torch.equal(out[~reached], expected[~reached])


@pytest.mark.parametrize("case", ["k", "v", "score"])
def test_overflow_is_seen(case):
    q, k, v = operands(dtype=BF16)
    q[0, :, 1, 5] = q[0, :, 1, 5].abs() + 0.1  # all of them see what is there of a key
    if case == "score":
        k[0, 3, 1] = 500
    expected = fp16.run(q, k, v, None)
    reached = torch.zeros_like(expected, dtype=torch.bool)
    if case == "score":
        q[0, 2, 1], reached[0, 2, 1] = 100, True  # 64 * 500 * 100 * 0.18
    elif case == "k":
        k[0, 3, 1, 5], reached[0, :, 1] = 7e4, True
    else:
        v[0, 3, 1, 5], reached[0, :, 1, 5] = 7e4, True
    out = fp16.run(q, k, v, None)
    assert torch.equal(~out.isfinite(), reached)
    assert torch.equal(out[~reached], expected[~reached])


def test_a_key_far_away_has_no_weight():
    """Minus infinity is what its score rounds to."""
    q, k, v = operands(dtype=BF16)
    q[..., 5], k[0, 3, :, 5] = 100, -6e4
    assert relative_error(fp16.run(q, k, v, None), exact(q, k, v)) < BOUND


@pytest.mark.parametrize("case", ["scores", "key", "query"])
def test_overflow_below_is_seen(case):
    """It would pass for a key that weighs nothing."""
    q, k, v = operands(dtype=BF16)
    reached = torch.zeros_like(q, dtype=torch.bool)
    if case == "scores":  # every score of a query lies below -65504
        q[0, 2], k, reached[0, 2] = -1000, 1000 * k.abs(), True
    elif case == "key":  # it should count: q hardly sees the channel
        q[..., 5], k[0, 3, :, 5], reached[0] = 1e-5, -7e4, True
    else:
        q[0, 2, :, 5], k[..., 5], reached[0, 2] = 1e6, -k[..., 5].abs(), True
    out = fp16.run(q, k, v, None)
    assert torch.equal(out.isnan(), reached)
    right = fp16.reference(fp16.scaled(q).half(), k.half(), v.half(), None)
    assert torch.equal(out[~reached], right.to(BF16)[~reached])


# -- what rules the mode out ----------------------------------------------------------------------

HOPPER = "a CUDA device of compute capability 9.0 needed"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((9, 0), "cuda", BF16, True), ""),
        (((9, 0), "cuda", None, True), ""),
        ((None, "cpu", HALF, False), ""),
        ((None, "meta", BF16, False), ""),
        (((8, 0), "cuda", BF16, True), f"{HOPPER}, found 8.0"),
        (((10, 0), "cuda", BF16, True), f"{HOPPER}, found 10.0"),
        ((None, "cuda", BF16, True), f"{HOPPER}, none is visible"),
        (((9, 0), "cuda", BF16, False), "package triton 3.5 or later needed, not installed"),
        ((None, "mps", BF16, True), f"a CPU or {HOPPER}, got mps"),
        ((None, "cpu", torch.float32, True), "bfloat16 or float16 needed, got float32"),
        (((8, 9), "cuda", torch.float64, True),
         f"bfloat16 or float16 needed, got float64; {HOPPER}, found 8.9"),
    ],
)
def test_obstacles(arguments, message):
    assert fp16.obstacle(*arguments) == message


def test_what_rules_it_out_is_one_line(monkeypatch):
    cases.pretend(monkeypatch, (9, 0))
    monkeypatch.setattr(packages, "present", lambda module: False)
    said = (
        "attention mode 'fp16': bfloat16 or float16 needed, got float32; package triton 3.5 or "
        "later needed, not installed; head dimension 64 or 128 needed, got 96"
    )
    with pytest.raises(ValueError, match="needed") as raised:
        check_mode("fp16", torch.device("cuda"), dtype=torch.float32, head_dim=96)
    assert str(raised.value) == said
    with pytest.raises(ValueError, match=r"'fp16': bfloat16 or float16 needed, got float32$"):
        attention(*operands(), mode="fp16")
    assert not any("fp16" in names for names in modes.AUTO.values())


def test_a_missing_module_is_no_error():
    assert not packages.present("no_such_package.at_all")
    assert packages.present("json.decoder")


# -- layouts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("broken", [cases.misaligned, cases.strided, "pitch"])
def test_contig_safe_supplies_the_layout(which, broken):
    def function(*parts):
        parts, x = list(parts), parts[which]
        if broken == "pitch":
            parts[which] = nn.functional.pad(x, (0, 1))[..., :64]
        else:
            parts[which] = broken(x)
        return op(*parts, None, BF16)

    parts = halves()
    said = "must be unit-stride" if broken is cases.strided else "is misaligned: its address and"
    with pytest.raises(ValueError, match=f"'fp16': .*{NAMES[which]} {said}") as raised:
        function(*parts)
    assert "\n" not in str(raised.value)
    compiled = torch.compile(
        function, backend="contig_safe", fullgraph=True, options={"inner": "aot_eager"}
    )
    assert torch.equal(compiled(*parts), op(*parts, None, BF16))
    (fix,) = contig_pass.last_reports()[-1].fixes
    assert (fix.op.split(".")[0], fix.operand) == ("wan_models::fp16_attention", NAMES[which])


@pytest.mark.parametrize(("layout", "fixes"), [(cases.misaligned, 2), (cases.fused_chunk, 0)])
def test_the_mode_reads_fp16_keys_and_values_where_they_lie(layout, fixes):
    """Not q, which it multiplies and so has anew."""
    parts = operands(dtype=HALF)
    compiled = torch.compile(
        lambda *parts: attention(*map(layout, parts), mode="fp16"),
        backend="contig_safe", fullgraph=True, options={"inner": "aot_eager"},
    )
    assert torch.equal(compiled(*parts), fp16.run(*parts, None))
    report = contig_pass.last_reports()[-1]
    assert sorted(fix.operand for fix in report.fixes) == ["k", "v"][:fixes]


def test_check_vectors():
    """A dimension of one element has no pitch, an expanded one that of 0."""
    x = torch.zeros(4096, dtype=HALF)
    for shape, stride, at in (
        ((1, 4, 1, 64), (3, 64, 5, 1), 0), ((2, 4, 2, 64), (0, 128, 64, 1), 8),
        ((0, 4, 2, 64), (3, 5, 7, 1), 1), ((1, 1, 1, 64), (9, 9, 9, 1), 16),
    ):
        check_vectors("fp16", q=x.as_strided(shape, stride, at))
    for stride, at in (((512, 128, 64, 1), 4), ((512, 128, 68, 1), 0), ((512, 130, 64, 1), 0)):
        off = x.as_strided((2, 4, 2, 64), stride, at)
        with pytest.raises(ValueError, match=r"k is misaligned: .* of 2 bytes$") as raised:
            check_vectors("fp16", q=x.view(2, 4, 8, 64), k=off)
        assert str(off.data_ptr()) in str(raised.value)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("layout", [cases.offset, cases.head_major, cases.padded_slice])
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_opcheck(layout, dtype):
    parts = [layout(x) for x in halves()]
    for keys in (9, 0):
        for lens in (None, torch.tensor([9, 0])):
            q, k, v = parts[0], parts[1][:, :keys], parts[2][:, :keys]
            opcheck(torch.ops.wan_models.fp16_attention.default, (q, k, v, lens, dtype))
