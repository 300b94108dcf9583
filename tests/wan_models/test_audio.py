"""Audio windows and projections, against loops in float64."""

import math

import pytest
import torch

from tests.wan_models import attention_reference as ref
from wan_models.audio import (
    FantasyTalkingProjection,
    HuMoAudioProjection,
    MultiTalkAudioProjection,
    fantasy_talking_ranges,
    fantasy_talking_windows,
    humo_features,
    humo_windows,
    join_speakers,
    multitalk_windows,
)

BLOCKS, CHANNELS, HIDDEN, OUT = 3, 4, 16, 8


def multitalk() -> MultiTalkAudioProjection:
    return ref.randomise(MultiTalkAudioProjection(BLOCKS, CHANNELS, HIDDEN, 6, OUT))


def humo() -> HuMoAudioProjection:
    return ref.randomise(HuMoAudioProjection(5, CHANNELS, HIDDEN, 6, OUT))


def marked(batch: int, frames: int) -> torch.Tensor:
    """Windows whose values say which video frame and step they are: frame + step / 10."""
    frame = torch.arange(frames, dtype=torch.float64)[:, None]
    step = torch.arange(5, dtype=torch.float64) / 10
    return (frame + step)[None, :, :, None].expand(batch, -1, -1, 1)


def test_windows_of_latent_frames():
    first, later = multitalk_windows(marked(1, 9))
    assert first.flatten().tolist() == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert later.shape == (1, 2, 8, 1)
    steps = [1.0, 1.1, 1.2, 2.2, 3.2, 4.2, 4.3, 4.4]
    assert later[0, 0].flatten().tolist() == pytest.approx(steps)
    assert later[0, 1].flatten().tolist() == pytest.approx([step + 4 for step in steps])


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("frames", [1, 5, 13])
def test_multitalk_projection(batch, frames):
    layer, windows = multitalk(), ref.normal(batch, frames, 5, BLOCKS, CHANNELS, seed=1)
    latent = (frames - 1) // 4 + 1
    expected = torch.zeros(batch, latent, 6, OUT, dtype=torch.float64)
    with torch.no_grad():
        out = layer(windows)
        for b in range(batch):
            for t in range(latent):
                own = windows[b]
                if t == 0:
                    hidden = ref.linear(layer.proj1, own[0].reshape(-1))
                else:
                    n = 4 * t - 3
                    steps = [
                        own[n, 0], own[n, 1], own[n, 2], own[n + 1, 2], own[n + 2, 2],
                        own[n + 3, 2], own[n + 3, 3], own[n + 3, 4],
                    ]
                    hidden = ref.linear(layer.proj1_vf, torch.stack(steps).reshape(-1))
                hidden = ref.linear(layer.proj2, hidden.clamp(min=0)).clamp(min=0)
                tokens = ref.linear(layer.proj3, hidden).reshape(6, OUT)
                expected[b, t] = ref.layer_norm(layer.norm, tokens)
    ref.assert_near(out, expected)


def test_full_sizes():
    with torch.device("meta"):
        layer, other, third = (
            MultiTalkAudioProjection(), HuMoAudioProjection(), FantasyTalkingProjection()
        )
        heard = layer(torch.empty(1, 81, 5, 12, 768))
        seen = other(torch.empty(1, 21, 8, 5, 1280))
        said = third(torch.empty(1, 173, 768))
    assert heard.shape == (1, 21, 32, 768)
    assert seen.shape == (1, 21 * 16, 1536)
    assert said.shape == (1, 173, 2048)
    assert layer.proj1.weight.shape == (512, 46_080)
    assert layer.proj1_vf.weight.shape == (512, 73_728)
    assert layer.proj3.weight.shape == (32 * 768, 512)
    assert other.audio_proj_glob_1.layer.weight.shape == (512, 51_200)
    assert other.audio_proj_glob_3.layer.weight.shape == (16 * 1536, 512)
    assert set(dict(third.named_parameters())) == {"proj.weight", "norm.weight", "norm.bias"}
    assert {name.rpartition(".")[0] for name in other.state_dict()} == {
        f"audio_proj_glob_{part}.layer" for part in ("1", "2", "3", "norm")
    }


def test_speakers_are_joined_on_their_tokens():
    one, two, three = (ref.normal(2, 4, 6, OUT, seed=seed) for seed in (1, 2, 3))
    joined = join_speakers([one, two, three])
    assert joined.shape == (8, 18, OUT)
    for b in range(2):
        for t in range(4):
            assert torch.equal(joined[4 * b + t], torch.cat([one[b, t], two[b, t], three[b, t]]))
    assert torch.equal(join_speakers([one]), one.flatten(0, 1))


@pytest.mark.parametrize("batch", [1, 2])
def test_humo_projection(batch):
    layer, windows = humo(), ref.normal(batch, 4, 8, 5, CHANNELS, seed=1)
    with torch.no_grad():
        out = layer(windows)
        flat = windows.reshape(batch, 4, -1)
        hidden = ref.linear(layer.audio_proj_glob_1.layer, flat).clamp(min=0)
        hidden = ref.linear(layer.audio_proj_glob_2.layer, hidden).clamp(min=0)
        tokens = ref.linear(layer.audio_proj_glob_3.layer, hidden).reshape(batch, 24, OUT)
    ref.assert_near(out, ref.layer_norm(layer.audio_proj_glob_norm.layer, tokens))


@pytest.mark.parametrize("steps", [2, 9, 40])
def test_humo_features(steps):
    states = ref.normal(33, steps, CHANNELS, seed=1)
    out = humo_features(states)
    wide = states.double()
    groups = [wide[8 * i : 8 * i + 8].sum(0) / 8 for i in range(4)] + [wide[32]]
    count = steps // 2
    expected = torch.zeros(count, 5, CHANNELS, dtype=torch.float64)
    for i in range(count):
        place = i * (steps - 1) / (count - 1) if count > 1 else 0.0
        left = min(math.floor(place), steps - 2)
        for g, group in enumerate(groups):
            expected[i, g] = group[left] + (place - left) * (group[left + 1] - group[left])
    ref.assert_near(out, expected)


@pytest.mark.parametrize("steps", [1, 7, 13, 30])
def test_humo_windows(steps):
    features = ref.normal(steps, 5, CHANNELS, seed=1)
    windows = humo_windows(features, 13)
    assert windows.shape == (4, 8, 5, CHANNELS)
    for latent in range(4):
        first = 4 * latent - 5  # two before the first of its video frames 4i - 3 to 4i
        for step in range(8):
            frame = first + step
            silent = frame not in range(steps) or (latent == 0 and step < 3)
            expected = torch.zeros(5, CHANNELS) if silent else features[frame]
            assert torch.equal(windows[latent, step], expected)


def test_fantasy_talking_projection():
    layer = ref.randomise(FantasyTalkingProjection(12, 16))
    states = ref.normal(2, 7, 12, seed=1)
    with torch.no_grad():
        ref.assert_near(
            layer(states), ref.layer_norm(layer.norm, ref.linear(layer.proj, states))
        )


def test_fantasy_talking_ranges_of_the_usual_video():
    ranges = fantasy_talking_ranges(173, 81)
    assert len(ranges) == 21
    assert all(end - start + 1 == 9 for start, end in ranges)  # half is 4
    for i, (start, end) in enumerate(ranges[1:], 1):
        assert (start + end) // 2 == math.floor(173 / 81 * (4 * i - 1)) - 1
    assert ranges[0][1] == ranges[1][0]


@pytest.mark.parametrize(("tokens", "frames"), [(173, 81), (20, 9), (3, 9), (11, 5), (60, 13)])
@pytest.mark.parametrize("widen", [0, 4])
def test_fantasy_talking_windows(tokens, frames, widen):
    audio = ref.normal(2, tokens, 6, seed=1)
    windows = fantasy_talking_windows(audio, frames, widen)
    ranges = fantasy_talking_ranges(tokens, frames)
    size = ranges[0][1] - ranges[0][0] + 1 + 2 * widen
    assert windows.shape == (2, (frames - 1) // 4 + 1, size, 6)
    for i, (start, end) in enumerate(ranges):
        inside = [n for n in range(start - widen, end + widen + 1) if 0 <= n < tokens]
        assert torch.equal(windows[:, i, : len(inside)], audio[:, inside])
        assert (windows[:, i, len(inside) :] == 0).all()


def test_fantasy_talking_sizes():
    assert fantasy_talking_windows(torch.ones(1, 173, 2048), 81).shape == (1, 21, 17, 2048)


@pytest.mark.parametrize("kind", ["multitalk", "humo", "fantasy"])
@pytest.mark.parametrize("batch", [1, 2])
def test_compiles(kind, batch):
    if kind == "multitalk":
        ref.assert_compiles(multitalk(), ref.normal(batch, 9, 5, BLOCKS, CHANNELS, seed=1))
    elif kind == "humo":
        ref.assert_compiles(humo(), ref.normal(batch, 4, 8, 5, CHANNELS, seed=1))
    else:
        layer = ref.randomise(FantasyTalkingProjection(12, 16))
        ref.assert_compiles(
            lambda states: fantasy_talking_windows(layer(states), 9),
            ref.normal(batch, 20, 12, seed=1),
        )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: multitalk_windows(torch.ones(1, 9, 4, 3)), r"shape \(1, 9, 4, 3\): use"),
        (lambda: multitalk_windows(torch.ones(1, 8, 5, 3)), "8 video frames: use 1 more"),
        (lambda: join_speakers([]), r"shapes \[\]: use one or more"),
        (
            lambda: join_speakers([torch.ones(1, 4, 2, 3), torch.ones(1, 5, 2, 3)]),
            r"\(1, 4, 2, 3\), \(1, 5, 2, 3\)\]: use",
        ),
        (lambda: humo_features(torch.ones(32, 9, 4)), r"\(32, 9, 4\): use \(33, steps, W\)"),
        (lambda: humo_features(torch.ones(33, 1, 4)), "two steps or more"),
        (lambda: humo_windows(torch.ones(9, 5, 4), 12), "12 video frames"),
        (lambda: fantasy_talking_ranges(0, 81), "0 audio tokens for 81 video frames"),
        (lambda: fantasy_talking_ranges(173, 1), "173 audio tokens for 1 video frames"),
        (lambda: fantasy_talking_ranges(173, 80), "80 video frames: use 1 more"),
        (lambda: fantasy_talking_windows(torch.ones(1, 9, 2), 9, -1), "widen=-1"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
