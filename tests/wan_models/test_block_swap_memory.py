"""Memory of swapped blocks: fixed addresses, layouts, the order of copies, pinned pieces."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.wan_models.block_swap_models import Toy, bits, inputs, model, run, tensors, toy
from wan_models.block_swap import BlockSwap, copier, memory, swap
from wan_models.quant import SlabLinear

# -- addresses and layouts ---------------------------------------------------------------------


@pytest.mark.parametrize("count", [3, 4, 5])
def test_addresses_are_constant_and_alternate_between_two_buffers(count):
    made = model()
    given = inputs(made)
    with BlockSwap(made, count, "cpu") as swapped:
        addresses = {name: t.data_ptr() for name, t in tensors(made.blocks).items()}
        for _ in range(3):
            run(made, *given)
            assert {n: t.data_ptr() for n, t in tensors(made.blocks).items()} == addresses
        size = swapped.buffer_bytes // 2
        starts = [min(t.data_ptr() for t in tensors(each).values() if t.numel() > 1)
                  for each in made.blocks[5 - count :]]
        for i, start in enumerate(starts):
            # Within the alignment of the first tensor of a buffer.
            assert abs(start - starts[i % 2]) < memory.ALIGNMENT
        assert abs(starts[0] - starts[1]) >= size


def _padded(weight: torch.Tensor) -> torch.Tensor:
    room = torch.zeros(weight.shape[0], weight.shape[1] + 3)
    room[:, : weight.shape[1]] = weight
    return room[:, : weight.shape[1]]


def _misaligned(weight: torch.Tensor) -> torch.Tensor:
    room = torch.zeros(weight.numel() + 1)
    room[1:] = weight.flatten()
    return room[1:].view(weight.shape)


LAYOUTS = {
    "row-major": lambda w: w.clone(),
    "column-major": lambda w: w.t().clone().t(),
    "padded rows": _padded,
    "4 bytes off": _misaligned,
    "every second column": lambda w: w.repeat_interleave(2, 1)[:, ::2],
    "expanded": lambda w: w[:1].expand(w.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_and_alignment_survive(layout):
    torch.manual_seed(0)
    made = Toy(*(LAYOUTS[layout](torch.randn(8, 8)) for _ in range(5)))
    whole = copy.deepcopy(made)
    facts = [(each.weight.stride(), each.weight.data_ptr() % 256) for each in made.blocks]
    x = torch.randn(3, 8)
    expected = run(whole, x)
    with BlockSwap(made, 5, "cpu"):
        assert [(b.weight.stride(), b.weight.data_ptr() % 256) for b in made.blocks] == facts
        assert torch.equal(run(made, x), expected)
        assert torch.equal(run(made, x), expected)
    assert [(b.weight.stride(), b.weight.data_ptr() % 256) for b in made.blocks] == facts
    assert torch.equal(run(made, x), expected)


def test_columns_of_a_fused_weight_still_overlap_and_take_no_more_memory():
    torch.manual_seed(0)
    made = toy(4)
    for each in made.blocks:
        fused = torch.randn(8, 24)
        for name, part in zip("qkv", fused.chunk(3, 1), strict=True):
            each.register_parameter(name, nn.Parameter(part, requires_grad=False))
    values = [bits(each.k.clone()) for each in made.blocks]
    seen = []
    for each in made.blocks:
        each.register_forward_hook(lambda block, *_: seen.append(bits(block.k.clone())))
    with BlockSwap(made, 4, "cpu") as swapped:
        run(made, torch.zeros(1, 8))
        assert seen == values
        for each in made.blocks:
            assert each.q.stride() == (24, 1)
            assert each.v.data_ptr() - each.q.data_ptr() == 2 * 8 * 4
        assert swapped.host_bytes < 4 * (8 * 32 * 4 + 2 * memory.ALIGNMENT)


def test_planted_misalignment_inside_a_slab_survives():
    made = model(recipe=None).bfloat16()
    for each in made.blocks:
        each.self_attn.q = SlabLinear.from_linear(
            each.self_attn.q, "fp8_e4m3fn_scaled_fast", weight_offset=1, row_padding=3, bias_gap=2
        )
    given = inputs(made)
    expected = run(made, *given)
    facts = [each.self_attn.q.weight().data_ptr() % 64 for each in made.blocks]
    with BlockSwap(made, 4, "cpu"):
        assert torch.equal(run(made, *given), expected)
        assert [each.self_attn.q.weight().data_ptr() % 64 for each in made.blocks] == facts


# -- order of copies and kernels ---------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_no_copy_starts_between_a_block_s_copy_and_its_last_kernel(count, monkeypatch):
    """What the events guarantee on a GPU holds if calls come in this order."""
    log: list[tuple[str, object]] = []

    class Logging(copier.Copier):
        def fill(self, buffer, host, slab):
            log.append(("fill", buffer))
            super().fill(buffer, host, slab)

        def acquire(self, buffer):
            log.append(("acquire", buffer))

        def release(self, buffer):
            log.append(("release", buffer))

    monkeypatch.setattr(swap, "Copier", Logging)
    made = toy(5)
    for i, each in enumerate(made.blocks):
        each.register_forward_hook(lambda *_, i=i: log.append(("run", i)))
    with BlockSwap(made, count, "cpu"):
        for _ in range(3):
            run(made, torch.randn(3, 8))
    buffers = min(count, 2)
    # A block that has a buffer to itself is copied once.
    alone = {buffer for buffer in range(buffers) if len(range(buffer, count, 2)) == 1}
    state = dict.fromkeys(range(buffers), "free")
    fills = 0
    for what, which in log:
        if what == "run":
            index = which - (5 - count)
            assert index < 0 or state[index % 2] == "in use"
        elif what == "acquire":
            assert state[which] == "filled"
            state[which] = "in use"
        elif what == "release":
            assert state[which] in ("in use", "free")
            kept = state[which] == "in use" and which in alone
            state[which] = "filled" if kept else "free"
        else:
            assert state[which] == "free"
            state[which] = "filled"
            fills += 1
    assert [which for what, which in log if what == "run"] == [0, 1, 2, 3, 4] * 3
    assert fills == buffers + 3 * (count - len(alone))


def test_the_events_of_a_gpu(monkeypatch):
    """The calls that the side stream, the computing stream and the host get, in order."""
    log: list[str] = []

    class Event:
        def __init__(self):
            self.name = f"event {len(events)}"
            events.append(self)

        def record(self, stream):
            log.append(f"{stream.name} records {self.name}")

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_event(self, event):
            log.append(f"{self.name} waits for {event.name}")

        def __enter__(self):
            log.append(f"into {self.name}")

        def __exit__(self, *_):
            log.append(f"out of {self.name}")

    class Bytes:
        def copy_to(self, slab):
            log.append(f"copy to {slab}")

    events: list[Event] = []
    computing = Stream("computing")
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append(f"wait for {device}"))
    made = copier.Copier(torch.device("cuda", 0))
    filled, free = made.filled[1].name, made.free[1].name
    assert len({event.name for event in events}) == 4
    made.release(1)
    made.fill(1, Bytes(), "slab")
    made.acquire(1)
    made.release(1)
    made.finish()
    assert log == [
        f"computing records {free}",
        "into side",
        f"side waits for {free}",
        "copy to slab",
        f"side records {filled}",
        "out of side",
        f"computing waits for {filled}",
        f"computing records {free}",
        "wait for cuda:0",
    ]


def test_pinned_memory_comes_in_pieces_without_much_waste(monkeypatch):
    sizes = []

    def pinned(size: int) -> torch.Tensor:
        sizes.append(size)
        return torch.empty(size, dtype=torch.uint8)

    monkeypatch.setattr(memory, "pinned", pinned)
    monkeypatch.setattr(memory, "SMALLEST_PIECE", 64)
    torch.manual_seed(0)
    room = memory.empty_slab(2048, torch.device("cpu"))
    parts = [
        room[2:162].view(torch.bfloat16).normal_(),
        room[512:764].view(torch.float32).view(7, 9).normal_(),
        room[1024:1144].view(torch.float32).view(6, 5).t().normal_(),
        room[1600:1612].view(torch.float32).normal_(),
    ]
    places, size = memory.packed(parts)
    assert [place.offset for place in places] == [2, 256, 512, 832]
    host = memory.Host(size, pin=True)
    assert (size, sizes) == (844, [512, 256, 64, 64])
    for part, place in zip(parts, places, strict=True):
        host.write(place.offset, memory.raw(part))
    slab = memory.empty_slab(size, torch.device("cpu"))
    host.copy_to(slab)
    for part, place in zip(parts, places, strict=True):
        for read in (host.read(place), memory.view(slab, place)):
            assert torch.equal(read, part)
            assert read.stride() == part.stride()
            assert read.dtype == part.dtype
        assert memory.view(slab, place).data_ptr() % 256 == part.data_ptr() % 256


def test_host_memory_of_the_usual_block_sizes():
    for block_bytes in (351_400_000, 702_800_000, 46_400_000):
        pieces, left = [], block_bytes
        while left > 0:
            pieces.append(memory.piece(left))
            left -= pieces[-1]
        assert sum(pieces) - block_bytes < memory.SMALLEST_PIECE
        assert len(pieces) < 16
