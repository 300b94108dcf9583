"""Five scenarios on quantised linears: their modules, inputs and float64 references.

A reference reads the module's own dequantised weights and computes in float64, by plain loops, so
that what is left between the two is the rounding of activations: to bf16, and to e4m3 in front of
every product of a fast recipe.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from tests.wan_models import attention_reference as ref
from tests.wan_models.test_motion_attention import motion_angles
from wan_models.attention import (
    CrossConditions,
    MTVCrafterMotionAttention,
    SingleStreamMultiAttention,
    WanCrossAttention,
    WanI2VCrossAttention,
    WanSelfAttention,
)
from wan_models.config import CLIP_TOKENS
from wan_models.embeddings import ImageEmbedding
from wan_models.inputs import (
    ADAPTER_TOKENS,
    ADAPTER_WIDTH,
    AUDIO_TOKENS,
    MULTITALK_TOKENS,
    MULTITALK_WIDTH,
)
from wan_models.layers import WanLayerNorm
from wan_models.quant import QuantizedLinear, quantize_
from wan_models.rope import motion_rope_table, rope_table

#: The head dimension of every Wan model, and the fewest heads and tokens that show an order.
HEADS, WIDTH, DIM = 2, 128, 256
GRID = (3, 2, 2)
FRAMES, FRAME, TOKENS = 3, 4, 12
TEXT = 7
CLIP_WIDTH = 64
JOINTS = 5
BF16 = torch.bfloat16
ROPE = rope_table(GRID, WIDTH)
WIDTHS, MOTION_WIDTHS = (44, 42, 42), (44, 28, 28, 28)
JOINT_MEANS = 5 * ref.normal(JOINTS, 3, seed=9) + 2
MOTION_ROPE = motion_rope_table(FRAMES, JOINT_MEANS, WIDTH)
#: The frame's tokens of the first person, of the second, and of the background.
MASKS = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1]]).float()


class Scenario(NamedTuple):
    """One of the five.

    Attributes:
        seed_recipe: the quantisation that the scenario is about.
        module: makes it, in fp32.
        inputs: its arguments for B samples, in bf16.
        expected: of its exact twin, the arguments in float64 and its actual results, the results.
        attentions: calls of attention.
        skip: linears that stay in high precision.
    """

    seed_recipe: str
    module: Callable[[], nn.Module]
    inputs: Callable[[int], tuple]
    expected: Callable[[nn.Module, tuple, tuple], tuple[torch.Tensor, ...]]
    attentions: int
    skip: tuple[str, ...] = ()

    def quantised(self, recipe: str) -> nn.Module:
        """The module in bf16 with quantised linears."""
        made = randomise(self.module()).to(BF16)
        quantize_(made, recipe, skip=self.skip)
        return made


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Weights at which activations keep their size and every part moves the result."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        mean, std = 0.0, 0.3
        if name.endswith("weight"):
            is_norm = parameter.dim() == 1
            mean, std = (1.2, 0.4) if is_norm else (0.0, parameter[0].numel() ** -0.5)
        with torch.no_grad():
            parameter.normal_(mean, std, generator=generator)
    return module.eval()


def quantised_layers(module: nn.Module) -> dict[str, QuantizedLinear]:
    """By name."""
    named = module.named_modules()
    return {name: layer for name, layer in named if isinstance(layer, QuantizedLinear)}


def exact(module: nn.Module) -> nn.Module:
    """``module`` in float64, every quantised linear replaced by one of its dequantised weight."""
    made = copy.deepcopy(module)
    for name, layer in quantised_layers(made).items():
        twin = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        twin.weight.data = layer.dequantised(torch.float64)
        if layer.bias is not None:
            twin.bias.data = layer.bias
        parent, _, leaf = name.rpartition(".")
        setattr(made.get_submodule(parent), leaf, twin)
    return made.double()


def wide(inputs: Any) -> Any:
    """The arguments with every bf16 tensor in float64."""
    return torch.utils._pytree.tree_map(
        lambda x: x.double() if torch.is_tensor(x) and x.dtype == BF16 else x, inputs
    )


def bf16(*shape: int, seed: int) -> torch.Tensor:
    return ref.normal(*shape, seed=seed).to(BF16)


def heads(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(*x.shape[:-1], HEADS, WIDTH)


def query(attn: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return heads(ref.rms(attn.norm_q, ref.linear(attn.q, x)))


def key_value(attn: nn.Module, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return heads(ref.rms(attn.norm_k, ref.linear(attn.k, source))), heads(
        ref.linear(attn.v, source)
    )


def angles() -> list[list[float]]:
    return ref.grid_angles(GRID, WIDTHS)


# -- self-attention ------------------------------------------------------------------------------


def _self_inputs(batch: int) -> tuple:
    return bf16(batch, TOKENS, DIM, seed=1), ROPE


def _self_expected(attn: nn.Module, inputs: tuple, _: tuple) -> tuple[torch.Tensor, ...]:
    x = inputs[0]
    k, v = key_value(attn, x)
    q, k = ref.turn(query(attn, x), angles()), ref.turn(k, angles())
    return (ref.linear(attn.o, ref.softmax_attention(q, k, v).flatten(2)),)


# -- cross-attention with audio and adapter ------------------------------------------------------

#: FantasyPortrait's features are those of the first frames.
PORTRAIT_FRAMES = 2


def _cross() -> WanCrossAttention:
    attn = WanCrossAttention(DIM, HEADS)
    attn.attach_audio()
    attn.attach_adapter()
    return attn


def _cross_inputs(batch: int) -> tuple:
    given = CrossConditions(
        audio=bf16(batch, FRAMES, AUDIO_TOKENS, ADAPTER_WIDTH, seed=3),
        audio_scale=0.8,
        adapter=bf16(batch, PORTRAIT_FRAMES, ADAPTER_TOKENS, ADAPTER_WIDTH, seed=4),
        adapter_scale=-1.3,
        adapter_tokens=PORTRAIT_FRAMES * FRAME,
    ).as_tensors()
    return bf16(batch, TOKENS, DIM, seed=1), bf16(batch, TEXT, DIM, seed=2), given


def side_branch(
    q: torch.Tensor, states: torch.Tensor, to_k: nn.Module, to_v: nn.Module
) -> torch.Tensor:
    """(B, L, C): every frame's tokens attend to that frame's states (B, T, A, width)."""
    k, v = heads(ref.linear(to_k, states)), heads(ref.linear(to_v, states))
    return ref.per_frame_attention(q, k, v, states.shape[1]).flatten(2)


def _cross_expected(attn: nn.Module, inputs: tuple, _: tuple) -> tuple[torch.Tensor, ...]:
    x, context, given = inputs
    q = query(attn, x)
    out = ref.softmax_attention(q, *key_value(attn, context)).flatten(2)
    out = out + float(given.audio_scale) * side_branch(q, given.audio, attn.k_proj, attn.v_proj)
    prefix = PORTRAIT_FRAMES * FRAME
    out[:, :prefix] += float(given.adapter_scale) * side_branch(
        q[:, :prefix], given.adapter,
        attn.ip_adapter_single_stream_k_proj, attn.ip_adapter_single_stream_v_proj,
    )
    return (ref.linear(attn.o, out),)


# -- image-to-video cross-attention with image features ------------------------------------------


class ImageToVideo(nn.Module):
    """The image's embedding, and the cross-attention that reads it beside the text.

    Args:
        concatenated: hand the image on in front of the text, not in the conditions.
    """

    def __init__(self, concatenated: bool = False) -> None:
        super().__init__()
        self.img_emb = ImageEmbedding(CLIP_WIDTH, DIM)
        own = CLIP_TOKENS if concatenated else 0
        self.cross_attn = WanI2VCrossAttention(DIM, HEADS, image_tokens=own)
        self.concatenated = concatenated

    def forward(
        self, x: torch.Tensor, context: torch.Tensor, clip_embed: torch.Tensor
    ) -> torch.Tensor:
        image = self.img_emb(clip_embed)
        if self.concatenated:
            return self.cross_attn(x, torch.cat([image, context], dim=1))
        return self.cross_attn(x, context, CrossConditions(image=image))


def _i2v_inputs(batch: int) -> tuple:
    clip = bf16(batch, CLIP_TOKENS, CLIP_WIDTH, seed=3)
    return bf16(batch, TOKENS, DIM, seed=1), bf16(batch, TEXT, DIM, seed=2), clip


def _i2v_expected(model: nn.Module, inputs: tuple, _: tuple) -> tuple[torch.Tensor, ...]:
    x, context, clip = inputs
    norm, first, _, second, last = model.img_emb.proj
    hidden = ref.linear(first, ref.layer_norm(norm, clip))
    hidden = hidden / 2 * (1 + torch.erf(hidden / 2**0.5))
    image = ref.layer_norm(last, ref.linear(second, hidden))
    attn = model.cross_attn
    q = query(attn, x)
    out = ref.softmax_attention(q, *key_value(attn, context)).flatten(2)
    k = heads(ref.rms(attn.norm_k_img, ref.linear(attn.k_img, image)))
    v = heads(ref.linear(attn.v_img, image))
    return (ref.linear(attn.o, out + ref.softmax_attention(q, k, v).flatten(2)),)


# -- MTV-Crafter ---------------------------------------------------------------------------------


def _motion_inputs(batch: int) -> tuple:
    motion = bf16(batch, FRAMES * JOINTS, DIM, seed=2)
    return bf16(batch, TOKENS, DIM, seed=1), ROPE, motion, MOTION_ROPE


def _motion_expected(attn: nn.Module, inputs: tuple, _: tuple) -> tuple[torch.Tensor, ...]:
    x, _, motion, _ = inputs
    batch, tokens = motion.shape[:2]
    flat = ref.rms(attn.norm_k, ref.linear(attn.k, motion)).reshape(batch, -1)
    k = torch.zeros(batch, tokens, HEADS, WIDTH, dtype=torch.float64)
    for head in range(HEADS):
        for token in range(tokens):
            start = (head * tokens + token) * WIDTH  # the memory read as (H, M, D)
            k[:, token, head] = flat[:, start : start + WIDTH]
    k = ref.turn(k, motion_angles(FRAMES, JOINT_MEANS.tolist(), MOTION_WIDTHS))
    q, v = ref.turn(query(attn, x), angles()), heads(ref.linear(attn.v, motion))
    return (ref.linear(attn.o, ref.softmax_attention(q, k, v).flatten(2)),)


# -- MultiTalk -----------------------------------------------------------------------------------


class MultiTalk(nn.Module):
    """Two persons speak: self-attention with reference maps, then attention to their audio."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = WanSelfAttention(DIM, HEADS)
        self.norm_x = WanLayerNorm(DIM, affine=True)
        self.audio_cross_attn = SingleStreamMultiAttention(DIM, HEADS)

    def forward(
        self, x: torch.Tensor, rope: torch.Tensor, audio: torch.Tensor, masks: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        attended, maps = self.self_attn.forward_multitalk(x, rope, GRID, masks)
        x = x + attended
        return x + self.audio_cross_attn(self.norm_x(x), audio, GRID, maps), maps


def _multitalk_inputs(batch: int) -> tuple:
    audio = bf16(batch * FRAMES, 2 * MULTITALK_TOKENS, MULTITALK_WIDTH, seed=2)
    return bf16(batch, TOKENS, DIM, seed=1), ROPE, audio, MASKS


def reference_map(q: torch.Tensor, k: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """(B, classes, L), one head and one class at a time."""
    maps = torch.zeros(q.shape[0], len(masks), q.shape[1], dtype=torch.float64)
    for head in range(HEADS):
        weights = (q[:, :, head] @ k[:, :, head].transpose(1, 2) / WIDTH**0.5).softmax(-1)
        for index, mask in enumerate(masks):
            maps[:, index] += weights[..., mask > 0].sum(-1) / mask.sum() / HEADS
    return maps


def positions_of(maps: torch.Tensor) -> list[float]:
    """Of maps (3, L) for two persons and the background, one token at a time."""
    rows, found = maps.double().tolist(), []
    for values in zip(*rows, strict=True):
        winner = values.index(max(values))
        row = rows[winner]
        share = (values[winner] - min(row)) / (max(row) - min(row))
        found.append(12.0 if winner == 2 else 20.0 * winner + 4.0 * share)
    return found


def _multitalk_expected(model: nn.Module, inputs: tuple, got: tuple) -> tuple[torch.Tensor, ...]:
    """The audio's part follows the maps that were found: a token between two persons goes by
    their last bit."""
    x, _, audio, masks = inputs
    batch = x.shape[0]
    attn, hear = model.self_attn, model.audio_cross_attn
    k, v = key_value(attn, x)
    q, k = ref.turn(query(attn, x), angles()), ref.turn(k, angles())
    x = x + ref.linear(attn.o, ref.softmax_attention(q, k, v).flatten(2))
    maps = reference_map(q, k[:, :FRAME], masks)
    found = got[1] if batch > 1 else got[1][None]
    q = heads(ref.linear(hear.q_linear, ref.layer_norm(model.norm_x, x)))
    q = torch.cat([
        ref.turn(q[b : b + 1], [ref.axis_angles(p, WIDTH) for p in positions_of(found[b])])
        for b in range(batch)
    ])
    both = ref.linear(hear.kv_linear, audio)
    k, v = heads(both[..., :DIM]), heads(both[..., DIM:])
    k = ref.turn(k, [ref.axis_angles(c, WIDTH) for c in (2, 22) for _ in range(MULTITALK_TOKENS)])
    k, v = (part.reshape(batch, FRAMES, *part.shape[1:]) for part in (k, v))
    out = x + ref.linear(hear.proj, ref.per_frame_attention(q, k, v, FRAMES).flatten(2))
    return out, maps if batch > 1 else maps[0]


SCENARIOS = {
    "self-attention": Scenario(
        "fp4_scaled_fast", lambda: WanSelfAttention(DIM, HEADS), _self_inputs, _self_expected, 1
    ),
    "cross-attention, audio and adapter": Scenario(
        "fp8_e4m3fn_scaled_fast", _cross, _cross_inputs, _cross_expected, 3
    ),
    "image cross-attention": Scenario(
        "fp8_e4m3fn_scaled_fast", ImageToVideo, _i2v_inputs, _i2v_expected, 2,
        ("img_emb.proj.1", "img_emb.proj.3"),
    ),
    "motion attention": Scenario(
        "fp8_e4m3fn_fast", lambda: MTVCrafterMotionAttention(DIM, HEADS), _motion_inputs,
        _motion_expected, 1,
    ),
    "MultiTalk": Scenario(
        "fp4_scaled_fast", MultiTalk, _multitalk_inputs, _multitalk_expected, 3
    ),
}
