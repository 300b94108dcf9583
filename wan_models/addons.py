"""Layers that are attached to a model after it was made, under their checkpoints' names.

What is attached is a registered module like any other: quantised, moved, saved and prepared with
the rest. Its inputs come in :class:`wan_models.block.BlockConditions`; the audio projections at
the top level are called once a video, not once a step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from wan_models.attention import (
    MTVCrafterMotionAttention,
    SingleStreamMultiAttention,
    WanHuMoCrossAttention,
)
from wan_models.audio import HuMoAudioProjection, MultiTalkAudioProjection
from wan_models.block import WanBlock
from wan_models.layers import WanLayerNorm
from wan_models.model import WanModel

#: MTV-Crafter's layers are in every fourth block, from the first on.
MOTION_STRIDE = 4


class HuMoAudioBranch(nn.Module):
    """HuMo's attention to speech behind its own norm.

    Args:
        dim: model dimension C.
        num_heads: heads H.
        eps: of the norms.
        mode: attention kernel, see :func:`wan_models.attention.attention`.
    """

    def __init__(self, dim: int, num_heads: int, eps: float = 1e-6, mode: str = "sdpa") -> None:
        super().__init__()
        self.norm1_audio = WanLayerNorm(dim, eps, affine=True)
        self.audio_cross_attn = WanHuMoCrossAttention(dim, num_heads, eps, mode)

    def forward(
        self, x: torch.Tensor, audio: torch.Tensor, grid: tuple[int, int, int]
    ) -> torch.Tensor:
        """x: (B, L, C); audio: (B, T*16, 1536); grid: tokens along (time, rows, columns).
        Returns (B, L, C), to be added to ``x``."""
        return self.audio_cross_attn(self.norm1_audio(x), audio, grid)


def attach(model: WanModel, name: str) -> None:
    """Add the layers of an add-on, on the device and in the type of the model.

    Args:
        model: changed in place; its blocks are best compiled afterwards.
        name: ``"fantasytalking"``, ``"fantasyportrait"``, ``"multitalk"`` (InfiniteTalk's layers
            are the same), ``"humo"``, ``"mtvcrafter"`` or ``"ovi"``.

    Raises:
        ValueError: an unknown name, or layers that are attached already.
    """
    if name not in _ATTACH:
        raise ValueError(f"add-on {name!r}: use one of {', '.join(map(repr, NAMES))}")
    _ATTACH[name](model)


def _to_cross_attention(method: str) -> Callable[[WanModel], None]:
    """What one of the ``attach_`` methods of the cross-attention adds, in every block."""

    def attach_to(model: WanModel) -> None:
        for block in model.blocks:
            getattr(block.cross_attn, method)()
            block.cross_attn.train(block.training)

    return attach_to


def _multitalk(model: WanModel) -> None:
    _add(model, model, "multitalk_audio_proj", MultiTalkAudioProjection)
    for block in model.blocks:
        _add_norm(model, block, "norm_x")
        _add_attention(model, block, "audio_cross_attn", SingleStreamMultiAttention)


def _humo(model: WanModel) -> None:
    _add(model, model, "audio_proj", HuMoAudioProjection)
    for block in model.blocks:
        _add_attention(model, block, "audio_cross_attn_wrapper", HuMoAudioBranch)


def _mtvcrafter(model: WanModel) -> None:
    for block in list(model.blocks)[::MOTION_STRIDE]:
        _add_norm(model, block, "norm4")
        _add_attention(model, block, "motion_attn", MTVCrafterMotionAttention)


_ATTACH: dict[str, Callable[[WanModel], None]] = {
    "fantasytalking": _to_cross_attention("attach_audio"),
    "fantasyportrait": _to_cross_attention("attach_adapter"),
    "multitalk": _multitalk,
    "humo": _humo,
    "mtvcrafter": _mtvcrafter,
    "ovi": _to_cross_attention("attach_fusion"),
}
#: Every add-on.
NAMES = tuple(_ATTACH)


def _add_norm(model: WanModel, block: WanBlock, name: str) -> None:
    config = model.config
    _add(model, block, name, lambda: WanLayerNorm(config.dim, config.eps, affine=True))


def _add_attention(
    model: WanModel, block: WanBlock, name: str, kind: Callable[..., nn.Module]
) -> None:
    config, mode = model.config, block.cross_attn.mode
    _add(model, block, name, lambda: kind(config.dim, config.num_heads, config.eps, mode))


def _add(model: WanModel, owner: nn.Module, name: str, make: Callable[[], nn.Module]) -> None:
    """Register what ``make`` makes beside the owner's other parameters."""
    if getattr(owner, name, None) is not None:
        raise ValueError(f"{name} is attached already: its weights would be lost")
    like = next(owner.parameters())
    with torch.device(like.device):
        made = make()
    setattr(owner, name, made.to(model.dtype).train(owner.training))
