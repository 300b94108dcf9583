"""Block swap on the CPU: the same results, fixed addresses, one compile, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import contig_pass
from wan_models import TINY, BlockConditions, WanModel, addons, model_inputs, zoo
from wan_models.block_swap import BlockSwap, block, copier, memory, swap
from wan_models.quant import SlabLinear, attach_lora, quantize_, set_lora_strength

GRID = (2, 2, 3)
SMALL = replace(
    TINY, dim=128, ffn_dim=256, num_heads=1, num_layers=5, text_dim=32, text_len=8
)
#: On a CPU the recipes that dequantise are quick, and hold the same buffers as the fast ones.
FP8, FP4 = "fp8_e4m3fn_scaled", "fp4_scaled"


def model(config=SMALL, recipe: str | None = None, seed: int = 0) -> WanModel:
    torch.manual_seed(seed)
    made = WanModel(config).eval().requires_grad_(False)
    for parameter in made.parameters():  # zero biases and unit norms would be alike everywhere
        parameter.add_(torch.randn_like(parameter) * 0.05)
    if recipe is not None:
        quantize_(made.bfloat16(), recipe)
    return made


def inputs(made: WanModel, **options):
    return model_inputs(made.config, GRID, dtype=made.dtype, **options)


@torch.no_grad()
def run(made: nn.Module, *args, **kwargs) -> torch.Tensor:
    return made(*args, **kwargs)


def tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().flatten().view(torch.uint8).tolist())


class Toy(nn.Module):
    """Blocks of one matrix each, whose layout a test chooses."""

    def __init__(self, *weights: torch.Tensor) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ToyBlock(weight) for weight in weights)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for each in self.blocks:
            x = each(x)
        return x


class ToyBlock(nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.fail = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fail:
            raise ArithmeticError("planted")
        return (x @ self.weight).tanh()


def toy(count: int = 5, size: int = 8) -> Toy:
    torch.manual_seed(0)
    return Toy(*(torch.randn(size, size) for _ in range(count)))


# -- results -----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(6))
def test_results_are_those_without_swap_and_everything_comes_back(count):
    made = model()
    given = inputs(made)
    expected = run(made, *given)
    before = {name: (bits(t), t.stride(), t) for name, t in tensors(made).items()}
    kind = type(made.blocks[0])
    with BlockSwap(made, count, "cpu") as swapped:
        for _ in range(3):
            assert torch.equal(run(made, *given), expected)
        largest = max(sum(t.nbytes for t in tensors(b).values()) for b in made.blocks)
        assert min(count, 2) * largest <= swapped.buffer_bytes <= min(count, 2) * 1.02 * largest
        assert count * largest * 0.99 <= swapped.host_bytes <= count * largest * 1.02
        assert isinstance(made.blocks[0], kind)
    after = tensors(made)
    assert after.keys() == before.keys()
    for name, (values, stride, tensor) in before.items():
        assert after[name] is tensor, name
        assert (bits(tensor), tensor.stride()) == (values, stride), name
    assert all(type(each) is kind for each in made.blocks)
    assert torch.equal(run(made, *given), expected)


@pytest.mark.parametrize("recipe", [FP8, "fp8_e5m2", FP4])
def test_buffers_of_quantised_linears_move_like_parameters(recipe):
    made = model(recipe=recipe)
    given = inputs(made)
    expected = run(made, *given)
    with BlockSwap(made, 4, "cpu") as swapped:
        assert torch.equal(run(made, *given), expected)
        assert torch.equal(run(made, *given), expected)
        weights = sum(m.weight.nbytes for b in made.blocks[1:] for m in b.modules()
                      if hasattr(m, "recipe"))
        assert swapped.host_bytes > weights
    assert torch.equal(run(made, *given), expected)


def test_vace_blocks_have_a_swap_of_their_own():
    config = replace(SMALL, num_layers=4, vace_layers=(0, 1, 3))
    made = model(config)
    given = inputs(made)
    expected = run(made, *given)
    with BlockSwap(made.vace_blocks, 3, "cpu"), BlockSwap(made, 3, "cpu"):
        assert torch.equal(run(made, *given), expected)
        assert torch.equal(run(made, *given), expected)
    assert torch.equal(run(made, *given), expected)


def test_blocks_of_several_kinds_share_the_buffers():
    made = model()
    addons.attach(made, "mtvcrafter")  # every fourth block has more layers
    given = inputs(made, addons=["mtvcrafter"])
    expected = run(made, *given)
    with BlockSwap(made, 5, "cpu"):
        assert torch.equal(run(made, *given), expected)
        assert torch.equal(run(made, *given), expected)


@pytest.mark.parametrize("name", ["t2v-14b", "i2v-14b", "ti2v-5b", "mtvcrafter-14b", "ovi-5b"])
def test_models_of_the_zoo(name):
    made = zoo.build(name, size="tiny", quantization=FP8)
    given = model_inputs(
        made.config, GRID, dtype=made.dtype, addons=zoo.variant(name, "tiny").addons
    )
    expected = run(made, *given)
    for count in (1, 2):
        with BlockSwap(made, count, "cpu"):
            assert torch.equal(run(made, *given), expected)
            assert torch.equal(run(made, *given), expected)


def test_inference_mode_before_and_after():
    made = model()
    given = inputs(made)
    expected = run(made, *given)
    with torch.inference_mode():
        swapped = BlockSwap(made, 3, "cpu").attach()
        assert torch.equal(made(*given), expected)
    assert torch.equal(run(made, *given), expected)
    swapped.detach()
    assert torch.equal(run(made, *given), expected)


def test_blocks_left_out_repeated_or_in_another_order():
    made = toy(7)
    x = torch.randn(3, 8)
    orders = [[0, 1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1, 0], [2, 2, 5, 5, 3], [0, 4, 6, 4, 1]]
    whole = copy.deepcopy(made)
    with BlockSwap(made, 6, "cpu"), torch.no_grad():
        for order in orders * 2:
            y = z = x
            for i in order:
                y, z = made.blocks[i](y), whole.blocks[i](z)
            assert torch.equal(y, z), order


def test_a_block_that_raises_leaves_the_swap_usable():
    made = toy()
    x = torch.randn(3, 8)
    expected = run(made, x)
    with BlockSwap(made, 5, "cpu"):
        made.blocks[2].fail = True
        with pytest.raises(ArithmeticError, match="planted"):
            run(made, x)
        made.blocks[2].fail = False
        assert torch.equal(run(made, x), expected)
    assert torch.equal(run(made, x), expected)


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


# -- compiled blocks ---------------------------------------------------------------------------


@pytest.mark.parametrize("count", [4, 5])
@pytest.mark.parametrize("first", ["attach", "compile"])
@pytest.mark.parametrize("recipe", [None, FP8])
def test_blocks_compile_once_and_never_again(count, first, recipe):
    made = model(recipe=recipe)
    given = inputs(made)
    expected = run(made, *given)
    counter = CompileCounter()
    swapped = BlockSwap(made, count, "cpu")
    for step in (first, {"attach": "compile", "compile": "attach"}[first]):
        if step == "attach":
            swapped.attach()
        else:
            made.compile_blocks(backend=counter, fullgraph=True, dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            assert torch.equal(run(made, *given), expected)
        swapped.detach()
        swapped.attach()  # the same object: the same classes, so the same compiled code
        assert torch.equal(run(made, *given), expected)
    assert counter.frame_count == 1


def test_blocks_wrapped_by_torch_compile():
    made = model()
    given = inputs(made)
    expected = run(made, *given)
    counter = CompileCounter()
    for i, each in enumerate(made.blocks):
        made.blocks[i] = torch.compile(each, backend=counter, fullgraph=True)
    names = made.state_dict().keys()
    with (
        BlockSwap(made, 4, "cpu"),
        torch._dynamo.config.patch(error_on_recompile=True),
    ):
        for _ in range(3):
            assert torch.equal(run(made, *given), expected)
        assert made.state_dict().keys() == names
    assert counter.frame_count == 1
    assert torch.equal(run(made, *given), expected)


def test_contig_safe_compiles_swapped_blocks():
    made = model(recipe=FP8)
    given = inputs(made)
    expected = run(made, *given)
    with BlockSwap(made, 4, "cpu"):
        made.compile_blocks(
            backend="contig_safe", fullgraph=True, options={"inner": "aot_eager"}
        )
        with torch._dynamo.config.patch(error_on_recompile=True):
            torch.testing.assert_close(run(made, *given), expected)
            torch.testing.assert_close(run(made, *given), expected)
    assert len(contig_pass.last_reports()) == 1


def test_a_model_compiled_whole_breaks_at_the_swap_and_is_right():
    made = toy()
    x = torch.randn(3, 8)
    expected = run(made, x)
    with BlockSwap(made, 4, "cpu"):
        whole = torch.compile(made, backend="eager")
        assert torch.equal(run(whole, x), expected)
        assert torch.equal(run(whole, x), expected)
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match="compile block by block"):
            run(torch.compile(made, backend="eager", fullgraph=True), x)


# -- layers attached later ---------------------------------------------------------------------


def test_layers_attached_while_swapped_are_taken_in():
    made, whole = model(), model()
    given = inputs(made)
    with BlockSwap(made, 4, "cpu") as swapped:
        assert torch.equal(run(made, *given), run(whole, *given))
        for each in (made, whole):
            torch.manual_seed(1)
            addons.attach(each, "multitalk")
        before = swapped.host_bytes
        given = inputs(made, addons=["multitalk"])
        expected = run(whole, *given)
        assert not torch.equal(expected, run(whole, *given[:5], BlockConditions()))
        assert torch.equal(run(made, *given), expected)
        assert torch.equal(run(made, *given), expected)
        added = sum(t.nbytes for each in whole.blocks[1:] for name, t in tensors(each).items()
                    if name.startswith(("norm_x", "audio_cross_attn")))
        assert swapped.host_bytes - before >= added
        addresses = {name: t.data_ptr() for name, t in tensors(made.blocks).items()}
        run(made, *given)
        assert {name: t.data_ptr() for name, t in tensors(made.blocks).items()} == addresses
    assert torch.equal(run(made, *given), expected)


@pytest.mark.parametrize("late", [False, True])
def test_lora_strengths_can_be_changed_while_swapped(late):
    made, whole = model(recipe=FP8), model(recipe=FP8)
    given = inputs(made)

    def attach(to: WanModel) -> None:
        torch.manual_seed(2)
        for each in to.blocks:
            attach_lora(each.self_attn.q, torch.randn(4, 128), torch.randn(128, 4), strength=0.1)

    attach(whole)
    if not late:
        attach(made)
    with BlockSwap(made, 5, "cpu"):
        if late:
            run(made, *given)
            attach(made)
        plain = run(made, *given)
        assert torch.equal(plain, run(whole, *given))
        for strength in (0.7, -0.3):
            set_lora_strength(made, strength)
            set_lora_strength(whole, strength)
            changed = run(made, *given)
            assert not torch.equal(changed, plain)
            assert torch.equal(changed, run(whole, *given))
            assert torch.equal(changed, run(made, *given))
    assert torch.equal(run(made, *given), changed)


# -- state -------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [None, FP4])
def test_state_dict_gives_the_values_of_every_block(recipe):
    made = model(recipe=recipe)
    expected = {name: bits(t) for name, t in made.state_dict().items()}
    given = inputs(made)
    with BlockSwap(made, 4, "cpu"):
        run(made, *given)
        held = {name: bits(t) for name, t in tensors(made).items()}
        state = made.state_dict()
        assert {name: bits(t) for name, t in state.items()} == expected
        # Of the tensors themselves two blocks' at most are right at any time.
        wrong = [name for name, value in expected.items() if held[name] != value]
        assert {name.split(".")[1] for name in wrong} >= {"3", "4"}
        with pytest.raises(RuntimeError, match=r"blocks\.1 is swapped .* before loading"):
            made.load_state_dict(state)
    made.load_state_dict(state)


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


# -- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize("count", [-1, 6])
def test_count_out_of_range(count):
    with pytest.raises(ValueError, match=rf"count={count}: use 0 to 5, the number of blocks"):
        BlockSwap(toy(5), count, "cpu")


def test_no_blocks_or_the_same_block_twice():
    with pytest.raises(ValueError, match="Linear has no blocks: use a module with a list"):
        BlockSwap(nn.Linear(2, 2), 1, "cpu")
    with pytest.raises(ValueError, match="list has no blocks"):
        BlockSwap([torch.zeros(1)], 1, "cpu")
    one = ToyBlock(torch.eye(8))
    with pytest.raises(ValueError, match="a block is in the list twice"):
        BlockSwap([one, one], 1, "cpu")


def test_another_kind_of_device():
    with pytest.raises(ValueError, match="device=meta: use a CUDA device or the CPU"):
        BlockSwap(toy(), 1, "meta")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device=cuda: this machine has no CUDA device"):
            BlockSwap(toy(), 1, "cuda")


def test_tensors_without_values():
    made = toy()
    with torch.device("meta"):
        made.blocks[3] = ToyBlock(torch.empty(8, 8))
    with pytest.raises(ValueError, match=r"blocks\.3\.weight is on the meta device"):
        BlockSwap(made, 2, "cpu").attach()
    assert type(made.blocks[4]) is ToyBlock
    made = toy()
    with torch.device("meta"):
        made.blocks[0] = ToyBlock(torch.empty(8, 8))
    with pytest.raises(ValueError, match=r"blocks\.0\.weight is on the meta device"):
        BlockSwap(made, 2, "cpu").attach()


def test_tensors_on_several_devices_or_none():
    made = toy()
    made.blocks[4].other = nn.Parameter(torch.empty(3, device="meta"), requires_grad=False)
    with pytest.raises(ValueError, match=r"blocks\.4\.other is on the meta device"):
        BlockSwap(made, 2, "cpu").attach()
    with pytest.raises(ValueError, match="block 1 has tensors on no device: it has none"):
        BlockSwap([ToyBlock(torch.eye(8)), nn.GELU()], 1, "cpu").attach()


def test_tensor_subclasses():
    class Wrapped(torch.Tensor):
        pass

    made = toy()
    made.blocks[4].register_buffer("odd", torch.zeros(4).as_subclass(Wrapped))
    with pytest.raises(ValueError, match=r"blocks\.4\.odd is a Wrapped: only plain tensors"):
        BlockSwap(made, 2, "cpu").attach()


@pytest.mark.parametrize("other", [0, 3])
def test_tensors_shared_with_another_block(other):
    made = toy()
    made.blocks[other].weight = made.blocks[4].weight
    with pytest.raises(ValueError, match=r"swapped blocks cannot share tensors"):
        BlockSwap(made, 2, "cpu").attach()


def test_two_names_of_one_tensor_in_a_block():
    made = toy()
    for each in made.blocks:
        each.same = each.weight
    expected = run(made, torch.ones(1, 8))
    with BlockSwap(made, 4, "cpu"):
        assert torch.equal(run(made, torch.ones(1, 8)), expected)
        state = made.state_dict()
        assert all(torch.equal(state[f"blocks.{i}.same"], state[f"blocks.{i}.weight"])
                   for i in range(5))
        assert all(each.same is each.weight for each in made.blocks)


def test_attaching_twice_and_detaching_what_is_not_attached():
    made = toy()
    swapped = BlockSwap(made, 2, "cpu")
    with pytest.raises(RuntimeError, match="not swapped"):
        swapped.detach()
    with swapped:
        for other in (swapped, BlockSwap(made, 3, "cpu")):
            with pytest.raises(RuntimeError, match="swapped already"):
                other.attach()


def test_gradients():
    made = toy()
    with BlockSwap(made, 2, "cpu"):
        with pytest.raises(RuntimeError, match=r"blocks\.3 is swapped .* torch\.no_grad"):
            made(torch.ones(1, 8))
        run(made, torch.ones(1, 8))


def test_a_copy_of_a_swapped_block():
    made = toy()
    with BlockSwap(made, 2, "cpu"):
        other = copy.deepcopy(made.blocks[4])
        with pytest.raises(RuntimeError, match="copy it after detach"):
            run(other, torch.ones(1, 8))


def _replace(each: ToyBlock) -> None:
    each.weight = nn.Parameter(torch.ones(8, 8), requires_grad=False)


def _remove(each: ToyBlock) -> None:
    del each.weight


def _write(each: ToyBlock) -> None:
    with torch.no_grad():
        each.weight.add_(1)


def _cast(each: ToyBlock) -> None:
    each.double()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (_replace, "replaced or removed"),
        (_remove, "replaced or removed"),
        (_write, "written to"),
        (_cast, "moved or cast"),
    ],
)
def test_tensors_changed_while_swapped(change, what):
    made = toy()
    x = torch.ones(1, 8)
    expected = run(made, x)
    message = rf"blocks\.4\.weight was {what} while its block was swapped: detach\(\) before"
    swapped = BlockSwap(made, 3, "cpu").attach()
    run(made, x)
    change(made.blocks[4])
    with pytest.raises(RuntimeError, match=message):
        run(made, x)
    with pytest.raises(RuntimeError, match=message):
        swapped.detach()
    assert not swapped.attached
    if change in (_write, _cast):  # the object is the same: it has its old value again
        assert torch.equal(run(made, x), expected)


def test_a_failure_while_attaching_changes_nothing(monkeypatch):
    made = model()
    given = inputs(made)
    expected = run(made, *given)
    addresses = {name: t.data_ptr() for name, t in tensors(made.blocks[0]).items()}
    left = [3]

    class Failing(memory.Host):
        def __init__(self, *args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                raise MemoryError("planted")
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(block, "Host", Failing)
    swapped = BlockSwap(made, 5, "cpu")
    with pytest.raises(MemoryError, match="planted"):
        swapped.attach()
    assert not swapped.attached
    assert torch.equal(run(made, *given), expected)
    assert {n: t.data_ptr() for n, t in tensors(made.blocks[4]).items()} != addresses
    with swapped:
        assert torch.equal(run(made, *given), expected)


def test_where_a_checkpoint_s_tensors_belong():
    swapped = BlockSwap(toy(5), 2, "cpu")
    swapped.device = torch.device("cuda", 0)
    homes = {name: swapped.device_of(name).type for name in (
        "head.head.weight", "blocks.2.weight", "blocks.3.weight", "blocks.4.weight", "blocks"
    )}
    assert list(homes.values()) == ["cuda", "cuda", "cpu", "cpu", "cuda"]
    with pytest.raises(ValueError, match="a list of blocks has no names"):
        BlockSwap(list(toy().blocks), 2, "cpu").device_of("blocks.0.weight")
