"""HuMo's audio attention: each latent frame hears its own tokens."""

import pytest
import torch

from tests.wan_models import attention_reference as ref
from tests.wan_models.attention_reference import DIM, FRAME, FRAMES, GRID, HEADS, TOKENS, WIDTH
from wan_models.attention import WanHuMoCrossAttention

calls = ref.calls

SIDE, HEARD = 24, 5


def layer() -> WanHuMoCrossAttention:
    return ref.randomise(
        WanHuMoCrossAttention(DIM, HEADS, audio_dim=SIDE, audio_tokens=HEARD)
    )


def inputs(batch: int, grid: tuple[int, int, int] = GRID) -> tuple:
    tokens = grid[0] * grid[1] * grid[2]
    return (
        ref.normal(batch, tokens, DIM, seed=1),
        ref.normal(batch, grid[0] * HEARD, SIDE, seed=2),
        grid,
    )


@pytest.mark.parametrize("batch", [1, 2])
def test_values(batch):
    attn, (x, audio, grid) = layer(), inputs(batch)
    with torch.no_grad():
        out = attn(x, audio, grid)
        k, v = (
            part.reshape(batch, FRAMES, HEARD, HEADS, WIDTH) for part in ref.key_value(attn, audio)
        )
        heard = ref.per_frame_attention(ref.query(attn, x), k, v, FRAMES)
    ref.assert_near(out, ref.linear(attn.o, heard.flatten(2)))


@pytest.mark.parametrize("batch", [1, 2])
def test_a_frame_hears_no_other_frame(batch):
    attn, (x, audio, grid) = layer(), inputs(batch)
    changed = audio.clone()
    changed[:, 2 * HEARD : 3 * HEARD] += 1
    with torch.no_grad():
        moved = (attn(x, changed, grid) - attn(x, audio, grid)).abs().amax(-1)
    frame_2 = torch.arange(TOKENS) // FRAME == 2
    assert (moved[:, frame_2] > 1e-3).all()
    assert (moved[:, ~frame_2] == 0).all()


@pytest.mark.parametrize("batch", [1, 2])
def test_what_the_kernel_receives(batch, calls):
    with torch.no_grad():
        layer()(*inputs(batch))
    (call,) = calls
    assert call.q.shape == (batch * FRAMES, FRAME, HEADS, WIDTH)
    assert call.k.shape == call.v.shape == (batch * FRAMES, HEARD, HEADS, WIDTH)
    assert all(part.is_contiguous() for part in call[:3])


@pytest.mark.parametrize("batch", [1, 2])
def test_compiles(batch):
    ref.assert_compiles(layer(), *inputs(batch))


def test_a_second_resolution_recompiles_nothing():
    attn = layer()
    run = ref.compiled(attn, dynamic=True)
    for grid in (GRID, (FRAMES, 3, 7)):
        arguments = inputs(2, grid)
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=(grid != GRID)):
            torch.testing.assert_close(run(*arguments), attn(*arguments))


def test_names_and_sizes_are_those_of_checkpoints():
    with torch.device("meta"):
        attn = WanHuMoCrossAttention(5120, 40)
    sizes = {name: tuple(p.shape) for name, p in attn.named_parameters()}
    assert sizes["k.weight"] == sizes["v.weight"] == (5120, 1536)
    assert sizes["q.weight"] == sizes["o.weight"] == (5120, 5120)
    assert sizes["norm_q.weight"] == sizes["norm_k.weight"] == (5120,)
    assert attn.audio_tokens == 16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        # The sampling window has 15 latent frames, the video 21: each side names its number.
        (
            lambda: layer()(ref.normal(1, 42, DIM, seed=1), torch.ones(1, 75, SIDE), (15, 1, 2)),
            "got 42 tokens, but the grid is 15 latent frames of 1x2 = 30 tokens",
        ),
        (
            lambda: layer()(ref.normal(1, 42, DIM, seed=1), torch.ones(1, 75, SIDE), (21, 1, 2)),
            "audio has 75 tokens, but 21 latent frames need 105, 5 for each",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        call()
