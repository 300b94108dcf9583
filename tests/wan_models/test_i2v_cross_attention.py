"""Image-to-video cross-attention: both forms of the image beside every other branch."""

import pytest
import torch

from tests.wan_models import attention_reference as ref
from tests.wan_models import test_cross_attention as t2v
from tests.wan_models.attention_reference import DIM, HEADS, TOKENS, WIDTH
from wan_models.attention import CrossConditions, WanI2VCrossAttention

calls = ref.calls

IMAGE = 6
#: Every variant of the text class; the image comes on top.
VARIANTS = t2v.VARIANTS


def layer(image_tokens: int = IMAGE) -> WanI2VCrossAttention:
    return t2v.layer(WanI2VCrossAttention, image_tokens=image_tokens)


def picture(batch: int) -> torch.Tensor:
    return ref.normal(batch, IMAGE, DIM, seed=7)


def inputs(
    batch: int, concatenated: bool, given: CrossConditions
) -> tuple[torch.Tensor, torch.Tensor, CrossConditions]:
    image, text = picture(batch), t2v.text(batch)
    if concatenated:
        return t2v.video(batch), torch.cat([image, text], dim=1), given
    return t2v.video(batch), text, given._replace(image=image)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("concatenated", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_values(variant, concatenated, batch):
    attn, given = layer(), VARIANTS[variant](batch)
    with torch.no_grad():
        out = attn(*inputs(batch, concatenated, given))
        x, image = t2v.video(batch), picture(batch)
        k = ref.split(ref.rms(attn.norm_k_img, ref.linear(attn.k_img, image)))
        v = ref.split(ref.linear(attn.v_img, image))
        branch = ref.softmax_attention(ref.query(attn, x), k, v).flatten(2)
        others = t2v.expected_branches(attn, x, t2v.text(batch), given)
        ref.assert_near(out, ref.linear(attn.o, others + branch))


@pytest.mark.parametrize("batch", [1, 2])
def test_without_an_image_there_is_no_image_branch(batch, calls):
    attn, given = layer(image_tokens=0), t2v.all_branches(batch)
    with torch.no_grad():
        out = attn(t2v.video(batch), t2v.text(batch), given)
        expected = t2v.expected_branches(attn, t2v.video(batch), t2v.text(batch), given)
    ref.assert_near(out, ref.linear(attn.o, expected))
    assert len(calls) == 5  # text twice, audio, adapter, fusion


@pytest.mark.parametrize("batch", [1, 2])
def test_both_forms_are_one(batch):
    attn, given = layer(), t2v.all_branches(batch)
    with torch.no_grad():
        forms = [attn(*inputs(batch, concatenated, given)) for concatenated in (True, False)]
    torch.testing.assert_close(*forms)


@pytest.mark.parametrize("batch", [1, 2])
def test_the_slices_of_the_context_reach_the_linears_as_they_lie(batch):
    """No copy by the model: for two samples neither the image nor the text is dense."""
    attn, seen = layer(), {}
    for name in ("k", "v", "k_img", "v_img"):
        attn.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.update({name: args[0]})
        )
    x, context, given = inputs(batch, True, CrossConditions())
    with torch.no_grad():
        attn(x, context, given)
    rows = context.shape[1] * DIM
    for name, offset in (("k", IMAGE * DIM), ("v", IMAGE * DIM), ("k_img", 0), ("v_img", 0)):
        assert seen[name].stride() == (rows, DIM, 1)
        assert seen[name].storage_offset() == offset
        assert seen[name].data_ptr() == context.data_ptr() + 4 * offset
        assert seen[name].is_contiguous() == (batch == 1)


def test_every_branch_shares_the_query(calls):
    attn = layer()
    with torch.no_grad():
        attn(*inputs(2, False, t2v.all_branches(2)))
    assert [tuple(call.q.shape) for call in calls[:3]] == [(2, TOKENS, HEADS, WIDTH)] * 3
    assert len({call.q.data_ptr() for call in calls[:3]}) == 1
    assert [call.k.shape[1] for call in calls[:3]] == [9, 6, IMAGE]  # guidance on the text alone


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("concatenated", [True, False])
@pytest.mark.parametrize("variant", ["text", "all"])
def test_compiles(variant, concatenated, batch):
    ref.assert_compiles(layer(), *inputs(batch, concatenated, VARIANTS[variant](batch)))


def test_names_and_sizes_are_those_of_checkpoints():
    with torch.device("meta"):
        attn = WanI2VCrossAttention(5120, 40)
    assert attn.image_tokens == 257
    sizes = {name: tuple(p.shape) for name, p in attn.named_parameters()}
    assert sizes["k_img.weight"] == sizes["v_img.weight"] == (5120, 5120)
    assert sizes["k_img.bias"] == sizes["norm_k_img.weight"] == (5120,)
    assert len(sizes) == 10 + 5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: layer()(t2v.video(1), picture(1)), "context has 6 tokens, 6 of them are"),
        (lambda: WanI2VCrossAttention(DIM, HEADS, image_tokens=-1), "image_tokens=-1"),
        (
            lambda: WanI2VCrossAttention(DIM, HEADS)(
                t2v.video(1), t2v.text(1),
                CrossConditions(image=picture(1), audio=t2v.audio(1, True)),
            ),
            "WanI2VCrossAttention has no k_proj: call attach_audio",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        call()
