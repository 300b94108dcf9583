"""Cross-attention to text, audio, adapter and fusion, and its guidance, against float64."""

import pytest
import torch

from tests.wan_models import attention_reference as ref
from tests.wan_models.attention_reference import DIM, FRAME, FRAMES, GRID, HEADS, TOKENS, WIDTH
from wan_models.attention import CrossConditions, NagParams, WanCrossAttention, guide
from wan_models.rope import rope_table

calls = ref.calls

SIDE = 24  # width of audio and adapter states
AUDIO_A, ADAPTER_A, FUSION = 5, 7, 6
FUSION_GRID = (1, 2, 3)
TABLES = (rope_table(GRID, WIDTH), rope_table(FUSION_GRID, WIDTH))


def layer(kind: type[WanCrossAttention] = WanCrossAttention, **options) -> WanCrossAttention:
    attn = kind(DIM, HEADS, **options)
    attn.attach_audio(SIDE)
    attn.attach_adapter(SIDE)
    attn.attach_fusion()
    return ref.randomise(attn)


def video(batch: int) -> torch.Tensor:
    return ref.normal(batch, TOKENS, DIM, seed=1)


def text(batch: int) -> torch.Tensor:
    return ref.normal(batch, 9, DIM, seed=2)


def states(batch: int, tokens: int, per_frame: bool, seed: int) -> torch.Tensor:
    shape = (batch, FRAMES, tokens, SIDE) if per_frame else (batch, tokens, SIDE)
    return ref.normal(*shape, seed=seed)


def audio(batch: int, per_frame: bool) -> torch.Tensor:
    return states(batch, AUDIO_A, per_frame, seed=3)


def adapter(batch: int, per_frame: bool, frames: int = FRAMES) -> torch.Tensor:
    made = states(batch, ADAPTER_A, per_frame, seed=4)
    return made[:, :frames] if per_frame else made


def expected_side(q, side, to_k, to_v) -> torch.Tensor:
    k, v = ref.split(ref.linear(to_k, side)), ref.split(ref.linear(to_v, side))
    if side.dim() == 3:
        return ref.softmax_attention(q, k, v).flatten(2)
    return ref.per_frame_attention(q, k, v, side.shape[1]).flatten(2)


def expected_branches(attn, x, context, given: CrossConditions) -> torch.Tensor:
    """The sum of all branches but the image's, before the output projection."""
    q = ref.query(attn, x)
    out = ref.softmax_attention(q, *ref.key_value(attn, context)).flatten(2)
    if given.nag_context is not None:
        keys_values = ref.key_value(attn, given.nag_context)
        unwanted = ref.softmax_attention(q, *keys_values).flatten(2)
        out = ref.nag(out, unwanted, *given.nag)
    if given.audio is not None:
        side = expected_side(q, given.audio, attn.k_proj, attn.v_proj)
        out = out + float(given.audio_scale) * side
    if given.adapter is not None:
        n = given.adapter_tokens or x.shape[1]
        side = expected_side(
            q[:, :n], given.adapter,
            attn.ip_adapter_single_stream_k_proj, attn.ip_adapter_single_stream_v_proj,
        )
        out = out.clone()
        out[:, :n] += float(given.adapter_scale) * side
    if given.fusion is not None:
        target = ref.layer_norm(attn.pre_attn_norm_fusion, given.fusion)
        k = ref.split(ref.rms(attn.norm_k_fusion, ref.linear(attn.k_fusion, target)))
        v = ref.split(ref.linear(attn.v_fusion, target))
        if given.fusion_rope is not None:
            q, k = ref.turn(q, ref.grid_angles(GRID)), ref.turn(k, ref.grid_angles(FUSION_GRID))
        lens = None if given.fusion_lens is None else given.fusion_lens.tolist()
        out = out + ref.softmax_attention(q, k, v, lens).flatten(2)
    return out


def all_branches(batch: int) -> CrossConditions:
    return CrossConditions(
        audio=audio(batch, True), audio_scale=0.7, adapter=adapter(batch, True, 3),
        adapter_scale=-1.3, adapter_tokens=3 * FRAME, nag_context=text(batch)[:, 3:],
        nag=NagParams(4.0, 1.5, 0.4), fusion=ref.normal(batch, FUSION, DIM, seed=5),
        fusion_rope=TABLES, fusion_lens=torch.tensor([6, 2][:batch]),
    )


#: Every branch by itself, and all at once.
VARIANTS = {
    "text": lambda b: CrossConditions(),
    "audio 4-D": lambda b: CrossConditions(audio=audio(b, True), audio_scale=0.7, grid=GRID),
    "audio 3-D": lambda b: CrossConditions(audio=audio(b, False), audio_scale=torch.tensor(0.7)),
    "adapter 4-D": lambda b: CrossConditions(adapter=adapter(b, True), adapter_scale=1.4),
    "adapter 4-D, prefix": lambda b: CrossConditions(
        adapter=adapter(b, True, 3), adapter_tokens=3 * FRAME
    ),
    "adapter 3-D": lambda b: CrossConditions(adapter=adapter(b, False)),
    "adapter 3-D, prefix": lambda b: CrossConditions(
        adapter=adapter(b, False), adapter_tokens=17, adapter_scale=torch.tensor(-2.0)
    ),
    "fusion": lambda b: CrossConditions(fusion=ref.normal(b, FUSION, DIM, seed=5)),
    "fusion, rotary and lengths": lambda b: CrossConditions(
        fusion=ref.normal(b, FUSION, DIM, seed=5), fusion_rope=TABLES,
        fusion_lens=torch.tensor([6, 2][:b]),
    ),
    "nag": lambda b: CrossConditions(nag_context=text(b)[:, 4:], nag=NagParams(6.0, 1.7, 0.5)),
    "all": all_branches,
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_values(variant, batch):
    attn, x, context = layer(), video(batch), text(batch)
    given = VARIANTS[variant](batch)
    with torch.no_grad():
        out = attn(x, context, given)
        plain = attn(x, context)
        expected = ref.linear(attn.o, expected_branches(attn, x, context, given))
    ref.assert_near(out, expected)
    if variant != "text":
        assert (out - plain).norm() > 0.05 * plain.norm()  # the branch is felt


def test_no_conditions_is_text_alone():
    attn = ref.randomise(WanCrossAttention(DIM, HEADS))
    with torch.no_grad():
        out = attn(video(2), text(2))
        expected = expected_branches(attn, video(2), text(2), CrossConditions())
    ref.assert_near(out, ref.linear(attn.o, expected))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("per_frame", [True, False])
def test_the_adapter_touches_its_prefix_alone(per_frame, batch):
    attn, x, context = layer(), video(batch), text(batch)
    given = CrossConditions(adapter=adapter(batch, per_frame, 3), adapter_tokens=3 * FRAME)
    with torch.no_grad():
        plain, out = attn(x, context), attn(x, context, given)
    torch.testing.assert_close(out[:, 3 * FRAME :], plain[:, 3 * FRAME :])
    assert ((out - plain)[:, : 3 * FRAME].abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("batch", [1, 2])
def test_what_the_kernels_receive(calls, batch):
    attn = layer()
    with torch.no_grad():
        attn(video(batch), text(batch), all_branches(batch))
    wanted, unwanted, heard, adapted, fused = calls
    assert wanted.q is unwanted.q
    assert heard.q.shape == (batch * FRAMES, FRAME, HEADS, WIDTH)
    assert heard.k.shape == heard.v.shape == (batch * FRAMES, AUDIO_A, HEADS, WIDTH)
    assert heard.q.data_ptr() == wanted.q.data_ptr()  # a view by frames, no copy
    assert adapted.q.shape == (batch * 3, FRAME, HEADS, WIDTH)
    assert adapted.k.shape == (batch * 3, ADAPTER_A, HEADS, WIDTH)
    # The prefix of several samples is no dense block, so its frames are copied.
    assert (adapted.q.data_ptr() == wanted.q.data_ptr()) == (batch == 1)
    assert torch.equal(fused.options["k_lens"], torch.tensor([6, 2][:batch]))
    assert fused.options["mode"] == "sdpa"


def test_the_mode_reaches_every_branch(calls):
    attn = layer()
    attn.mode = "sdpa_math"
    with torch.no_grad():
        attn(video(2), text(2), all_branches(2))
    assert [call.options["mode"] for call in calls] == ["sdpa_math"] * 5


def test_scaled_sums_of_bf16_branches_are_fp32(monkeypatch):
    attn = layer().bfloat16()
    x, context = video(1).bfloat16(), text(1).bfloat16()
    given = CrossConditions(
        audio=audio(1, False).bfloat16(), audio_scale=torch.tensor(1 + 2**-9)
    )
    with torch.no_grad():
        q = attn.query(x)
        base = attn.text(q, context, given)
        side = attn._side("audio", q, given.audio, attn.k_proj, attn.v_proj, None)
        out = attn.add_branches(base, q, given)
    assert torch.equal(out, (base.float() + side.float() * (1 + 2**-9)).bfloat16())
    assert not torch.equal(out, base + side)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiles(variant, batch):
    ref.assert_compiles(layer(), video(batch), text(batch), VARIANTS[variant](batch))


def test_changing_a_strength_recompiles_nothing():
    attn, x, context = layer(), video(2), text(2)
    run = ref.compiled(attn)
    for strength in (0.5, 2.0, 3.25):
        given = all_branches(2)._replace(
            audio_scale=strength, adapter_scale=-strength, nag=NagParams(1 + strength, 1.5, 0.4)
        )
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=(strength > 0.5)):
            out = run(x, context, given.as_tensors())
            torch.testing.assert_close(out, attn(x, context, given))


def test_a_second_resolution_recompiles_nothing():
    attn = layer()
    run = ref.compiled(attn, dynamic=True)
    for frame in (FRAME, 14):
        x = ref.normal(2, FRAMES * frame, DIM, seed=1)
        given = CrossConditions(
            audio=audio(2, True), adapter=adapter(2, True), grid=(FRAMES, 2, frame // 2)
        ).as_tensors()
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=(frame > FRAME)):
            torch.testing.assert_close(run(x, text(2), given), attn(x, text(2), given))


def test_attached_layers_have_the_names_and_sizes_of_checkpoints():
    with torch.device("meta"):
        attn = WanCrossAttention(5120, 40).bfloat16()
        attn.attach_audio()
        attn.attach_adapter()
        attn.attach_fusion()
    names = {name: (tuple(p.shape), p.dtype, p.device.type) for name, p in attn.named_parameters()}
    adapter = "ip_adapter_single_stream_"
    for name in ("k_proj", "v_proj", f"{adapter}k_proj", f"{adapter}v_proj"):
        assert names[f"{name}.weight"] == ((5120, 2048), torch.bfloat16, "meta")
        assert f"{name}.bias" not in names
    for name in ("k_fusion", "v_fusion"):
        assert names[f"{name}.weight"][0] == (5120, 5120)
        assert names[f"{name}.bias"][0] == (5120,)
    assert names["pre_attn_norm_fusion.bias"] == ((5120,), torch.bfloat16, "meta")
    assert names["norm_k_fusion.weight"][0] == (5120,)


@pytest.mark.parametrize("zero", ["unwanted", "none"])
def test_guidance_fixtures(zero):
    z = ref.normal(2, 5, DIM, seed=1)
    if zero == "none":  # nothing to be guided away from: the same result for every alpha
        for alpha in (0.0, 0.25, 1.0):
            torch.testing.assert_close(guide(z, z, NagParams(alpha=alpha)), z)
    else:  # grows elevenfold, is cut to 2.5, a quarter of which is blended in
        torch.testing.assert_close(guide(z, torch.zeros_like(z)), 1.375 * z, rtol=1e-5, atol=1e-6)


def test_guidance_of_rows_without_a_norm():
    """0/0 counts as too large, and gives 0; so does anything over 0."""
    zero, other = torch.zeros(1, 2, DIM), ref.normal(1, 2, DIM, seed=1)
    assert torch.equal(guide(zero, zero), zero)
    assert torch.equal(guide(zero, other), zero)


def test_guidance_below_the_limit_is_not_cut():
    z, other = ref.normal(1, 6, DIM, seed=1), ref.normal(1, 6, DIM, seed=2)
    params = NagParams(1.2, 2.5, 0.5)
    expected = 0.5 * (1.2 * z.double() - 0.2 * other.double()) + 0.5 * z.double()
    ref.assert_near(guide(z, other, params), expected)
    ref.assert_near(guide(z, other, params), ref.nag(z.double(), other.double(), *params))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (CrossConditions(audio=torch.ones(1, 4, 5, SIDE)), "has no k_proj: call attach_audio"),
        (CrossConditions(adapter=torch.ones(1, 5, SIDE)), r"k_proj: call attach_adapter\(\)"),
        (CrossConditions(fusion=torch.ones(1, 5, DIM)), r"k_fusion: call attach_fusion\(\)"),
        (CrossConditions(image=torch.ones(1, 5, DIM)), "no image branch: use WanI2VCrossAtt"),
    ],
)
def test_a_missing_attachment_is_named(given, message):
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        WanCrossAttention(DIM, HEADS)(video(1), text(1), given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            CrossConditions(audio=torch.ones(1, 3, 5, SIDE)),
            "audio has 3 latent frames, but 40 video tokens are no multiple of 3",
        ),
        (
            CrossConditions(audio=torch.ones(1, 2, 5, SIDE), grid=GRID),
            "audio is for 2 latent frames of 2x5 = 20 tokens, but it meets 40 video tokens",
        ),
        (
            CrossConditions(adapter=torch.ones(1, 4, 5, SIDE), adapter_tokens=30, grid=GRID),
            "adapter is for 4 latent frames of 2x5 = 40 tokens, but it meets 30 video tokens",
        ),
        (
            CrossConditions(adapter=torch.ones(1, 4, 5, SIDE), adapter_tokens=30),
            "adapter has 4 latent frames, but 30 video tokens",
        ),
        (
            CrossConditions(adapter=torch.ones(1, 5, SIDE), adapter_tokens=41),
            "adapter_tokens=41: use 1 to 40",
        ),
        (
            CrossConditions(adapter=torch.ones(1, 5, SIDE), adapter_tokens=0),
            "adapter_tokens=0: use 1 to 40",
        ),
        (
            CrossConditions(audio=torch.ones(2, 5, SIDE)),
            r"audio has shape \(2, 5, 24\): use \(1, T, A, width\)",
        ),
        (
            CrossConditions(fusion=torch.ones(1, 5, DIM), fusion_rope=TABLES),
            "rotary table is for 6 tokens",
        ),
        (
            CrossConditions(fusion=torch.ones(1, 5, DIM), fusion_lens=torch.tensor([5, 5])),
            "one length for each of 1",
        ),
    ],
)
def test_bad_input_is_named(given, message):
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        layer()(video(1), text(1), given)


@pytest.mark.parametrize("attach", ["attach_audio", "attach_adapter", "attach_fusion"])
def test_attaching_twice_would_lose_weights(attach):
    attn = WanCrossAttention(DIM, HEADS)
    getattr(attn, attach)()
    with pytest.raises(ValueError, match="is attached already"):
        getattr(attn, attach)()


def test_guidance_of_unlike_shapes_is_named():
    with pytest.raises(ValueError, match=r"z_pos \(1, 2, 4\) and z_neg \(1, 2, 5\)"):
        guide(torch.ones(1, 2, 4), torch.ones(1, 2, 5))
