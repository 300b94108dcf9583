"""The attention classes and their variants: how each is made and called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.coverage.sizes import Draw, Size
from wan_models.attention import (
    CrossConditions,
    MTVCrafterMotionAttention,
    NagParams,
    SingleStreamAttention,
    SingleStreamMultiAttention,
    WanCrossAttention,
    WanHuMoCrossAttention,
    WanI2VCrossAttention,
    WanSelfAttention,
)
from wan_models.rope import motion_rope_table

Make = Callable[[Size], nn.Module]
Inputs = Callable[[Draw], tuple[Any, ...]]

#: Groups of frames of ``forward_split``: one that does not divide the frames of either size.
CHUNKS = 2
_IP_GRID = (1, 2, 3)
#: Mean weight of the norms of q and k; scores then have a standard deviation of its square.
_SHARPNESS = 1.5


@dataclass(frozen=True)
class Variant:
    """One way to call one class.

    Attributes:
        owner: name of the class.
        name: of the variant.
        make: the module for a size, with the classes' own random weights.
        inputs: positional arguments of one call.
        method: what is called.
        residual: whether the result is the first argument and what is added to it.
    """

    owner: str
    name: str
    make: Make
    inputs: Inputs
    method: str = "forward"
    residual: bool = False

    def module(self, size: Size, device: str = "cpu", seed: int = 0) -> nn.Module:
        """A bf16 module for inference; equal seeds give equal weights."""
        torch.manual_seed(seed)
        with torch.device(device):
            module = self.make(size).eval().requires_grad_(False)
        for name, parameter in module.named_parameters():
            # At 1, as they are made, a norm's weights could be left out unnoticed; and attention
            # to thousands of random keys would average out to nothing beside the biases.
            if "norm" in name and name.endswith("weight"):
                parameter.normal_(_SHARPNESS if "norm_q" in name or "norm_k" in name else 1.0, 0.2)
        return module.bfloat16()

    def call(self, module: nn.Module) -> Callable[..., Any]:
        """What is run, and compiled, of a module of this variant."""
        return getattr(module, self.method)


def classes() -> list[Variant]:
    """Every variant of every attention class."""
    return [
        *_self_attention(), *_cross_attention(), *_i2v_cross_attention(), _motion(), _humo(),
        *_single(), *_multi(),
    ]


def _self_attention() -> list[Variant]:
    owner = "WanSelfAttention"

    def variant(name: str, inputs: Inputs, method: str = "forward") -> Variant:
        return Variant(owner, name, lambda s: WanSelfAttention(s.dim, s.heads), inputs, method)

    def padded(d: Draw) -> tuple[Any, ...]:
        lengths = [d.size.tokens - 3 * i for i in range(d.batch)]
        return d.video(), d.rope(), torch.tensor(lengths, dtype=torch.int32, device=d.device)

    def cached(d: Draw) -> tuple[Any, ...]:
        shape = (d.batch, 6, d.size.heads, d.size.head_dim)
        return d.video(), d.rope(), None, None, (d.normal(*shape), d.normal(*shape))

    def radial(d: Draw) -> tuple[Any, ...]:
        pattern = d.size.pattern
        return d.states(pattern.tokens), d.rope(pattern.grid), pattern

    def nag(d: Draw) -> tuple[Any, ...]:
        q = d.normal(d.batch, d.size.tokens, d.size.heads, d.size.head_dim)
        return q, d.states(d.size.text), d.states(d.size.text), NagParams()

    return [
        variant("forward", lambda d: (d.video(), d.rope())),
        variant("forward, padded", padded),
        variant(
            "forward_ip, first step",
            lambda d: (d.video(), d.rope(), d.states(6), d.rope(_IP_GRID)), "forward_ip",
        ),
        variant("forward_ip, cached", cached, "forward_ip"),
        variant("forward_radial", radial, "forward_radial"),
        variant("forward_radial, dense", lambda d: (*radial(d), True), "forward_radial"),
        variant(
            "forward_multitalk", lambda d: (d.video(), d.rope(), d.size.grid, d.people()),
            "forward_multitalk",
        ),
        variant(
            "forward_split", lambda d: (d.video(), d.rope(), d.size.grid, CHUNKS), "forward_split"
        ),
        variant("guidance (NAG)", nag, "normalized_attention_guidance"),
    ]


# -- conditions of the cross-attentions ----------------------------------------------------------


def _audio(d: Draw) -> CrossConditions:
    return CrossConditions(audio=d.normal(d.batch, d.size.grid[0], d.size.audio, d.size.side_width))


def _audio_for_all(d: Draw) -> CrossConditions:
    return CrossConditions(audio=d.normal(d.batch, d.size.audio, d.size.side_width))


def _adapter(d: Draw, frames: int | None = None) -> CrossConditions:
    """For the first ``frames`` latent frames alone, if a number is given."""
    shape = (d.batch, frames or d.size.grid[0], d.size.adapter, d.size.side_width)
    tokens = None if frames is None else frames * d.size.frame
    return CrossConditions(adapter=d.normal(*shape), adapter_tokens=tokens)


def _adapter_for_all(d: Draw, tokens: int | None = None) -> CrossConditions:
    adapter = d.normal(d.batch, d.size.adapter, d.size.side_width)
    return CrossConditions(adapter=adapter, adapter_tokens=tokens)


def _fusion(d: Draw) -> CrossConditions:
    """Tokens of a sound track, five for each latent frame, the last sample's padded."""
    target = 5 * d.size.grid[0]
    lengths = torch.full((d.batch,), target, dtype=torch.int32, device=d.device)
    lengths[-1] -= 2
    return CrossConditions(
        fusion=d.states(target), fusion_rope=(d.rope(), d.rope((target, 1, 1))),
        fusion_lens=lengths,
    )


def _nag(d: Draw) -> CrossConditions:
    return CrossConditions(nag_context=d.states(d.size.text))


def _all(d: Draw) -> CrossConditions:
    made = _fusion(d)
    return made._replace(
        audio=_audio(d).audio, adapter=_adapter(d).adapter, nag_context=d.states(d.size.text)
    )


_CONDITIONS: dict[str, Callable[[Draw], CrossConditions]] = {
    "audio 4-D": _audio,
    "audio 3-D": _audio_for_all,
    "adapter 4-D": _adapter,
    "adapter 4-D, of a prefix": lambda d: _adapter(d, d.size.grid[0] - 1),
    "adapter 3-D": _adapter_for_all,
    "adapter 3-D, of a prefix": lambda d: _adapter_for_all(d, d.size.tokens - d.size.frame),
    "fusion target": _fusion,
    "guidance (NAG)": _nag,
    "all branches": _all,
}


def _attached(attention: WanCrossAttention, size: Size) -> WanCrossAttention:
    attention.attach_audio(size.side_width)
    attention.attach_adapter(size.side_width)
    attention.attach_fusion()
    return attention


def _cross_attention() -> list[Variant]:
    def variant(name: str, conditions: Callable[[Draw], CrossConditions]) -> Variant:
        return Variant(
            "WanCrossAttention", name,
            lambda s: _attached(WanCrossAttention(s.dim, s.heads), s),
            lambda d: (d.video(), d.states(d.size.text), conditions(d)),
        )

    plain = variant("text", lambda d: CrossConditions())
    return [plain, *(variant(name, conditions) for name, conditions in _CONDITIONS.items())]


def _i2v_cross_attention() -> list[Variant]:
    owner = "WanI2VCrossAttention"

    def make(size: Size, image_tokens: int) -> nn.Module:
        made = WanI2VCrossAttention(size.dim, size.heads, image_tokens=image_tokens)
        return _attached(made, size)

    def variant(name: str, conditions: Callable[[Draw], CrossConditions]) -> Variant:
        def inputs(d: Draw) -> tuple[Any, ...]:
            image = d.states(d.size.image)
            return d.video(), d.states(d.size.text), conditions(d)._replace(image=image)

        return Variant(owner, name, lambda s: make(s, 0), inputs)

    return [
        Variant(
            owner, "text", lambda s: make(s, 0), lambda d: (d.video(), d.states(d.size.text))
        ),
        variant("image separate", lambda d: CrossConditions()),
        Variant(
            owner, "image in the context", lambda s: make(s, s.image),
            lambda d: (d.video(), d.states(d.size.image + d.size.text)),
        ),
        *(variant(f"image, {name}", given) for name, given in _CONDITIONS.items()),
    ]


# -- motion and speech ---------------------------------------------------------------------------


def _motion() -> Variant:
    def inputs(d: Draw) -> tuple[Any, ...]:
        frames, joints = d.size.grid[0], d.size.joints
        table = motion_rope_table(frames, d.normal(joints, 3).float(), d.size.head_dim)
        return d.video(), d.rope(), d.states(frames * joints), table

    return Variant(
        "MTVCrafterMotionAttention", "forward",
        lambda s: MTVCrafterMotionAttention(s.dim, s.heads), inputs,
    )


def _humo() -> Variant:
    def inputs(d: Draw) -> tuple[Any, ...]:
        audio = d.normal(d.batch, d.size.grid[0] * d.size.humo, d.size.humo_width)
        return d.video(), audio, d.size.grid

    return Variant(
        "WanHuMoCrossAttention", "forward",
        lambda s: WanHuMoCrossAttention(
            s.dim, s.heads, audio_dim=s.humo_width, audio_tokens=s.humo
        ),
        inputs,
    )


def _speech(d: Draw, people: int) -> torch.Tensor:
    return d.normal(d.batch * d.size.grid[0], people * d.size.speech, d.size.speech_width)


def _single() -> list[Variant]:
    def variant(name: str, more: int) -> Variant:
        return Variant(
            "SingleStreamAttention", name,
            lambda s: SingleStreamAttention(s.dim, s.heads, audio_dim=s.speech_width),
            lambda d: (d.video(more * d.size.frame), _speech(d, 1), d.size.grid),
        )

    return [variant("forward", 0), variant("last frame cut", 1)]


def _multi() -> list[Variant]:
    def variant(name: str, people: int, more: int = 0) -> Variant:
        def inputs(d: Draw) -> tuple[Any, ...]:
            x = d.video(more * d.size.frame)
            maps = d.uniform(d.batch, people + 1, x.shape[1]) if people > 1 else None
            return x, _speech(d, people), d.size.grid, maps

        return Variant(
            "SingleStreamMultiAttention", name,
            lambda s: SingleStreamMultiAttention(
                s.dim, s.heads, audio_dim=s.speech_width, audio_tokens=s.speech
            ),
            inputs,
        )

    return [
        variant("one speaker", 1), variant("two speakers", 2),
        variant("two, last frame cut", 2, 1), variant("three speakers", 3),
    ]
