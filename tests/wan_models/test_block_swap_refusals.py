"""What block swap refuses, and that a refusal or a failure changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.wan_models.block_swap_models import ToyBlock, inputs, model, run, tensors, toy
from wan_models.block_swap import BlockSwap, block, memory

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
