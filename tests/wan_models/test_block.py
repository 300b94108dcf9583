"""The block against diffusers' block, its rotary tables, sizes and layouts."""

import pytest
import torch

from wan_models import (
    CONFIGS,
    TINY,
    WanBlock,
    WanConfig,
    block_inputs,
    quantize_,
    rope_table,
    token_grid,
)
from wan_models.attention import attention
from wan_models.attention.kernels import check_mode
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


def random_block() -> WanBlock:
    """Weights at which every part of the block moves the result; norms keep q and k large enough
    for the softmax to be far from uniform."""
    torch.manual_seed(0)
    block = WanBlock(TINY).eval()
    for name, parameter in block.named_parameters():
        if "norm" in name and name.endswith("weight"):
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
        elif name == "modulation":
            torch.nn.init.normal_(parameter, std=0.5)
        else:
            torch.nn.init.normal_(parameter, std=0.05)
    return block


def wrong_modulation() -> tuple[torch.Tensor, ...]:
    x, e0, context, rope = block_inputs(TINY, (1, 2, 2))
    return x, e0[:, :5], context, rope


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("column_major", [False, True])
def test_block_equals_diffusers(batch, column_major):
    block = random_block()
    x, e0, context, rope = block_inputs(
        TINY, (3, 4, 5), batch=batch, column_major=column_major
    )
    with torch.no_grad():
        ours = block(x, e0, context, rope)
        theirs = diffusers_block(block, TINY)(x, context, e0, diffusers_rope(rope))
    assert relative_error(ours, theirs) < 1e-4
    assert relative_error(ours - x, theirs - x) < 1e-4  # of the update, not only of the sum


def test_the_comparison_feels_every_part():
    """The tolerance above would not hide a wrong rotary table, name mapping or modulation order."""
    block = random_block()
    x, e0, context, rope = block_inputs(TINY, (3, 4, 5))
    with torch.no_grad():
        right = block(x, e0, context, rope)
        wrong = {
            "rotary": block(x, e0, context, rope_table((3, 5, 4), 128)),
            "modulation": block(x, e0.flip(1), context, rope),
            "context": block(x, e0, context.flip(0, -1), rope),
        }
        for name in ("self_attn.norm_q.weight", "cross_attn.norm_k.weight", "ffn.0.bias"):
            changed = random_block()
            changed.get_parameter(name).mul_(1.2)
            wrong[name] = changed(x, e0, context, rope)
    for name, result in wrong.items():
        assert relative_error(result - x, right - x) > 1e-3, name


def test_per_token_modulation_equals_diffusers():
    block = random_block()
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


def test_tiny_has_the_structure_of_the_large_models():
    with torch.device("meta"):
        tiny, large = WanBlock(TINY), WanBlock(CONFIGS["t2v-14b"])
    assert [n for n, _ in tiny.named_parameters()] == [n for n, _ in large.named_parameters()]
    assert TINY.head_dim == CONFIGS["t2v-14b"].head_dim == 128
    linears = [m for m in tiny.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linears) == 10
    assert all(m.in_features % 16 == m.out_features % 16 == 0 for m in linears)


def test_full_size_block_runs_on_the_meta_device():
    config = CONFIGS["ti2v-5b"]
    with torch.device("meta"):
        block = WanBlock(config).bfloat16()
    inputs = block_inputs(config, (31, 22, 40), dtype=torch.bfloat16, device="meta")
    out = block(*inputs)
    assert out.shape == (1, 27_280, 3072)
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("column_major", [False, True])
def test_inputs_are_repeatable_and_laid_out_as_asked(column_major):
    one, same, other = (
        block_inputs(TINY, (2, 3, 4), batch=2, seed=seed, column_major=column_major)
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one.x, other.x)
    rows, columns = 24, TINY.dim
    expected = (rows * columns, 1, rows) if column_major else (rows * columns, columns, 1)
    assert one.x.stride() == expected
    assert one.e0.dtype == one.rope.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_token", [False, True])
def test_block_compiles_in_one_graph_to_the_same_values(dtype, per_token):
    torch.manual_seed(0)
    block = WanBlock(TINY).to(dtype).eval()
    x, e0, context, rope = block_inputs(TINY, (2, 3, 4), batch=2, dtype=dtype)
    if per_token:
        e0 = e0[:, None] * torch.linspace(0.5, 2, 24)[:, None, None]
    arguments = (x, e0, context, rope, torch.tensor([24, 18]))
    with torch.no_grad():
        compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(*arguments), block(*arguments))


@pytest.mark.parametrize("recipe", [None, "fp8_e4m3fn_rowwise_fast", "fp4_scaled_fast"])
@pytest.mark.parametrize("mode", ["sdpa", "fp8"])
def test_no_float_is_an_input_of_a_block_for_any_resolution(recipe, mode):
    """It would turn out to be a number after all, and have everything traced again."""
    torch._dynamo.reset()
    block = WanBlock(TINY).bfloat16().eval().requires_grad_(False)
    block.self_attn.mode = mode
    if recipe:
        quantize_(block, recipe)
    found = []

    def backend(graph, inputs):
        values = [n.meta.get("example_value") for n in graph.graph.find_nodes(op="placeholder")]
        # Dynamo hands floats over as tensors of one fp64 number.
        found.append([getattr(value, "dtype", type(value)) for value in values])
        return graph

    inputs = block_inputs(TINY, (2, 3, 4), dtype=torch.bfloat16)
    with torch.no_grad():
        torch.compile(block, backend=backend, fullgraph=True, dynamic=True)(*inputs)
    (kinds,) = found
    assert torch.SymInt in kinds
    assert torch.float64 not in kinds


class Fixed(torch.nn.Module):
    """Returns one tensor and keeps what it was called with."""

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.value = value
        self.q = self.k = self.v = None  # no reader of it takes quantised rows

    def __getitem__(self, index: int) -> None:
        return None

    def forward(self, x: torch.Tensor, *_: object) -> torch.Tensor:
        self.got = x
        return self.value


def test_modulation_and_residual_sums_of_a_bf16_block_are_fp32():
    torch.manual_seed(0)
    block = WanBlock(TINY).bfloat16().eval()
    x, e0, context, rope = block_inputs(TINY, (3, 4, 5), dtype=torch.bfloat16)
    block.self_attn, block.ffn = Fixed(torch.randn_like(x)), Fixed(torch.zeros_like(x))
    block.cross_attn = Fixed(torch.zeros_like(x))
    shift, scale, gate = (block.modulation.float() + e0)[:, :3, None].unbind(1)
    with torch.no_grad():
        out = block(x, e0, context, rope)
        normed = torch.nn.functional.layer_norm(x.float(), (TINY.dim,), eps=TINY.eps).bfloat16()
    attended = block.self_attn.value
    assert torch.equal(block.self_attn.got, (normed.float() * (1 + scale) + shift).bfloat16())
    assert torch.equal(out, (x.float() + attended.float() * gate).bfloat16())
    assert not torch.equal(out, x + attended * gate.bfloat16())


def test_padding_tokens_do_not_reach_valid_ones():
    torch.manual_seed(0)
    block = WanBlock(TINY).eval()
    x, e0, context, rope = block_inputs(TINY, (2, 3, 4))
    padded = torch.cat([x, torch.full((1, 8, TINY.dim), 3.0)], dim=1)
    with torch.no_grad():
        alone = block(x, e0, context, rope)
        among = block(padded, e0, context, rope, torch.tensor([24]))
    torch.testing.assert_close(among[:, :24], alone, rtol=1e-4, atol=1e-5)


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
        ((81, 480, 480), (4, 8, 8), 18_900),
        ((81, 640, 640), (4, 8, 8), 33_600),
        ((121, 704, 1280), (4, 16, 16), 27_280),
    ],
)
def test_token_counts(video, stride, tokens):
    t, h, w = token_grid(*video, vae_stride=stride)
    assert t * h * w == tokens


@pytest.mark.parametrize("mode", ["sdpa", "sdpa_flash", "sdpa_math"])
@pytest.mark.parametrize("masked", [False, True])
def test_modes_give_the_softmax_of_the_definition(mode, masked):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 7, 2, 16), torch.randn(2, 9, 2, 16), torch.randn(2, 9, 2, 16)
    lengths = torch.tensor([9, 4])
    scores = torch.einsum("blhd,bshd->bhls", q, k) / 4
    if masked:
        scores = scores.masked_fill(torch.arange(9) >= lengths[:, None, None, None], -torch.inf)
    expected = torch.einsum("bhls,bshd->blhd", scores.softmax(-1), v)
    out = attention(q, k, v, mode=mode, k_lens=lengths if masked else None)
    torch.testing.assert_close(out, expected)


def test_a_mode_restricts_the_backend():
    def math_only(q: torch.Tensor) -> torch.Tensor:
        return attention(q, q, q, mode="sdpa_math")

    # The backends leave different layouts: head-major from math, the query's own from flash.
    q = torch.randn(1, 6, 2, 16)
    assert math_only(q).stride() == (192, 16, 96, 1)
    assert attention(q, q, q, mode="sdpa_flash").stride() == (192, 32, 16, 1)
    compiled = torch.compile(math_only, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(q), math_only(q))


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
        (lambda q: attention(q, q, q, mode="sdpa_efficient"), "needs a CUDA device"),
        (lambda q: attention(q[0], q[0], q[0]), r"takes \(B, L, H, D\): got 3"),
        (lambda q: attention(q, q[:, :, :1], q[:, :, :1]), "must share B, H and D"),
        (lambda q: attention(q, q, q, k_lens=torch.tensor([4, 4])), "one length for each of 1"),
        (
            lambda q: check_mode("sdpa_cudnn", torch.device("cuda"), dtype=torch.float32),
            "needs bfloat16 or float16",
        ),
        (lambda q: apply_rope(q, rope_table((1, 1, 5), 16)), "for 5 tokens"),
        (lambda q: apply_rope(q, rope_table((1, 1, 4), 32)), "head dimension 32, got 4 tokens"),
        (lambda q: WanBlock(TINY)(*wrong_modulation()), r"e0 has shape \(1, 5, 256\)"),
        (lambda q: WanConfig(dim=10, ffn_dim=16, num_heads=0, num_layers=1), "num_heads=0"),
        (lambda q: WanConfig(dim=10, ffn_dim=16, num_heads=2, num_layers=1), "must be even"),
        (lambda q: WanConfig(dim=8, ffn_dim=16, num_heads=2, num_layers=1, eps=0), "eps=0"),
        (
            lambda q: WanConfig(dim=8, ffn_dim=16, num_heads=2, num_layers=1, patch_size=(1, 0, 2)),
            "patch_size",
        ),
        (lambda q: token_grid(-3, 480, 832), "frames=-3"),
        (lambda q: token_grid(81, 0, 832), "height=0"),
        (lambda q: WanConfig(dim=10, ffn_dim=16, num_heads=3, num_layers=1), "not a multiple"),
        (lambda q: token_grid(80, 480, 832), "frames=80"),
        (lambda q: token_grid(81, 481, 832), "height=481"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(1, 4, 2, 16))
