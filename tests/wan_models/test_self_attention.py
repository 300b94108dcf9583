"""Self-attention: each variant against float64, what reaches the kernel, what is refused."""

import pytest
import torch

from tests.wan_models import attention_reference as ref
from tests.wan_models.attention_reference import DIM, FRAME, FRAMES, GRID, HEADS, TOKENS, WIDTH
from wan_models.attention import WanSelfAttention, reference_map, reference_masks
from wan_models.attention import self_attention as module
from wan_models.attention.nag import NagParams
from wan_models.attention.radial import RadialPattern
from wan_models.rope import rope_table

calls = ref.calls

ROPE = rope_table(GRID, WIDTH)
ANGLES = ref.grid_angles(GRID)
IP_GRID = (1, 2, 3)
IP_ROPE = rope_table(IP_GRID, WIDTH)
MASKS = torch.tensor([
    [1, 1, 0, 0, 0, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0, 1, 1, 1, 1],
]).float()


def layer() -> WanSelfAttention:
    return ref.randomise(WanSelfAttention(DIM, HEADS))


def video(batch: int, tokens: int = TOKENS) -> torch.Tensor:
    return ref.normal(batch, tokens, DIM, seed=1)


def expected_qkv(attn, x, angles=ANGLES):
    k, v = ref.key_value(attn, x)
    return ref.turn(ref.query(attn, x), angles), ref.turn(k, angles), v


def expected_map(q: torch.Tensor, k: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """One class, one token, one head at a time."""
    maps = torch.zeros(q.shape[0], masks.shape[0], q.shape[1], dtype=torch.float64)
    for b in range(q.shape[0]):
        for token in range(q.shape[1]):
            for head in range(HEADS):
                weights = (k[b, :, head] @ q[b, token, head] / WIDTH**0.5).softmax(0)
                for c, mask in enumerate(masks.tolist()):
                    inside = sum(w for w, m in zip(weights.tolist(), mask, strict=True) if m)
                    maps[b, c, token] += inside / sum(mask) / HEADS
    return maps


@pytest.mark.parametrize("lens", [None, (40, 31)])
@pytest.mark.parametrize("batch", [1, 2])
def test_forward(batch, lens):
    attn, x = layer(), video(batch)
    lens = lens and lens[:batch]
    with torch.no_grad():
        out = attn(x, ROPE, lens and torch.tensor(lens))
        q, k, v = expected_qkv(attn, x)
        expected = ref.linear(attn.o, ref.softmax_attention(q, k, v, lens).flatten(2))
    ref.assert_near(out, expected)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("turned", [False, True])
def test_forward_ip(batch, turned):
    attn, x, ip = layer(), video(batch), ref.normal(batch, 6, DIM, seed=2)
    with torch.no_grad():
        out, (k_ip, v_ip) = attn.forward_ip(x, ROPE, ip, IP_ROPE if turned else None)
        q, k, v = expected_qkv(attn, x)
        q_i, k_i, v_i = expected_qkv(attn, ip, ref.grid_angles(IP_GRID) if turned else [])
        main = ref.softmax_attention(q, torch.cat([k, k_i], 1), torch.cat([v, v_i], 1))
        alone = ref.softmax_attention(q_i, k_i, v_i)
        expected = ref.linear(attn.o, torch.cat([main, alone], 1).flatten(2))
        ref.assert_near(out, expected)
        ref.assert_near(k_ip, k_i)
        ref.assert_near(v_ip, v_i)
        later = ref.normal(batch, TOKENS, DIM, seed=3)
        from_cache, kept = attn.forward_ip(later, ROPE, cache=(k_ip, v_ip))
        full, _ = attn.forward_ip(later, ROPE, ip, IP_ROPE if turned else None)
    assert kept[0] is k_ip
    assert kept[1] is v_ip
    assert from_cache.shape == (batch, TOKENS, DIM)
    torch.testing.assert_close(from_cache, full[:, :TOKENS])


@pytest.mark.parametrize("batch", [1, 2])
def test_a_kernel_that_writes_to_its_keys_cannot_change_the_cache(monkeypatch, batch):
    def centring(q, k, v, **options):
        out = ref.attention(q, k, v, **options)
        k.sub_(k.mean(1, keepdim=True))  # as SageAttention 3 does to its argument
        v.zero_()
        return out

    attn, x, ip = layer(), video(batch), ref.normal(batch, 6, DIM, seed=2)
    with torch.no_grad():
        expected, (k_ip, v_ip) = attn.forward_ip(x, ROPE, ip, IP_ROPE)
        monkeypatch.setattr(ref.base, "attention", centring)
        _, cache = attn.forward_ip(x, ROPE, ip, IP_ROPE)
        assert torch.equal(cache[0], k_ip)
        assert torch.equal(cache[1], v_ip)
        out, _ = attn.forward_ip(x, ROPE, cache=cache)
    assert torch.equal(cache[0], k_ip)
    assert torch.equal(cache[1], v_ip)
    torch.testing.assert_close(out, expected[:, :TOKENS])


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    ("chunks", "groups"), [(1, [4]), (2, [2, 2]), (3, [2, 1, 1]), (4, [1, 1, 1, 1])]
)
def test_forward_split(batch, chunks, groups, calls):
    attn, x = layer(), video(batch)
    with torch.no_grad():
        out = attn.forward_split(x, ROPE, GRID, chunks)
        q, k, v = expected_qkv(attn, x)
        parts, start = [], 0
        for frames in groups:
            own = slice(start * FRAME, (start + frames) * FRAME)
            parts.append(ref.softmax_attention(q[:, own], k[:, own], v[:, own]))
            start += frames
        expected = ref.linear(attn.o, torch.cat(parts, 1).flatten(2))
    ref.assert_near(out, expected)
    assert [call.k.shape[1] // FRAME for call in calls] == groups
    # Slices along the tokens: dense only for one sample.
    assert all(call.k.stride() == (TOKENS * DIM, DIM, WIDTH, 1) for call in calls)
    offsets = [sum(groups[:i]) * FRAME * DIM for i in range(chunks)]
    assert [call.k.storage_offset() for call in calls] == offsets


def test_groups_of_a_full_size_split():
    """21 frames in 4 groups: the first of them takes the one that is over."""
    attn = layer()
    seen = []
    attn.attend = lambda q, k, v: seen.append(q.shape[1]) or q
    with torch.no_grad():
        attn.forward_split(video(1, 42), rope_table((21, 1, 2), WIDTH), (21, 1, 2), 4)
    assert seen == [12, 10, 10, 10]


@pytest.mark.parametrize("lens", [None, (40, 31)])
@pytest.mark.parametrize("batch", [1, 2])
def test_forward_multitalk(batch, lens):
    attn, x = layer(), video(batch)
    lens = lens and lens[:batch]
    with torch.no_grad():
        out, maps = attn.forward_multitalk(x, ROPE, GRID, MASKS, lens and torch.tensor(lens))
        q, k, _ = expected_qkv(attn, x)
        assert torch.equal(out, attn(x, ROPE, lens and torch.tensor(lens)))
    expected = expected_map(q, k[:, :FRAME], MASKS)
    ref.assert_near(maps, expected if batch > 1 else expected[0])
    assert maps.dtype == torch.float32


def test_reference_map_of_a_class_without_a_pixel_is_zero():
    q, k = ref.normal(1, 7, HEADS, WIDTH, seed=1), ref.normal(1, 4, HEADS, WIDTH, seed=2)
    maps = reference_map(q, k, torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 0]]))
    assert torch.equal(maps[0, 1], torch.zeros(7))
    torch.testing.assert_close(maps[0, 0], torch.full((7,), 0.25))  # weights sum to 1, 4 pixels


def test_reference_map_stores_no_scores():
    """No op makes a tensor larger than q: the scores (H, L, S) would be 30 times that."""
    q = ref.normal(1, 1500, HEADS, WIDTH, seed=1)
    made = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            leaves = torch.utils._pytree.tree_leaves(out)
            made.extend(leaf.numel() for leaf in leaves if torch.is_tensor(leaf))
            return out

    with torch.no_grad(), Sizes():
        maps = reference_map(q, q[:, :500], torch.ones(3, 500))
    assert maps.shape == (1, 3, 1500)
    assert max(made) == q.numel()


def test_reference_masks_take_the_nearest_pixel():
    masks = torch.zeros(2, 8, 12)
    masks[0, :4, :6] = 1
    masks[1, 4:, 9:] = 1
    tokens = reference_masks(masks, (3, 2, 4)).view(2, 2, 4)
    assert tokens[0].tolist() == [[1, 1, 0, 0], [0, 0, 0, 0]]
    assert tokens[1].tolist() == [[0, 0, 0, 0], [0, 0, 0, 1]]


@pytest.mark.parametrize("batch", [1, 2])
def test_normalized_attention_guidance(batch):
    attn, x = layer(), video(batch, 5)
    text, unwanted = ref.normal(batch, 7, DIM, seed=2), ref.normal(batch, 4, DIM, seed=3)
    params = NagParams(5.0, 1.6, 0.3)
    with torch.no_grad():
        q = attn.query(x)
        out = attn.normalized_attention_guidance(q, text, unwanted, params)
        q64 = ref.query(attn, x)
        pos = ref.softmax_attention(q64, *ref.key_value(attn, text)).flatten(2)
        neg = ref.softmax_attention(q64, *ref.key_value(attn, unwanted)).flatten(2)
    ref.assert_near(out, ref.nag(pos, neg, *params))


def test_forward_radial_hands_the_pattern_on(monkeypatch):
    attn, x = layer(), video(2)
    attn.mode = "sdpa_math"
    seen = []

    def kernel(q, k, v, *, mode, k_lens=None, radial=None):
        seen.append((mode, radial))
        return v

    for place in (module, ref.base):
        monkeypatch.setattr(place, "attention", kernel)
    pattern = object()
    with torch.no_grad():
        out = attn.forward_radial(x, ROPE, pattern)
        attn.forward_radial(x, ROPE, pattern, dense=True)
    assert seen == [("radial", pattern), ("sdpa_math", None)]
    ref.assert_near(out, ref.linear(attn.o, ref.linear(attn.v, x)))


@pytest.mark.parametrize("batch", [1, 2])
def test_forward_radial(batch, monkeypatch):
    grid, heads, width = (4, 8, 8), 2, 64  # the kernel's head dimensions start at 64
    monkeypatch.setattr(ref, "HEADS", heads)
    monkeypatch.setattr(ref, "WIDTH", width)
    pattern = RadialPattern(grid, block=64)
    kept = pattern.block_mask().repeat_interleave(64, 0).repeat_interleave(64, 1)
    assert not kept.all()
    attn = ref.randomise(WanSelfAttention(heads * width, heads))
    x = ref.normal(batch, 256, heads * width, seed=1)
    with torch.no_grad():
        out = attn.forward_radial(x, rope_table(grid, width), pattern)
        angles = ref.grid_angles(grid, (24, 20, 20))
        q, k, v = (part.transpose(1, 2) for part in expected_qkv(attn, x, angles))
        scores = (q @ k.mT / width**0.5).masked_fill(~kept, -torch.inf)
        expected = ref.linear(attn.o, (scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    ref.assert_near(out, expected)


def test_dense_radial_is_plain_attention():
    attn, x = layer(), video(2)
    with torch.no_grad():
        assert torch.equal(attn.forward_radial(x, ROPE, None, dense=True), attn(x, ROPE))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("variant", [
    "forward", "ip", "cached", "multitalk", "split", "nag", "dense radial",
])
def test_compiles(variant, batch):
    attn, x = layer(), video(batch)
    ip, cached = ref.normal(batch, 6, DIM, seed=2), ref.normal(batch, 6, HEADS, WIDTH, seed=3)
    lens = torch.tensor([40, 31][:batch])
    call = {
        "forward": lambda x: attn(x, ROPE, lens),
        "ip": lambda x: attn.forward_ip(x, ROPE, ip, IP_ROPE),
        "cached": lambda x: attn.forward_ip(x, ROPE, cache=(cached, cached)),
        "multitalk": lambda x: attn.forward_multitalk(x, ROPE, GRID, MASKS),
        "split": lambda x: attn.forward_split(x, ROPE, GRID, 3),
        "nag": lambda x: attn.normalized_attention_guidance(attn.query(x), ip, ip[:, :4]),
        "dense radial": lambda x: attn.forward_radial(x, ROPE, None, dense=True),
    }[variant]
    ref.assert_compiles(call, x)


@pytest.mark.parametrize("batch", [1, 2])
def test_forward_radial_compiles(batch):
    grid = (3, 8, 8)
    attn = ref.randomise(WanSelfAttention(128, 2))
    rope, pattern = rope_table(grid, 64), RadialPattern(grid, block=64)
    ref.assert_compiles(
        lambda x: attn.forward_radial(x, rope, pattern), ref.normal(batch, 192, 128, seed=1)
    )


@pytest.mark.parametrize("variant", ["multitalk", "split"])
def test_a_second_resolution_recompiles_nothing(variant):
    attn = layer()

    def call(x, rope, masks, grid):
        if variant == "split":
            return attn.forward_split(x, rope, grid, 3)
        return attn.forward_multitalk(x, rope, grid, masks)

    run = ref.compiled(call, dynamic=True)
    for rows, columns in ((2, 5), (3, 7)):
        grid = (FRAMES, rows, columns)
        x = video(2, FRAMES * rows * columns)
        masks = torch.ones(2, rows * columns)
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=(rows == 3)):
            arguments = (x, rope_table(grid, WIDTH), masks, grid)
            got, want = run(*arguments), call(*arguments)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a, x: a.forward_ip(x, ROPE), "give the reference's tokens, or the cache"),
        (
            lambda a, x: a.forward_ip(x, ROPE, cache=(torch.ones(2, 6, 3, 16),) * 2),
            r"cache has shapes \(2, 6, 3, 16\) .* use \(1, Li, 3, 16\)",
        ),
        (lambda a, x: a.forward_split(x, ROPE, (5, 2, 5), 2), "got 40 tokens, .* = 50 tokens"),
        (lambda a, x: a.forward_split(x, ROPE, GRID, 0), "chunks=0: use 1 to 4"),
        (lambda a, x: a.forward_split(x, ROPE, GRID, 5), "chunks=5: use 1 to 4"),
        (
            lambda a, x: a.forward_multitalk(x, ROPE, (5, 2, 5), MASKS),
            "got 40 tokens, but the grid is 5 latent frames of 2x5 = 50 tokens",
        ),
        (
            lambda a, x: a.forward_multitalk(x, ROPE, GRID, MASKS[:, :9]),
            r"shape \(3, 9\): use \(classes, 10\)",
        ),
        (
            lambda a, x: a.forward_multitalk(x, ROPE, GRID, MASKS[:1].expand(17, -1)),
            "at most 16 classes",
        ),
        (lambda a, x: reference_masks(MASKS, GRID), r"use \(classes, height, width\)"),
    ],
)
def test_bad_input_is_named(call, message):
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        call(layer(), video(1))
