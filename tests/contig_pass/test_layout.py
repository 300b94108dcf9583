"""Facts that brute force over real tensors does not reach: symbols, fake tensors, size-1 rules."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from contig_pass.layout import ABSOLUTE, FRESH_ALIGNMENT, Layout, all_known, known


def _symbolic(*sizes: int) -> tuple[ShapeEnv, torch.Tensor]:
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    real = torch.empty(sizes)
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * len(sizes))
    fake = mode.from_tensor(real, symbolic_context=context, source=ConstantSource("x"))
    return env, fake


def test_symbolic_questions_add_no_guard() -> None:
    env, x = _symbolic(24, 40)
    views = (x, x.t(), x[:, 1:], x[1:], x[:, ::2], x.view(-1), x.unsqueeze(0).expand(3, -1, -1))
    with_guards = len(env.guards)
    for view in views:
        layout = Layout.of(view)
        for answer in (
            layout.row_major(), layout.column_major(), layout.dense(), layout.contiguous(),
            layout.unit_stride(-1), layout.pointer_aligned(16), layout.pitch_aligned(16),
            layout.size_multiple(16), layout.overlaps(), layout.is_empty(),
        ):
            assert answer in (True, False, None)
        layout.dim_order()
        layout.describe()
    assert len(env.guards) == with_guards


def test_symbolic_answers_are_true_false_or_unknown() -> None:
    _, x = _symbolic(24, 40)
    assert Layout.of(x).contiguous() is True
    assert Layout.of(x).unit_stride(-1) is True
    assert Layout.of(x).pitch_aligned(16) is None  # the row length is a symbol
    assert Layout.of(x[:, 1:]).pointer_aligned(16) is False
    assert Layout.of(x[1:]).pointer_aligned(16) is None
    assert Layout.of(x[:, 4:]).pointer_aligned(16) is True
    assert Layout.of(x).size_multiple(16) is None


def test_real_tensors_give_their_address_and_fake_ones_an_aligned_base() -> None:
    buffer = torch.zeros(64, dtype=torch.uint8)
    layout = Layout.of(buffer[3:])
    assert (layout.base_alignment, layout.byte_offset) == (ABSOLUTE, buffer.data_ptr() + 3)
    fake = FakeTensorMode().from_tensor(buffer)[3:]
    layout = Layout.of(fake)
    assert (layout.base_alignment, layout.byte_offset) == (FRESH_ALIGNMENT, 3)
    assert Layout.of(torch.empty(8, device="meta")[1:]).byte_offset == 4


def test_offsets_count_bytes_through_dtype_views() -> None:
    words = torch.zeros(64, dtype=torch.int16, device="meta")
    view = words[3:].view(torch.float8_e4m3fn)[1:]
    layout = Layout.of(view)
    assert layout.byte_offset == 7
    assert layout.itemsize == 1
    packed = words.view(torch.float4_e2m1fn_x2)
    assert Layout.of(packed).shape == (128,)
    assert Layout.of(packed).nbytes == 128


def test_strides_of_size_one_dimensions() -> None:
    one_row = torch.empty(16).as_strided((1, 16), (1, 1))
    assert Layout.of(one_row).row_major() is True
    assert Layout.of(one_row).row_major(ignore_size_one=False) is False  # as _scaled_mm judges
    one_column = torch.empty(16).as_strided((16, 1), (1, 7))
    assert Layout.of(one_column).unit_stride(-1) is True
    assert Layout.of(one_column).unit_stride(-1, ignore_size_one=False) is False


@pytest.mark.parametrize(
    ("strides", "row", "column"),
    [((16, 1), True, False), ((1, 8), False, True), ((19, 1), True, False), ((9, 1), False, False),
     ((0, 1), False, False), ((32, 2), False, False)],
)
def test_orders(strides: tuple[int, int], row: bool, column: bool) -> None:
    layout = Layout.of(torch.empty(400).as_strided((8, 16), strides))
    assert (layout.row_major(), layout.column_major()) == (row, column)


def test_three_valued_and() -> None:
    assert all_known(True, None, False) is False
    assert all_known(True, None) is None
    assert all_known(True, True) is True
    assert known(True) is True


@pytest.mark.parametrize("wrong", [torch.eye(3).to_sparse(), 5])
def test_only_strided_tensors_have_a_layout(wrong: object) -> None:
    with pytest.raises(TypeError, match="strided tensor"):
        Layout.of(wrong)  # type: ignore[arg-type]


def test_describe_names_offset_or_address() -> None:
    assert Layout.of(torch.empty(4, 8, device="meta")[1:]).describe() == (
        "(3, 8) strides (8, 1) offset 32 B"
    )
    assert "address 4 mod 16" in Layout.of(torch.zeros(64)[1:].contiguous()).describe()
