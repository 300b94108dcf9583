"""Layout failures that real Wan programs have met: broken without contig_safe, right under it.

Each is shown on a Wan class with quantised linears. Broken means what it meant to its users: a
wrong value, an error text, or an operand that an H100's kernel refuses, seen as it is called.
Pointers off 16 bytes, the seventh, are in ``test_pointer_failures.py``; those that are no matter of
operands' memory in ``test_other_failures.py``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import contig_pass
from benchmarks.faults import emulate
from contig_pass.errors import LayoutViolation
from tests.wan_models import attention_cases as cases
from tests.wan_models import attention_reference as ref
from tests.wan_models import failures, scenarios
from tests.wan_models import scenario_checks as checks
from tests.wan_models.failures import RECIPE, SELF, h100, near, plain, quantised, safe
from tests.wan_models.scenarios import (
    BF16,
    DIM,
    FRAME,
    FRAMES,
    GRID,
    HEADS,
    TEXT,
    TOKENS,
    bf16,
)
from wan_models import TINY, block_inputs
from wan_models.attention import (
    CrossConditions,
    SingleStreamAttention,
    WanCrossAttention,
    WanSelfAttention,
    base,
)
from wan_models.embeddings import PatchEmbedding
from wan_models.quant import fp8
from wan_models.recorder import recording
from wan_models.vace import VaceBlock

kernel_folder, kept_kernels = failures.kernel_folder, failures.kept_kernels


# -- 1: a fake that promises other strides -------------------------------------------------------


@torch.library.custom_op("layout_failures::attention_hnd", mutates_args=())
def attention_hnd(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention over (B, H, L, D) whose result is dense, whatever the strides of q are."""
    out = cases.exact(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    return out.to(q.dtype).contiguous()


@attention_hnd.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return q.clone()  # as public wrappers of SageAttention have it: in q's own order


class HeadMajor(WanSelfAttention):
    """Self-attention by that op."""

    def attend(self, q, k, v, k_lens=None):
        return attention_hnd(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def test_1_a_fake_that_promises_other_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    attn, inputs = quantised(HeadMajor(DIM, HEADS)), SELF.inputs(2)
    q = bf16(2, 3, HEADS, 8, seed=1).transpose(1, 2)
    if torch.__version__ >= "2.13":  # before, it does not look at strides
        with pytest.raises(Exception, match=r"[Ss]tride"):
            torch.library.opcheck(attention_hnd, (q, q, q), test_utils="test_faketensor")
    with recording():
        expected = attn(*inputs)
        checks.assert_values(SELF, attn, inputs, (expected,), RECIPE)  # eager hides it
        with pytest.raises(AssertionError, match=r"stride 1536==128(?s:.*)attention_hnd"):
            plain(attn)(*inputs)
        with torch._inductor.config.patch(size_asserts=False):
            torch._dynamo.reset()
            assert checks.error(plain(attn)(*inputs), expected.double()) > 0.5  # no error at all
            torch._dynamo.reset()
            said = r"layout_failures::attention_hnd\.default returned another layout than its fake"
            with pytest.raises(LayoutViolation, match=said) as caught:
                safe(attn, policy="strict")(*inputs)
        assert "\n" not in str(caught.value)

    # The dispatcher's own op for such a kernel says what its result looks like.
    cases.install(monkeypatch, cases.sageattn3())
    cases.pretend_for(monkeypatch, "sageattn_3")
    torch._dynamo.reset()
    attn = quantised(WanSelfAttention(DIM, HEADS, mode="sageattn_3"))
    with recording() as received:
        out = safe(attn, policy="strict")(*inputs)
        assert {one.weight for one in received} == set(checks.fast_layers(attn))
        assert checks.objections(received) == []
        assert near(out, attn(*inputs))
    checks.assert_values(SELF, attn, inputs, (out,), RECIPE)


# -- 2: ``view`` on a slice of the tokens ---------------------------------------------------------


PREFIX = 2


def viewed_frames(x: torch.Tensor, frames: int) -> torch.Tensor:
    """(B, T*S, ...) to (B*T, S, ...) as the public wrapper does it."""
    return x.view(x.shape[0] * frames, x.shape[1] // frames, *x.shape[2:])


def viewed_query(self: SingleStreamAttention, x: torch.Tensor) -> torch.Tensor:
    """The query of MultiTalk's audio attention as the public wrapper makes it, frame by frame."""
    q = self.q_linear(viewed_frames(x, FRAMES))
    return q.unflatten(-1, (HEADS, -1)).unflatten(0, (len(x), FRAMES)).flatten(1, 2)


def portrait(batch: int) -> tuple[nn.Module, tuple]:
    """FantasyPortrait's adapter, on the tokens of the first frames."""
    attn = WanCrossAttention(DIM, HEADS)
    attn.attach_adapter(64)
    given = CrossConditions(
        adapter=bf16(batch, PREFIX, 5, 64, seed=4), adapter_tokens=PREFIX * FRAME
    ).as_tensors()
    inputs = (bf16(batch, TOKENS, DIM, seed=1), bf16(batch, TEXT, DIM, seed=2), given)
    return quantised(attn), inputs


def speech(batch: int) -> tuple[nn.Module, tuple]:
    """MultiTalk's audio attention, with a last frame that has no audio."""
    attn = SingleStreamAttention(DIM, HEADS, audio_dim=64)
    audio = bf16(batch * FRAMES, 5, 64, seed=4)
    return quantised(attn), (bf16(batch, TOKENS + FRAME, DIM, seed=1), audio, GRID)


def expected_portrait(attn: nn.Module, inputs: tuple) -> torch.Tensor:
    attn, (x, context, given) = scenarios.exact(attn), scenarios.wide(inputs)
    q = scenarios.query(attn, x)
    out = ref.softmax_attention(q, *scenarios.key_value(attn, context)).flatten(2)
    out[:, : PREFIX * FRAME] += scenarios.side_branch(
        q[:, : PREFIX * FRAME], given.adapter,
        attn.ip_adapter_single_stream_k_proj, attn.ip_adapter_single_stream_v_proj,
    )
    return ref.linear(attn.o, out)


def expected_speech(attn: nn.Module, inputs: tuple) -> torch.Tensor:
    attn, (x, audio, _) = scenarios.exact(attn), scenarios.wide(inputs)
    q = scenarios.heads(ref.linear(attn.q_linear, x[:, :TOKENS]))
    both = ref.linear(attn.kv_linear, audio).unflatten(0, (len(x), FRAMES))
    k, v = scenarios.heads(both[..., :DIM]), scenarios.heads(both[..., DIM:])
    out = ref.linear(attn.proj, ref.per_frame_attention(q, k, v, FRAMES).flatten(2))
    return torch.cat([out, out.new_zeros(len(x), FRAME, DIM)], dim=1)


@pytest.mark.parametrize(
    ("build", "expected", "inner"),
    [(portrait, expected_portrait, "inductor"), (speech, expected_speech, "aot_eager")],
    ids=["adapter prefix", "frame without audio"],
)
def test_2_a_view_of_a_token_slice(
    monkeypatch: pytest.MonkeyPatch, build: Any, expected: Any, inner: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(base, "to_frames", viewed_frames)
        patch.setattr(SingleStreamAttention, "_query", viewed_query)
        attn, inputs = build(1)
        with recording():
            one = attn(*inputs)  # for one sample it is right
        assert checks.error(one, expected(attn, inputs)) < checks.tolerance(RECIPE)
        attn, inputs = build(2)
        said = r"view size is not compatible with input tensor|Cannot view a tensor with shape"
        with recording(), pytest.raises(RuntimeError, match=said):
            attn(*inputs)
        for compiled in (plain(attn), safe(attn)):  # raised while tracing, before any backend
            with pytest.raises(Exception, match=said):
                compiled(*inputs)
    torch._dynamo.reset()
    with recording() as received:
        out = safe(attn, inner=inner)(*inputs)
        assert {one.weight for one in received} == set(checks.fast_layers(attn))
        assert checks.objections(received) == []
    assert checks.error(out, expected(attn, inputs)) < checks.tolerance(RECIPE)


# -- 3: the stream that patchify leaves column-major ----------------------------------------------


class Control(nn.Module):
    """A control video, patchified, and the first VACE block, which projects it without a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.patchify = PatchEmbedding(8, DIM, (1, 2, 2))
        self.block = VaceBlock(TINY, first=True)

    def forward(self, video: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.block(self.patchify(video), *inputs)


def test_3_a_column_major_stream_meets_a_scaled_product() -> None:
    model = quantised(Control())
    x, e0, context, rope = block_inputs(TINY, GRID, dtype=BF16)
    frames, rows, columns = GRID
    video = bf16(1, 8, frames, 2 * rows, 2 * columns, seed=5)
    inputs = (video, x, e0, context[:, :TEXT], rope)
    stream = model.patchify(video)
    assert stream.stride()[1:] == (1, TOKENS)
    # The cast keeps the order, and no norm stands between.
    assert fp8.quantize(stream[0]).stride() == (1, TOKENS)
    with recording() as received:
        expected = model(*inputs)
        assert checks.objections(received) == [f"a ({TOKENS}, {DIM}) with strides (1, {TOKENS})"]
        (bad,) = (one for one in received if one.operand == "a" and one.strides == (1, TOKENS))
        assert checks.fast_layers(model)[bad.weight] == "block.before_proj"
        dense = model.block(stream.contiguous(), *inputs[1:])
    for one, other in zip(expected, dense, strict=True):
        assert torch.equal(one, other)
    with h100(), pytest.raises(RuntimeError, match=emulate.MAJOR):
        model(*inputs)
    with pytest.raises(Exception, match="mat_a must be row_major"):
        plain(model)(*inputs)
    torch._dynamo.reset()
    compiled = safe(model)
    with recording() as received:
        out = compiled(*inputs)
        assert {one.weight for one in received} == set(checks.fast_layers(model))
        assert checks.objections(received) == []
    with h100():
        accepted = compiled(*inputs)
    for one, other, third in zip(out, accepted, expected, strict=True):
        assert near(one, third)
        # Its sums differ, and their casts.
        assert checks.error(other, third.double()) < 0.02 + checks.COMPILED
    (row,) = contig_pass.last_reports()[-1].fixes
    assert (row.operand, row.module, row.order) == ("self", "block.before_proj", "row")
    assert (row.before.strides, row.after.strides) == ((1, TOKENS), (DIM, 1))
    assert row.fused  # the cast writes it so: nothing is copied


# -- 4: the transposed weight made contiguous -----------------------------------------------------


def contiguous_transposed(x, weight, weight_scale, input_scale, bias, *, input_scaled=False):
    """:func:`wan_models.quant.fp8.fp8_linear` with the contiguous() that cuBLASLt cannot take."""
    rows = fp8.quantize(x.reshape(-1, x.shape[-1]))
    out = torch._scaled_mm(
        rows, weight.t().contiguous(), scale_a=input_scale, scale_b=weight_scale, bias=bias,
        out_dtype=x.dtype,
    )
    return out.reshape(*x.shape[:-1], len(weight))


def test_4_a_transposed_weight_made_contiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    attn, inputs = quantised(WanSelfAttention(DIM, HEADS)), SELF.inputs(2)
    with recording():
        expected = attn(*inputs)
    monkeypatch.setattr(fp8, "fp8_linear", contiguous_transposed)
    with recording() as received:
        assert near(attn(*inputs), expected)  # the CPU takes it
        said = f"b ({DIM}, {DIM}) with strides ({DIM}, 1)"
        assert checks.objections(received) == [said] * 4
    with h100(), pytest.raises(RuntimeError, match=emulate.MAJOR):
        attn(*inputs)
    with pytest.raises(Exception, match="mat_b must be col_major"):
        plain(attn)(*inputs)
    torch._dynamo.reset()
    compiled = safe(attn)
    with recording() as received:
        out = compiled(*inputs)
        assert {one.weight for one in received} == set(checks.fast_layers(attn))
        assert checks.objections(received) == []
        assert {one.strides for one in received if one.operand == "b"} == {(1, DIM)}
    with h100():
        assert torch.equal(compiled(*inputs), out)
    assert near(out, expected)
    rows = contig_pass.last_reports()[-1].fixes
    assert [(row.module, row.operand, row.order) for row in rows] == [
        (layer, "mat2", "column") for layer in "qkvo"
    ]
