"""The block against diffusers' block, its rotary tables, sizes and layouts."""

import pytest
import torch

from wan_models import CONFIGS, TINY, WanBlock, WanConfig, block_inputs, rope_table, token_grid
from wan_models.attention import attention
from wan_models.layers import time_frequencies
from wan_models.rope import apply_rope, axis_widths

#: Our parameter names to those of diffusers' WanTransformerBlock.
DIFFUSERS_NAMES = {
    "modulation": "scale_shift_table",
    "norm3.": "norm2.",
    "self_attn.o.": "attn1.to_out.0.",
    "cross_attn.o.": "attn2.to_out.0.",
    "self_attn.norm_": "attn1.norm_",
    "cross_attn.norm_": "attn2.norm_",
    "self_attn.": "attn1.to_",
    "cross_attn.": "attn2.to_",
    "ffn.0.": "ffn.net.0.proj.",
    "ffn.2.": "ffn.net.2.",
}


def diffusers_name(name: str) -> str:
    for ours, theirs in DIFFUSERS_NAMES.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise KeyError(name)


def diffusers_block(block: WanBlock, config: WanConfig) -> torch.nn.Module:
    from diffusers.models.transformers.transformer_wan import WanTransformerBlock

    theirs = WanTransformerBlock(
        dim=config.dim, ffn_dim=config.ffn_dim, num_heads=config.num_heads,
        qk_norm="rms_norm_across_heads", cross_attn_norm=True, eps=config.eps,
    )
    theirs.load_state_dict({diffusers_name(n): t for n, t in block.state_dict().items()})
    return theirs


def diffusers_rope(table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Our (2, L, 1, D/2) table as the (1, L, 1, D) cosines and sines that diffusers reads."""
    cos, sin = (part.repeat_interleave(2, dim=-1).unsqueeze(0) for part in table)
    return cos, sin


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("column_major", [False, True])
def test_block_equals_diffusers(batch, column_major):
    torch.manual_seed(0)
    block = WanBlock(TINY).eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    x, e0, context, rope = block_inputs(
        TINY, (3, 4, 5), batch=batch, column_major=column_major
    )
    with torch.no_grad():
        ours = block(x, e0, context, rope)
        theirs = diffusers_block(block, TINY)(x, context, e0, diffusers_rope(rope))
    assert relative_error(ours, theirs) < 1e-4
    assert relative_error(ours - x, theirs - x) < 1e-4  # of the update, not only of the sum


def test_per_token_modulation_equals_diffusers():
    torch.manual_seed(0)
    block = WanBlock(TINY).eval()
    x, _, context, rope = block_inputs(TINY, (3, 4, 5), batch=2)
    e0 = torch.randn(2, 60, 6, TINY.dim) * 0.1
    with torch.no_grad():
        ours = block(x, e0, context, rope)
        theirs = diffusers_block(block, TINY)(x, context, e0, diffusers_rope(rope))
        same = block(x, e0[:, :1].expand(-1, 60, -1, -1), context, rope)
        scalar = block(x, e0[:, 0], context, rope)
    assert relative_error(ours, theirs) < 1e-4
    torch.testing.assert_close(same, scalar)


@pytest.mark.parametrize(
    ("name", "millions"), [("t2v-1.3b", 46.4), ("t2v-14b", 351.4), ("ti2v-5b", 163.7)]
)
def test_block_parameter_counts(name, millions):
    with torch.device("meta"):
        block = WanBlock(CONFIGS[name])
    assert sum(p.numel() for p in block.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    assert len(list(block.parameters())) == 27


@pytest.mark.parametrize(
    ("head_dim", "widths"),
    [(128, (44, 42, 42)), (64, (24, 20, 20)), (96, (32, 32, 32))],
)
def test_rotary_axis_widths(head_dim, widths):
    assert axis_widths(head_dim) == widths


def test_rotary_table_angles():
    table = rope_table((2, 3, 4), 128)
    assert table.shape == (2, 24, 1, 64)
    t, r, c = 1, 2, 3
    row = table[:, (t * 3 + r) * 4 + c, 0]
    angles = torch.cat([
        t * 10000.0 ** (-2 * torch.arange(22, dtype=torch.float64) / 44),
        r * 10000.0 ** (-2 * torch.arange(21, dtype=torch.float64) / 42),
        c * 10000.0 ** (-2 * torch.arange(21, dtype=torch.float64) / 42),
    ])
    torch.testing.assert_close(row[0].double(), angles.cos(), atol=1e-7, rtol=0)
    torch.testing.assert_close(row[1].double(), angles.sin(), atol=1e-7, rtol=0)


def test_rotary_turns_pairs_as_complex_numbers():
    table = rope_table((2, 2, 3), 16)
    x = torch.randn(2, 14, 3, 16)  # two tokens of padding
    turned = apply_rope(x, table)
    angles = torch.complex(table[0], table[1])
    expected = torch.view_as_complex(x[:, :12].unflatten(-1, (-1, 2))) * angles
    torch.testing.assert_close(turned[:, :12], torch.view_as_real(expected).flatten(-2))
    assert torch.equal(turned[:, 12:], x[:, 12:])
    assert turned.is_contiguous()


def test_time_frequencies_of_zero():
    embedded = time_frequencies(torch.zeros(3), 256)
    assert torch.equal(embedded[:, :128], torch.ones(3, 128))
    assert torch.equal(embedded[:, 128:], torch.zeros(3, 128))


@pytest.mark.parametrize(
    ("video", "stride", "tokens"),
    [
        ((81, 480, 832), (4, 8, 8), 32_760),
        ((81, 720, 1280), (4, 8, 8), 75_600),
        ((121, 704, 1280), (4, 16, 16), 27_280),
    ],
)
def test_token_counts(video, stride, tokens):
    t, h, w = token_grid(*video, vae_stride=stride)
    assert t * h * w == tokens


def test_padded_keys_are_masked():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 7, 2, 16) for _ in range(3))
    out = attention(q, k, v, k_lens=torch.tensor([7, 4]))
    torch.testing.assert_close(out[1:], attention(q[1:], k[1:, :4], v[1:, :4]))
    torch.testing.assert_close(out[:1], attention(q[:1], k[:1], v[:1]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q: attention(q, q, q, mode="flash"), "attention mode 'flash'"),
        (lambda q: attention(q, q, q, mode="sdpa_cudnn"), "needs a CUDA device"),
        (lambda q: WanConfig(dim=10, ffn_dim=16, num_heads=3, num_layers=1), "not a multiple"),
        (lambda q: token_grid(80, 480, 832), "frames=80"),
        (lambda q: token_grid(81, 481, 832), "height=481"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(1, 4, 2, 16))
