"""MTV-Crafter's motion attention: its head-major keys, their rotary, what is refused."""

import pytest
import torch

from tests.wan_models import attention_reference as ref
from tests.wan_models.attention_reference import DIM, GRID, HEADS, TOKENS, WIDTH
from wan_models.attention import MTVCrafterMotionAttention
from wan_models.rope import motion_rope_table, motion_widths, rope_table

calls = ref.calls

POSES, JOINTS = 3, 4
MOTION = POSES * JOINTS
ROPE = rope_table(GRID, WIDTH)
MEANS = 5 * ref.normal(JOINTS, 3, seed=9) + 2
MOTION_ROPE = motion_rope_table(POSES, MEANS, WIDTH)


def layer() -> MTVCrafterMotionAttention:
    return ref.randomise(MTVCrafterMotionAttention(DIM, HEADS))


def inputs(batch: int) -> tuple[torch.Tensor, ...]:
    video, motion = ref.normal(batch, TOKENS, DIM, seed=1), ref.normal(batch, MOTION, DIM, seed=2)
    return video, ROPE, motion, MOTION_ROPE


def motion_angles(poses: int, means: list[list[float]], widths: tuple[int, ...]) -> list:
    """One list of D/2 angles for each joint of each pose."""
    centre = [sum(mean[axis] for mean in means) / len(means) for axis in range(3)]
    return [
        sum(
            (ref.axis_angles(mean[axis] - centre[axis], widths[axis + 1]) for axis in range(3)),
            ref.axis_angles(pose, widths[0]),
        )
        for pose in range(poses) for mean in means
    ]


@pytest.mark.parametrize("batch", [1, 2])
def test_values(batch):
    attn, (x, rope, motion, motion_rope) = layer(), inputs(batch)
    with torch.no_grad():
        out = attn(x, rope, motion, motion_rope)
        q = ref.turn(ref.query(attn, x), ref.grid_angles(GRID))
        flat = ref.rms(attn.norm_k, ref.linear(attn.k, motion)).reshape(batch, -1)
        k = torch.zeros(batch, MOTION, HEADS, WIDTH, dtype=torch.float64)
        for head in range(HEADS):
            for token in range(MOTION):
                start = (head * MOTION + token) * WIDTH  # the memory read as (H, M, D)
                k[:, token, head] = flat[:, start : start + WIDTH]
        k = ref.turn(k, motion_angles(POSES, MEANS.tolist(), motion_widths(WIDTH)))
        v = ref.split(ref.linear(attn.v, motion))
        expected = ref.linear(attn.o, ref.softmax_attention(q, k, v).flatten(2))
        wrong = ref.linear(attn.o, ref.softmax_attention(q, v, v).flatten(2))
    ref.assert_near(out, expected)
    assert (out.double() - wrong).norm() > 0.05 * out.norm()  # the keys are felt


@pytest.mark.parametrize("batch", [1, 2])
def test_the_kernel_receives_head_major_keys(batch, calls):
    with torch.no_grad():
        layer()(*inputs(batch))
    (call,) = calls
    assert call.k.shape == call.v.shape == (batch, MOTION, HEADS, WIDTH)
    assert call.k.stride() == (MOTION * DIM, WIDTH, MOTION * WIDTH, 1)
    assert not call.k.is_contiguous()
    assert call.q.is_contiguous()
    assert call.v.stride() == (MOTION * DIM, DIM, WIDTH, 1)


@pytest.mark.parametrize("batch", [1, 2])
def test_compiles(batch):
    ref.assert_compiles(layer(), *inputs(batch))


def test_a_second_resolution_recompiles_nothing():
    attn = layer()
    run = ref.compiled(attn, dynamic=True)
    for grid, poses in ((GRID, POSES), ((4, 3, 7), 5)):
        x = ref.normal(2, grid[0] * grid[1] * grid[2], DIM, seed=1)
        motion = ref.normal(2, poses * JOINTS, DIM, seed=2)
        arguments = (
            x, rope_table(grid, WIDTH), motion, motion_rope_table(poses, MEANS, WIDTH)
        )
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=(poses == 5)):
            torch.testing.assert_close(run(*arguments), attn(*arguments))


@pytest.mark.parametrize(
    ("head_dim", "widths"), [(128, (44, 28, 28, 28)), (16, (10, 2, 2, 2)), (96, (36, 20, 20, 20))]
)
def test_motion_widths(head_dim, widths):
    assert motion_widths(head_dim) == widths
    assert sum(widths) == head_dim


def test_motion_table_angles():
    means = [[0.1, 0.9, -0.3], [0.4, 1.5, 0.2], [-0.7, 0.0, 0.6]]
    table = motion_rope_table(2, torch.tensor(means, dtype=torch.float64), 128)
    assert table.shape == (2, 6, 1, 64)
    assert table.dtype == torch.float32
    angles = torch.tensor(motion_angles(2, means, (44, 28, 28, 28)), dtype=torch.float64)
    torch.testing.assert_close(table[0, :, 0].double(), angles.cos(), atol=1e-7, rtol=0)
    torch.testing.assert_close(table[1, :, 0].double(), angles.sin(), atol=1e-7, rtol=0)


def test_moving_the_whole_body_changes_no_angle():
    moved = motion_rope_table(POSES, MEANS + torch.tensor([3.0, -8.0, 0.5]), WIDTH)
    torch.testing.assert_close(moved, MOTION_ROPE, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: layer()(*inputs(1)[:3], motion_rope_table(2, MEANS, WIDTH)),
            "table is for 8 tokens of head dimension 16, got 12 motion tokens of 16",
        ),
        (
            lambda: layer()(*inputs(1)[:3], motion_rope_table(POSES, MEANS, 32)),
            "head dimension 32, got 12 motion tokens of 16",
        ),
        (lambda: motion_rope_table(2, torch.ones(3), WIDTH), r"shape \(3,\): use \(J, 3\)"),
        (lambda: motion_rope_table(0, MEANS, WIDTH), "frames=0: use at least 1"),
    ],
)
def test_bad_input_is_named(call, message):
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        call()
