"""Block swap on the CPU: the same results, one compile, layers attached later, state."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import contig_pass
from tests.wan_models.block_swap_models import GRID, SMALL, bits, inputs, model, run, tensors, toy
from wan_models import BlockConditions, WanModel, addons, model_inputs, zoo
from wan_models.block_swap import BlockSwap
from wan_models.quant import attach_lora, set_lora_strength

#: On a CPU the recipes that dequantise are quick, and hold the same buffers as the fast ones.
FP8, FP4 = "fp8_e4m3fn_scaled", "fp4_scaled"


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
