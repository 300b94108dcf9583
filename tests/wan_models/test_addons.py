"""Layers attached after construction: names, order of the branches, what they refuse."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from wan_models import (
    CONFIGS,
    TINY,
    BlockConditions,
    WanBlock,
    WanConfig,
    WanModel,
    addons,
    block_conditions,
    block_inputs,
    model_inputs,
    quantize_,
    rope_table,
)
from wan_models.attention.radial import RadialPattern

#: No two of the sizes that come from the grid are equal: see torch's duck shaping.
GRIDS = ((5, 4, 7), (8, 6, 9))
GRID = GRIDS[0]


def model_with(*names: str, config: WanConfig = TINY) -> WanModel:
    torch.manual_seed(0)
    model = WanModel(config).eval().requires_grad_(False)
    for name in names:
        addons.attach(model, name)
    return model.requires_grad_(False)


def attached_shapes(name: str, config: WanConfig) -> dict[str, tuple[int, ...]]:
    """Official names and shapes of what an add-on brings."""
    c = config.dim
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(key: str, n: int, k: int, *, bias: bool = True) -> None:
        shapes[f"{key}.weight"] = (n, k)
        if bias:
            shapes[f"{key}.bias"] = (n,)

    def norm(key: str, width: int) -> None:
        shapes[f"{key}.weight"] = shapes[f"{key}.bias"] = (width,)

    def attention(key: str, source: int) -> None:
        for leaf, width in (("q", c), ("k", source), ("v", source), ("o", c)):
            linear(f"{key}.{leaf}", c, width)
        shapes[f"{key}.norm_q.weight"] = shapes[f"{key}.norm_k.weight"] = (c,)

    for index in range(config.num_layers):
        block = f"blocks.{index}"
        if name == "fantasytalking":
            linear(f"{block}.cross_attn.k_proj", c, 2048, bias=False)
            linear(f"{block}.cross_attn.v_proj", c, 2048, bias=False)
        elif name == "fantasyportrait":
            for leaf in "kv":
                key = f"{block}.cross_attn.ip_adapter_single_stream_{leaf}_proj"
                linear(key, c, 2048, bias=False)
        elif name == "multitalk":
            norm(f"{block}.norm_x", c)
            linear(f"{block}.audio_cross_attn.q_linear", c, c)
            linear(f"{block}.audio_cross_attn.kv_linear", 2 * c, 768)
            linear(f"{block}.audio_cross_attn.proj", c, c)
        elif name == "humo":
            norm(f"{block}.audio_cross_attn_wrapper.norm1_audio", c)
            attention(f"{block}.audio_cross_attn_wrapper.audio_cross_attn", 1536)
        elif name == "mtvcrafter" and index % 4 == 0:
            norm(f"{block}.norm4", c)
            attention(f"{block}.motion_attn", c)
        elif name == "ovi":
            linear(f"{block}.cross_attn.k_fusion", c, c)
            linear(f"{block}.cross_attn.v_fusion", c, c)
            norm(f"{block}.cross_attn.pre_attn_norm_fusion", c)
            shapes[f"{block}.cross_attn.norm_k_fusion.weight"] = (c,)
    if name == "multitalk":
        linear("multitalk_audio_proj.proj1", 512, 46_080)
        linear("multitalk_audio_proj.proj1_vf", 512, 73_728)
        linear("multitalk_audio_proj.proj2", 512, 512)
        linear("multitalk_audio_proj.proj3", 32 * 768, 512)
        norm("multitalk_audio_proj.norm", 768)
    elif name == "humo":
        for number, (n, k) in enumerate(((512, 51_200), (512, 512), (16 * 1536, 512)), 1):
            linear(f"audio_proj.audio_proj_glob_{number}.layer", n, k)
        norm("audio_proj.audio_proj_glob_norm.layer", 1536)
    return shapes


@pytest.mark.parametrize("name", addons.NAMES)
def test_names_and_shapes_are_the_official_ones(name):
    config = CONFIGS["i2v-14b"]
    with torch.device("meta"):
        model = WanModel(config)
        before = set(model.state_dict())
    addons.attach(model, name)
    brought = {
        key: tuple(tensor.shape)
        for key, tensor in model.state_dict().items()
        if key not in before
    }
    assert brought == attached_shapes(name, config)
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("name", addons.NAMES)
def test_layers_take_type_and_mode_of_the_model(name):
    model = WanModel(TINY, "sdpa_math").bfloat16().eval()
    addons.attach(model, name)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any(module.training for module in model.modules())
    modes = {module.mode for module in model.modules() if hasattr(module, "mode")}
    assert modes == {"sdpa_math"}


@pytest.mark.parametrize("name", addons.NAMES)
def test_attached_layers_are_quantised_with_the_rest(name):
    model = model_with(name).bfloat16()
    plain = {key for key, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    rows = quantize_(model, "fp8_e4m3fn_scaled")
    assert {row.name for row in rows} == plain
    assert all(row.action == "quantised" for row in rows)
    inputs = model_inputs(TINY, GRID, batch=2, addons=[name])
    assert model(*inputs).isfinite().all()


@pytest.mark.parametrize("name", addons.NAMES)
@pytest.mark.parametrize("batch", [1, 2])
def test_every_condition_reaches_the_result(name, batch):
    model = model_with(name)
    inputs = model_inputs(TINY, GRID, batch=batch, addons=[name])
    plain = model(*inputs._replace(conditions=BlockConditions()))
    out = model(*inputs)
    assert (out - plain).norm() > 1e-4 * plain.norm()
    # Batch rows do not mix.
    if batch == 2:
        first = model_inputs(TINY, GRID, batch=2, addons=[name])
        alone = model(*one_sample(first))
        torch.testing.assert_close(alone, out[:1], rtol=1e-4, atol=1e-5)


def one_sample(inputs):
    """The first of two samples; MultiTalk's audio holds all frames of one after the other's."""
    def cut(value):
        return value[: len(value) // 2] if isinstance(value, torch.Tensor) else value

    conditions, cross = inputs.conditions, inputs.conditions.cross
    cross = cross._replace(
        audio=cut(cross.audio), adapter=cut(cross.adapter), fusion=cut(cross.fusion),
        fusion_lens=cut(cross.fusion_lens),
    )
    conditions = conditions._replace(
        cross=cross,
        motion=cut(conditions.motion),
        multitalk_audio=cut(conditions.multitalk_audio),
        humo_audio=cut(conditions.humo_audio),
    )
    return [*map(cut, inputs[:-1]), conditions]


# -- branches of a block -------------------------------------------------------------------------


class Recorded(torch.nn.Module):
    """Returns its own value and keeps what it was called with."""

    def __init__(self, name: str, calls: list, *, maps: torch.Tensor | None = None) -> None:
        super().__init__()
        self.name, self.calls, self.maps = name, calls, maps
        self.q = self.k = self.v = None  # no linears that take quantised rows
        generator = torch.Generator().manual_seed(len(name))
        self.value = torch.randn(2, 140, TINY.dim, generator=generator)

    def forward(self, *args: object) -> torch.Tensor:
        self.calls.append((self.name, args))
        return self.value

    def forward_multitalk(self, *args: object) -> tuple[torch.Tensor, torch.Tensor]:
        return self(*args), self.maps

    def __getitem__(self, index: int) -> None:
        """Of the feed-forward: nor has it such linears."""


def recorded_block() -> tuple[WanBlock, list]:
    """A block with every add-on of its own, all its parts replaced."""
    block = model_with("multitalk", "humo", "mtvcrafter").blocks[0]
    calls: list = []
    block.self_attn = Recorded("self", calls, maps=torch.rand(3, 140))
    speech = ("audio_cross_attn", "audio_cross_attn_wrapper")
    for name in ("cross_attn", "motion_attn", *speech, "ffn"):
        setattr(block, name, Recorded(name, calls))
    for number, norm in enumerate((block.norm3, block.norm4, block.norm_x)):
        torch.nn.init.normal_(norm.weight, mean=1 + number)
        torch.nn.init.normal_(norm.bias)
    return block, calls


def affine(x: torch.Tensor, norm: torch.nn.LayerNorm) -> torch.Tensor:
    x = x.double()
    centred = x - x.mean(-1, keepdim=True)
    x = centred / (centred.square().mean(-1, keepdim=True) + TINY.eps).sqrt()
    return x * norm.weight.double() + norm.bias.double()


def test_branches_follow_the_cross_attention_in_the_reference_order():
    block, calls = recorded_block()
    x, e0, context, rope = block_inputs(TINY, GRID, batch=2)
    conditions = block_conditions(TINY, GRID, ["multitalk", "humo", "mtvcrafter"], batch=2)
    conditions = conditions._replace(
        motion_scale=torch.tensor(0.5), multitalk_scale=2.0, humo_scale=torch.tensor(-1.5)
    )
    out = block(x, e0, context, rope, None, conditions)
    names = ["self", "cross_attn", "motion_attn", "audio_cross_attn", "audio_cross_attn_wrapper"]
    assert [name for name, _ in calls] == [*names, "ffn"]
    arguments = dict(calls)
    e = block.modulation.double() + e0.double()
    values = {name: getattr(block, name).value.double() for name in (*names[1:], "ffn")}
    stream = x.double() + block.self_attn.value.double() * e[:, 2:3]
    close = {"rtol": 1e-5, "atol": 1e-5}
    cross_x, cross_context, cross = arguments["cross_attn"]
    torch.testing.assert_close(cross_x.double(), affine(stream, block.norm3), **close)
    assert cross_context is context
    assert cross is conditions.cross
    stream = stream + values["cross_attn"]
    moved = arguments["motion_attn"]
    torch.testing.assert_close(moved[0].double(), affine(stream, block.norm4), **close)
    assert moved[1] is rope
    assert moved[2] is conditions.motion
    assert moved[3] is conditions.motion_rope
    stream = stream + 0.5 * values["motion_attn"]
    heard = arguments["audio_cross_attn"]
    torch.testing.assert_close(heard[0].double(), affine(stream, block.norm_x), **close)
    assert heard[1] is conditions.multitalk_audio
    assert heard[2] == GRID
    assert heard[3] is block.self_attn.maps  # made by this block's own self-attention
    stream = stream + 2.0 * values["audio_cross_attn"]
    wrapped = arguments["audio_cross_attn_wrapper"]
    torch.testing.assert_close(wrapped[0].double(), stream, **close)
    assert wrapped[1] is conditions.humo_audio
    stream = stream - 1.5 * values["audio_cross_attn_wrapper"]
    stream = stream + values["ffn"] * e[:, 5:6]
    torch.testing.assert_close(out.double(), stream, **close)


def test_humo_norms_before_it_attends():
    branch = model_with("humo").blocks[0].audio_cross_attn_wrapper
    torch.nn.init.normal_(branch.norm1_audio.weight)
    x, audio = torch.randn(2, 140, TINY.dim), torch.randn(2, 5 * 16, 1536)
    normed = affine(x, branch.norm1_audio).float()
    expected = branch.audio_cross_attn(normed, audio, GRID)
    torch.testing.assert_close(branch(x, audio, GRID), expected)


def test_motion_goes_to_the_blocks_that_have_its_layers():
    model = model_with("mtvcrafter", config=replace(TINY, num_layers=6))
    with_layers = [index for index, block in enumerate(model.blocks) if block.motion_attn]
    assert with_layers == [0, 4]
    seen = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: seen.append(args[5].motion is not None))
    model(*model_inputs(TINY, GRID, addons=["mtvcrafter"]))
    assert seen == [True, False, False, False, True, False]


def test_maps_may_be_given_instead_of_masks():
    block = model_with("multitalk").blocks[0]
    x, e0, context, rope = block_inputs(TINY, GRID)
    conditions = block_conditions(TINY, GRID, ["multitalk"])
    made = block(x, e0, context, rope, None, conditions)
    normed = block.norm1(x) * (1 + (block.modulation + e0)[:, 1:2]) + (block.modulation + e0)[:, :1]
    _, maps = block.self_attn.forward_multitalk(normed, rope, GRID, conditions.multitalk_masks)
    given = conditions._replace(multitalk_masks=None, multitalk_maps=maps)
    torch.testing.assert_close(block(x, e0, context, rope, None, given), made)


def test_frames_in_groups_and_sparse_attention():
    torch.manual_seed(0)
    block, inputs = WanBlock(TINY).eval(), block_inputs(TINY, GRID)
    with torch.no_grad():
        plain = block(*inputs)
        one = block(*inputs, None, BlockConditions(grid=GRID, chunks=1))
        five = block(*inputs, None, BlockConditions(grid=GRID, chunks=5))
    torch.testing.assert_close(one, plain)
    assert (five - plain).abs().max() > 1e-3
    # Each group on its own is the same block on that frame alone.
    frame = inputs._replace(
        x=inputs.x[:, 28:56], rope=rope_table((2, 4, 7), TINY.head_dim)[:, 28:]
    )
    with torch.no_grad():
        torch.testing.assert_close(block(*frame), five[:, 28:56])

    grid = (4, 8, 8)
    sparse, inputs = WanBlock(TINY, "radial").eval(), block_inputs(TINY, grid)
    dense = WanBlock(TINY).eval()
    dense.load_state_dict(sparse.state_dict())
    pattern = RadialPattern(grid, block=64)
    with torch.no_grad():
        told = sparse(*inputs, None, BlockConditions(radial=pattern, radial_dense=True))
        torch.testing.assert_close(told, dense(*inputs))
        out = sparse(*inputs, None, BlockConditions(radial=pattern))
        x, e0, _, rope = inputs
        e = dense.modulation + e0
        y = dense.norm1(x) * (1 + e[:, 1:2]) + e[:, :1]
        dense.self_attn = Recorded("self", [])
        dense.self_attn.value = sparse.self_attn.forward_radial(y, rope, pattern)
        torch.testing.assert_close(out, dense(*inputs))


# -- compiling -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", addons.NAMES)
def test_strengths_and_resolutions_recompile_nothing(name):
    model = model_with(name)
    blocks = 2 if name == "mtvcrafter" else 1  # with and without its layers
    counter = CompileCounter()
    expected = {}
    for grid in GRIDS:
        for strength in (1.0, 0.25):
            expected[grid, strength] = model(*at_strength(grid, strength, name))
    model.compile_blocks(backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for grid, strength in expected:
            out = model(*at_strength(grid, strength, name))
            assert torch.equal(out, expected[grid, strength])
            assert counter.frame_count == blocks
    if name != "ovi":  # its tokens have no strength
        assert not torch.equal(expected[GRID, 1.0], expected[GRID, 0.25])


def at_strength(grid: tuple[int, int, int], strength: float, name: str):
    inputs = model_inputs(TINY, grid, addons=[name])
    cross = inputs.conditions.cross._replace(audio_scale=strength, adapter_scale=strength)
    conditions = inputs.conditions._replace(
        cross=cross, motion_scale=strength, multitalk_scale=strength, humo_scale=strength
    )
    return inputs._replace(conditions=conditions)


# -- bad input -----------------------------------------------------------------------------------


def of_block(*, mode: str = "sdpa", lens: bool = False, **conditions: object) -> None:
    with torch.device("meta"):
        block = WanBlock(TINY, mode)
    inputs = block_inputs(TINY, GRID, device="meta")
    seq_lens = torch.empty(1, device="meta") if lens else None
    block(*inputs, seq_lens, BlockConditions(**conditions))


def twice(name: str) -> None:
    with torch.device("meta"):
        model = WanModel(TINY)
    addons.attach(model, name)
    addons.attach(model, name)


T = torch.empty(1, device="meta")
PATTERN = RadialPattern((2, 8, 8), block=64)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda: addons.attach(WanModel(TINY), "talk"), "add-on 'talk': use one of 'fantasy"),
        *((lambda name=name: twice(name), "attached already") for name in addons.NAMES),
        (lambda: of_block(motion=T), r"no motion_attn: .*attach\(model, 'mtvcrafter'\)"),
        (lambda: of_block(multitalk_audio=T), r"no audio_cross_attn: .*'multitalk'\)"),
        (lambda: of_block(humo_audio=T), r"no audio_cross_attn_wrapper: .*'humo'\)"),
        (lambda: of_block(multitalk_masks=T), "multitalk_masks is given without grid"),
        (lambda: of_block(chunks=2), "chunks is given without grid"),
        (lambda: of_block(multitalk_masks=T, multitalk_maps=T), "not both"),
        (lambda: of_block(multitalk_masks=T, chunks=2), "multitalk_masks and conditions.chunks"),
        (lambda: of_block(mode="radial", chunks=2), "'radial' and conditions.chunks"),
        (lambda: of_block(mode="radial"), "needs conditions.radial"),
        (lambda: of_block(mode="radial", radial=PATTERN, lens=True), "takes no padding"),
        (lambda: of_block(chunks=2, grid=GRID, lens=True), "takes no padding"),
        (lambda: of_block(radial=PATTERN), "conditions.radial is given, but the attention mode is"),
    ],
)
def test_bad_input_is_named(broken, message):
    with pytest.raises(ValueError, match=message) as raised:
        broken()
    assert "\n" not in str(raised.value)


def test_motion_needs_its_rotary_table():
    model = model_with("mtvcrafter")
    inputs = model_inputs(TINY, GRID, addons=["mtvcrafter"])
    conditions = inputs.conditions._replace(motion_rope=None)
    with pytest.raises(ValueError, match="without motion_rope"):
        model(*inputs._replace(conditions=conditions))
