"""MultiTalk's audio attention: one and several speakers, their positions, what the kernel gets."""

import pytest
import torch

from tests.wan_models import attention_reference as ref
from tests.wan_models.attention_reference import DIM, FRAME, FRAMES, GRID, HEADS, TOKENS, WIDTH
from wan_models.attention import (
    SingleStreamAttention,
    SingleStreamMultiAttention,
    WanSelfAttention,
)
from wan_models.attention.speakers import key_positions, query_positions
from wan_models.rope import apply_rope, rope_table, rope_table_1d

calls = ref.calls

SIDE, HEARD = 24, 6


def single() -> SingleStreamAttention:
    return ref.randomise(SingleStreamAttention(DIM, HEADS, audio_dim=SIDE))


def multi() -> SingleStreamMultiAttention:
    return ref.randomise(
        SingleStreamMultiAttention(DIM, HEADS, audio_dim=SIDE, audio_tokens=HEARD)
    )


def video(batch: int, extra: bool = False) -> torch.Tensor:
    return ref.normal(batch, TOKENS + FRAME * extra, DIM, seed=1)


def audio(batch: int, people: int = 1, frames: int = FRAMES) -> torch.Tensor:
    return ref.normal(batch * frames, people * HEARD, SIDE, seed=2)


def maps_of(classes: int, batch: int | None = None, tokens: int = TOKENS) -> torch.Tensor:
    shape = (classes, tokens) if batch is None else (batch, classes, tokens)
    return torch.rand(*shape, generator=torch.Generator().manual_seed(3)) / FRAME


def expected_positions(maps: torch.Tensor, people: int) -> list[float]:
    """maps (classes, L), one token at a time."""
    rows = maps.double().tolist()
    positions = []
    for token in range(maps.shape[1]):
        values = [row[token] for row in rows]
        winner = values.index(max(values))
        if winner == people:
            positions.append(12.0)
            continue
        low, high = min(rows[winner]), max(rows[winner])
        share = (values[winner] - low) / (high - low) if high > low else 0.0
        edge = 20 * winner if people == 2 else 4 * winner
        positions.append(edge + 4 * share)
    return positions


def expected_attention(attn, x, heard, people=1, positions=None) -> torch.Tensor:
    """(B, L, C); positions: one list for each sample. Tokens beyond the frames get zero."""
    batch = x.shape[0]
    q = ref.split(ref.linear(attn.q_linear, x[:, :TOKENS]))
    both = ref.linear(attn.kv_linear, heard)
    k, v = ref.split(both[..., :DIM]), ref.split(both[..., DIM:])
    if positions is not None:
        q = torch.cat([
            ref.turn(q[b : b + 1], [ref.axis_angles(p, WIDTH) for p in positions[b]])
            for b in range(batch)
        ])
        centres = [20 * i + 2 if people == 2 else 4 * i + 2 for i in range(people)]
        angles = [ref.axis_angles(c, WIDTH) for c in centres for _ in range(HEARD)]
        k = ref.turn(k, angles)
    k, v = (part.reshape(batch, FRAMES, *part.shape[1:]) for part in (k, v))
    out = ref.linear(attn.proj, ref.per_frame_attention(q, k, v, FRAMES).flatten(2))
    silent = torch.zeros(batch, x.shape[1] - TOKENS, DIM, dtype=torch.float64)
    return torch.cat([out, silent], dim=1)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("extra", [False, True])
def test_single(batch, extra):
    attn, x = single(), video(batch, extra)
    with torch.no_grad():
        out = attn(x, audio(batch), GRID)
        ref.assert_near(out, expected_attention(attn, x, audio(batch)))
    assert out.shape == x.shape
    assert not extra or (out[:, TOKENS:] == 0).all()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("people", "classes"), [(2, 3), (2, 2), (3, 4), (6, 7)])
def test_multi(people, classes, shared, extra, batch):
    attn, x = multi(), video(batch, extra)
    maps = maps_of(classes, None if shared else batch, x.shape[1])
    own = [maps if shared else maps[b] for b in range(batch)]
    positions = [expected_positions(m[:, :TOKENS], people) for m in own]
    heard = audio(batch, people)
    with torch.no_grad():
        out = attn(x, heard, GRID, maps)
        expected = expected_attention(attn, x, heard, people, positions)
        unturned = expected_attention(attn, x, heard, people)
    ref.assert_near(out, expected)
    assert (out.double() - unturned).norm() > 0.05 * out.norm()  # the positions are felt


@pytest.mark.parametrize("batch", [1, 2])
def test_one_speaker_needs_no_maps(batch):
    attn = multi()
    with torch.no_grad():
        out = attn(video(batch), audio(batch), GRID)
        ref.assert_near(out, expected_attention(attn, video(batch), audio(batch)))


@pytest.mark.parametrize("batch", [1, 2])
def test_maps_of_the_self_attention_fit(batch):
    attend = ref.randomise(WanSelfAttention(DIM, HEADS))
    attn, x = multi(), video(batch)
    masks = (torch.arange(FRAME) // 4 == torch.arange(3)[:, None]).float()
    with torch.no_grad():
        _, maps = attend.forward_multitalk(x, rope_table(GRID, WIDTH), GRID, masks)
        out = attn(x, audio(batch, 2), GRID, maps)
        samples = maps if batch > 1 else maps[None]
        positions = [expected_positions(m, 2) for m in samples]
        ref.assert_near(out, expected_attention(attn, x, audio(batch, 2), 2, positions))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("extra", [False, True])
def test_what_the_kernel_receives_for_one_speaker(batch, extra, calls):
    seen = []
    attn = single()
    attn.q_linear.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        attn(video(batch, extra), audio(batch), GRID)
    (call,) = calls
    assert call.q.shape == (batch * FRAMES, FRAME, HEADS, WIDTH)
    assert call.k.stride() == call.v.stride() == (HEARD * 2 * DIM, 2 * DIM, WIDTH, 1)
    assert (call.k.storage_offset(), call.v.storage_offset()) == (0, DIM)
    # The cut video of several samples is no dense block, and the projection gets it so.
    assert seen[0].stride() == ((TOKENS + FRAME * extra) * DIM, DIM, 1)
    assert seen[0].is_contiguous() == (batch == 1 or not extra)


@pytest.mark.parametrize("batch", [1, 2])
def test_what_the_kernel_receives_for_two_speakers(batch, calls):
    with torch.no_grad():
        multi()(video(batch), audio(batch, 2), GRID, maps_of(3))
    (call,) = calls
    heard = 2 * HEARD
    assert call.q.is_contiguous()
    assert call.k.is_contiguous()
    assert call.v.shape == call.k.shape == (batch * FRAMES, heard, HEADS, WIDTH)
    assert call.v.stride() == (heard * 2 * DIM, 2 * DIM, WIDTH, 1)
    assert call.v.storage_offset() == DIM


def test_the_mode_reaches_the_kernel(calls):
    attn = multi()
    attn.mode = "sdpa_math"
    with torch.no_grad():
        attn(video(1), audio(1, 2), GRID, maps_of(3))
    assert calls[0].options["mode"] == "sdpa_math"


def test_positions_of_equal_maps_are_the_lower_edge_of_the_first_class():
    flat = torch.full((3, 5), 0.25)
    assert query_positions(flat, 2).tolist() == [0.0] * 5
    flat[1] += 0.5
    assert query_positions(flat, 2).tolist() == [20.0] * 5
    flat[2] += 0.75
    assert query_positions(flat, 2).tolist() == [12.0] * 5
    assert query_positions(flat[:2], 2).tolist() == [20.0] * 5


def test_positions_by_hand():
    maps = torch.tensor([[0.0, 1, 4, 2, 0], [1.0, 3, 1, 2, 0], [0.0, 0, 0, 0, 1]])
    # class 1 at its least, class 1 at its most, class 0 at its most, a tie for class 0 half-way
    assert query_positions(maps, 2).tolist() == pytest.approx([20 + 4 / 3, 24, 4, 2, 12])
    more = torch.stack([maps[0], maps[1], 5 * maps[2], maps[2]])
    assert query_positions(more, 3).tolist() == pytest.approx([4 + 4 / 3, 8, 4, 2, 12])


def test_key_positions():
    assert key_positions(2, 3).tolist() == [2.0, 2, 2, 22, 22, 22]
    assert key_positions(6, 1).tolist() == [2.0, 6, 10, 14, 18, 22]
    assert key_positions(1, 2).tolist() == [2.0, 2]


@pytest.mark.parametrize("per_sample", [False, True])
def test_rotary_along_one_axis(per_sample):
    positions = torch.rand(2, 7, generator=torch.Generator().manual_seed(1)) * 24
    x = ref.normal(2, 9, HEADS, WIDTH, seed=2)  # two tokens beyond the table
    table = rope_table_1d(positions if per_sample else positions[0], WIDTH)
    assert table.shape == ((2, 2, 7, 1, 8) if per_sample else (2, 7, 1, 8))
    turned = apply_rope(x, table)
    for b in range(2):
        own = positions[b if per_sample else 0].tolist()
        angles = [ref.axis_angles(p, WIDTH) for p in own]
        ref.assert_near(turned[b : b + 1], ref.turn(x[b : b + 1].double(), angles))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("people", [1, 2, 3])
def test_compiles(people, extra, batch):
    x = video(batch, extra)
    if people == 1:
        ref.assert_compiles(single(), x, audio(batch), GRID)
    else:
        maps = maps_of(people + 1, batch, x.shape[1])
        ref.assert_compiles(multi(), x, audio(batch, people), GRID, maps)


def test_a_second_resolution_recompiles_nothing():
    attn = multi()
    run = ref.compiled(attn, dynamic=True)
    for rows, columns in ((2, 5), (3, 7)):
        tokens = FRAMES * rows * columns
        x, maps = ref.normal(2, tokens, DIM, seed=1), maps_of(3, 2, tokens)
        arguments = (x, audio(2, 2), (FRAMES, rows, columns), maps)
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=(rows == 3)):
            torch.testing.assert_close(run(*arguments), attn(*arguments))


def test_names_and_sizes_are_those_of_checkpoints():
    with torch.device("meta"):
        attn = SingleStreamMultiAttention(5120, 40)
    sizes = {name: tuple(p.shape) for name, p in attn.named_parameters()}
    assert sizes == {
        "q_linear.weight": (5120, 5120), "q_linear.bias": (5120,),
        "kv_linear.weight": (10_240, 768), "kv_linear.bias": (10_240,),
        "proj.weight": (5120, 5120), "proj.bias": (5120,),
    }
    assert attn.audio_tokens == 32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        # 21 latent frames of video against a window of 15, and the other way round.
        (
            lambda: single()(torch.ones(1, 42, DIM), audio(1, 1, 15), (15, 1, 2)),
            "got 42 tokens, but the grid is 15 latent frames of 1x2 = 30 tokens",
        ),
        (
            lambda: single()(torch.ones(1, 42, DIM), audio(1, 1, 15), (21, 1, 2)),
            r"audio has shape \(15, 6, 24\): use \(21, A, width\), 21 latent frames for each of 1",
        ),
        (lambda: single()(torch.ones(1, 45, DIM), audio(1), GRID), "only one frame more, 50,"),
        (
            lambda: multi()(video(1), audio(1, 2)[:, :7], GRID, maps_of(3)),
            "audio has 7 tokens in a frame: use 6 for each speaker",
        ),
        (lambda: multi()(video(1), audio(1, 2)[:, :0], GRID), "audio has 0 tokens in a frame"),
        (lambda: multi()(video(1), audio(1, 2), GRID), "2 speakers need maps"),
        (
            lambda: multi()(video(1), audio(1, 2), GRID, maps_of(3, None, 30)),
            r"maps have shape \(3, 30\): use \(classes, 40\) or \(1, classes, 40\)",
        ),
        (
            lambda: multi()(video(2), audio(2, 2), GRID, maps_of(3, 3)),
            r"maps have shape \(3, 3, 40\)",
        ),
        (
            lambda: multi()(video(1), audio(1, 2), GRID, maps_of(4)),
            "maps have 4 classes: 2 people need 2, or 3",
        ),
        (lambda: multi()(video(1), audio(1, 7), GRID, maps_of(8)), "7 people: use 1 to 6"),
        (lambda: key_positions(0, 4), "0 people: use 1 to 6"),
    ],
)
def test_bad_input_is_named(call, message):
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        call()
