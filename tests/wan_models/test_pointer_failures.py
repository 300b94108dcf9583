"""Layout failure 7 of ``test_layout_failures.py``: pointers off 16 bytes.

Slabs that a loader maps without copying, and channels split where 16 bytes do not end.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import contig_pass
from benchmarks.faults import recording as faults
from tests.wan_models import attention_reference as ref
from tests.wan_models import failures, scenarios
from tests.wan_models import scenario_checks as checks
from tests.wan_models.failures import RECIPE, SELF, h100, near, plain, quantised, safe
from tests.wan_models.scenarios import BF16, DIM, FRAMES, HEADS, TEXT, TOKENS, bf16
from wan_models.attention import CrossConditions, WanCrossAttention, WanSelfAttention
from wan_models.layers import WanLayerNorm
from wan_models.quant import SlabLinear, fp8, quantize_
from wan_models.quant import slab as slabs
from wan_models.recorder import recording

kernel_folder, kept_kernels = failures.kernel_folder, failures.kept_kernels

#: Where a zero-copy loader may leave the pieces of a layer.
SLABS = {
    "q": {"bias_gap": 2}, "k": {"weight_offset": 1}, "v": {"row_padding": 3},
    "o": {"weight_offset": 8, "bias_gap": 8},
}
#: Of q, k, v and o in turn; sorted, since which projection comes first is the layer's own matter.
OBJECTIONS = sorted([
    f"bias ({DIM},) at 2 mod 16",
    f"b ({DIM}, {DIM}) at 1 mod 16",
    f"b ({DIM}, {DIM}) with strides (1, {DIM + 3})",
    f"b ({DIM}, {DIM}) at 8 mod 16",
    f"bias ({DIM},) at 8 mod 16",
])


def with_contiguous(x, weight, weight_scale, input_scale, bias, **options):
    """The usual remedy, which moves nothing that is dense where it lies."""
    return fp8.fp8_linear(
        x.contiguous(), weight, weight_scale, input_scale, bias.contiguous(), **options
    )


def test_7_a_weight_and_a_bias_off_16_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    attn, inputs = scenarios.randomise(WanSelfAttention(DIM, HEADS)).to(BF16), SELF.inputs(2)
    aligned = quantised(WanSelfAttention(DIM, HEADS))
    for name, layout in SLABS.items():
        layer = SlabLinear.from_linear(attn.get_submodule(name), RECIPE, **layout)
        setattr(attn, name, layer)
    with recording() as received:
        expected = attn(*inputs)
        assert torch.equal(expected, aligned(*inputs))
        assert sorted(checks.objections(received)) == OBJECTIONS
        received.clear()
        monkeypatch.setattr(slabs, "fp8_linear", with_contiguous)
        attn(*inputs)
        assert sorted(checks.objections(received)) == OBJECTIONS
        monkeypatch.undo()
    compiled = plain(attn)
    with recording() as received:
        assert near(compiled(*inputs), expected)
        assert sorted(checks.objections(received)) == OBJECTIONS
    for run in (attn, compiled):
        with h100(), pytest.raises(RuntimeError, match="CUBLAS_STATUS_NOT_SUPPORTED"):
            run(*inputs)
    torch._dynamo.reset()
    compiled = safe(attn)
    with recording() as received:
        out = compiled(*inputs)
        assert len(received) == 12
        assert checks.objections(received) == []
    with h100():
        assert torch.equal(compiled(*inputs), out)
    assert near(out, expected)
    rows = contig_pass.last_reports()[-1].fixes
    assert sorted((row.parameter, row.operand) for row in rows) == [
        ("k.slab", "mat2"), ("o.slab", "bias"), ("o.slab", "mat2"), ("q.slab", "bias"),
        ("v.slab", "mat2"),
    ]


#: Channels of FantasyPortrait's features: head pose, eyes, emotion, mouth.
FEATURES = (6, 6, 30, 512)


class Portrait(nn.Module):
    """Its features to the adapter's tokens, one Linear for each kind, then the adapter.

    ``faults.rows`` stands for what reads 16 bytes at a time: it doubles what it reads, and from
    an address off 16 bytes reads something else, without an error.
    """

    def __init__(self) -> None:
        super().__init__()
        self.to_token = nn.ModuleList(nn.Linear(width, 64) for width in FEATURES)
        self.norm = WanLayerNorm(64, affine=True)
        self.cross_attn = WanCrossAttention(DIM, HEADS)
        self.cross_attn.attach_adapter(64)

    def forward(
        self, x: torch.Tensor, context: torch.Tensor, features: torch.Tensor
    ) -> torch.Tensor:
        parts = features.split(FEATURES, dim=-1)
        tokens = [
            layer(torch.ops.faults.rows(part).to(x.dtype))
            for layer, part in zip(self.to_token, parts, strict=True)
        ]
        adapter = self.norm(torch.stack(tokens, dim=2))
        return self.cross_attn(x, context, CrossConditions(adapter=adapter))

    def expected(self, *inputs: torch.Tensor) -> torch.Tensor:
        """In float64, of an exact twin."""
        x, context, features = scenarios.wide(inputs)
        tokens, start = [], 0
        for layer, width in zip(self.to_token, FEATURES, strict=True):
            tokens.append(ref.linear(layer, 2 * features[..., start : start + width]))
            start += width
        adapter = ref.layer_norm(self.norm, torch.stack(tokens, dim=2))
        attn = self.cross_attn
        q = scenarios.query(attn, x)
        out = ref.softmax_attention(q, *scenarios.key_value(attn, context)).flatten(2)
        names = ("ip_adapter_single_stream_k_proj", "ip_adapter_single_stream_v_proj")
        out = out + scenarios.side_branch(q, adapter, *map(attn.get_submodule, names))
        return ref.linear(attn.o, out)


def test_7_channels_split_off_16_bytes() -> None:
    model = scenarios.randomise(Portrait()).to(BF16)
    quantize_(model.cross_attn, RECIPE)
    inputs = (
        bf16(2, TOKENS, DIM, seed=1), bf16(2, TEXT, DIM, seed=2),
        bf16(2, FRAMES, sum(FEATURES), seed=3),
    )
    assert [part.data_ptr() - inputs[2].data_ptr() for part in inputs[2].split(FEATURES, -1)] == [
        0, 12, 24, 84
    ]
    right = scenarios.exact(model).expected(*inputs)
    pitch = (FRAMES * 554, 554, 1)
    assert pitch[1] * BF16.itemsize == 1108
    for run in (model, plain(model)):
        faults.forget()
        with recording():
            assert checks.error(run(*inputs), right) > 0.2
        seen = [(strides, address) for _, _, _, strides, address in faults.received]
        assert seen == [(pitch, 0), (pitch, 12), (pitch, 8), (pitch, 4)]
    torch._dynamo.reset()
    faults.forget()
    with recording() as received:
        assert checks.error(safe(model)(*inputs), right) < checks.tolerance(RECIPE)
        assert checks.objections(received) == []
    assert [address for *_, address in faults.received] == [0, 0, 0, 0]
    rows = contig_pass.last_reports()[-1].fixes
    assert [(row.op, row.before.offset, row.before.strides) for row in rows] == [
        ("faults::rows.default", offset, pitch) for offset in (12, 24, 84)
    ]


class Split(WanSelfAttention):
    """Attention to the first 44 channels of every head and to the other 84, each by itself.

    ``faults.cudnn`` stands for cuDNN's attention: from operands off 16 bytes, wrong values.
    """

    PARTS = (slice(0, 44), slice(44, 128))

    def attend(self, q, k, v, k_lens=None):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        parts = [
            torch.ops.faults.cudnn(q[..., part], k[..., part], v[..., part]) for part in self.PARTS
        ]
        return torch.cat(parts, dim=-1).transpose(1, 2)

    def expected(self, x: torch.Tensor) -> torch.Tensor:
        """In float64, of an exact twin."""
        k, v = scenarios.key_value(self, x)
        q, k = (ref.turn(t, scenarios.angles()) for t in (scenarios.query(self, x), k))
        parts = [
            ref.softmax_attention(q[..., part], k[..., part], v[..., part]) for part in self.PARTS
        ]
        return ref.linear(self.o, torch.cat(parts, dim=-1).flatten(2))


def test_7_a_rotary_split_off_16_bytes() -> None:
    attn, (x, rope) = quantised(Split(DIM, HEADS)), SELF.inputs(2)
    right = scenarios.exact(attn).expected(x.double())
    off = {}
    for name, run in {"eager": attn, "inductor": plain(attn)}.items():
        faults.forget()
        with recording():
            assert checks.error(run(x, rope), right) > 0.5  # and no error is raised
        off[name] = [(operand, address) for _, operand, *_, address in faults.received if address]
    assert 44 * BF16.itemsize == 88
    assert off["eager"] == [("q", 8), ("k", 8), ("v", 8)]
    assert ("v", 8) in off["inductor"]
    torch._dynamo.reset()
    faults.forget()
    with recording() as received:
        assert checks.error(safe(attn)(x, rope), right) < checks.tolerance(RECIPE)
        assert checks.objections(received) == []
    assert len(faults.received) == 6
    for _, _, _, strides, address in faults.received:
        assert address == 0
        assert strides[-1] == 1
        assert all(stride * BF16.itemsize % 16 == 0 for stride in strides[:-1])
