"""One transformer block of a Wan model."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from wan_models.attention import (
    CrossConditions,
    WanCrossAttention,
    WanI2VCrossAttention,
    WanSelfAttention,
)
from wan_models.attention.base import add_scaled
from wan_models.attention.nag import scalar
from wan_models.attention.radial import RadialPattern
from wan_models.config import WanConfig
from wan_models.layers import WanLayerNorm, feed_forward
from wan_models.quant.producers import add, add_normed, fed, normed


class BlockConditions(NamedTuple):
    """What a block is conditioned on besides text and time; each needs its layers attached.

    Strengths are numbers, or 0-d fp32 tensors where they change at run time.

    Attributes:
        cross: of the cross-attention: image, audio, adapter, guidance, fusion.
        motion: MTV-Crafter's motion tokens (B, M, C), with the rotary table of their joints.
        motion_rope: that table.
        motion_scale: strength of the motion.
        multitalk_audio: (B*T, persons * A, 768) from the audio projection.
        multitalk_maps: (classes, L): how much each token looks at each person of the reference.
        multitalk_masks: (classes, S): where the persons are in the first frame. The block makes
            the maps from them with its own queries and keys.
        multitalk_scale: strength of the speech.
        humo_audio: (B, T*16, 1536) from the audio projection.
        humo_scale: strength of it.
        grid: tokens along (time, rows, columns); :class:`wan_models.model.WanModel` sets it.
        radial: pattern of the self-attention in attention mode ``"radial"``; the model makes one
            where none is given.
        radial_dense: attend to everything in that mode too, as in the first steps; the model
            does so in its first block.
        chunks: groups of frames among which alone tokens attend to one another.
    """

    cross: CrossConditions = CrossConditions()
    motion: torch.Tensor | None = None
    motion_rope: torch.Tensor | None = None
    motion_scale: torch.Tensor | float = 1.0
    multitalk_audio: torch.Tensor | None = None
    multitalk_maps: torch.Tensor | None = None
    multitalk_masks: torch.Tensor | None = None
    multitalk_scale: torch.Tensor | float = 1.0
    humo_audio: torch.Tensor | None = None
    humo_scale: torch.Tensor | float = 1.0
    grid: tuple[int, int, int] | None = None
    radial: RadialPattern | None = None
    radial_dense: bool = False
    chunks: int | None = None

    @property
    def late(self) -> bool:
        """Whether a branch stands between the cross-attention and the feed-forward."""
        return any(x is not None for x in (self.motion, self.multitalk_audio, self.humo_audio))

    def as_tensors(self, device: torch.device | str | None = None) -> BlockConditions:
        """The same with the strength of all that is given a 0-d fp32 tensor.

        Changing it then recompiles nothing. :class:`wan_models.model.WanModel` does this before
        its blocks; do it yourself for a block, or for a model that is compiled whole.
        """

        def strength(
            states: torch.Tensor | None, scale: torch.Tensor | float
        ) -> torch.Tensor | float:
            return scale if states is None else scalar(scale, device)

        cross = self.cross
        if any(x is not None for x in (cross.audio, cross.adapter, cross.nag_context)):
            cross = cross.as_tensors(device)
        return self._replace(
            cross=cross,
            motion_scale=strength(self.motion, self.motion_scale),
            multitalk_scale=strength(self.multitalk_audio, self.multitalk_scale),
            humo_scale=strength(self.humo_audio, self.humo_scale),
        )

    def to(self, dtype: torch.dtype) -> BlockConditions:
        """The same with the states that layers read in ``dtype``; tables and masks stay."""

        def cast(states: torch.Tensor | None) -> torch.Tensor | None:
            return None if states is None else states.to(dtype)

        cross = self.cross
        return self._replace(
            cross=cross._replace(
                image=cast(cross.image),
                audio=cast(cross.audio),
                adapter=cast(cross.adapter),
                nag_context=cast(cross.nag_context),
                fusion=cast(cross.fusion),
            ),
            motion=cast(self.motion),
            multitalk_audio=cast(self.multitalk_audio),
            humo_audio=cast(self.humo_audio),
        )


NO_CONDITIONS = BlockConditions()


class WanBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, modulated by the time embedding.

    x <- x + gate_sa * SelfAttn(LN(x) * (1 + scale_sa) + shift_sa)
    x <- x + CrossAttn(LN_affine(x), context)
    x <- x + motion_scale * MotionAttn(LN_affine(x))      where attached and given, as are
    x <- x + multitalk_scale * AudioAttn(LN_affine(x))    the two below it
    x <- x + humo_scale * AudioAttn(LN_affine(x))
    x <- x + gate_ff * FFN(LN(x) * (1 + scale_ff) + shift_ff)

    Modulation and the gated residual sums are fp32 and cast back, as in the official model.
    Where the linears that read a normed state take quantised rows, state, sum and quantisation are
    one pass, see :mod:`wan_models.quant.producers`.
    Parameter names are the official ones. :func:`wan_models.addons.attach` adds layers.

    Args:
        config: sizes.
        mode: attention kernel, see :func:`wan_models.attention.attention`. ``"radial"`` is for
            the self-attention; where that is dense, and elsewhere, ``"sdpa"`` then is used.
            ``"fp16"``, made for many keys, is for the self-attention too; elsewhere ``"auto"`` is.
    """

    def __init__(self, config: WanConfig, mode: str = "sdpa") -> None:
        super().__init__()
        dim, heads, eps = config.dim, config.num_heads, config.eps
        self.sparse = mode == "radial"
        mode = "sdpa" if self.sparse else mode
        others = "auto" if mode == "fp16" else mode
        self.norm1 = WanLayerNorm(dim, eps)
        self.self_attn = WanSelfAttention(dim, heads, eps, mode)
        self.norm3 = WanLayerNorm(dim, eps, affine=True)
        # The image comes in the conditions; the context is text alone, also without an image.
        self.cross_attn = (
            WanI2VCrossAttention(dim, heads, eps, others, image_tokens=0)
            if config.image_dim
            else WanCrossAttention(dim, heads, eps, others)
        )
        self.norm2 = WanLayerNorm(dim, eps)
        self.ffn = feed_forward(dim, config.ffn_dim)
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)
        for late in ("norm4", "motion_attn", "norm_x", "audio_cross_attn"):
            self.register_module(late, None)
        self.register_module("audio_cross_attn_wrapper", None)

    def forward(
        self,
        x: torch.Tensor,
        e0: torch.Tensor,
        context: torch.Tensor,
        rope: torch.Tensor,
        seq_lens: torch.Tensor | None = None,
        conditions: BlockConditions = NO_CONDITIONS,
    ) -> torch.Tensor:
        """One block.

        Args:
            x: (B, L, C).
            e0: time embedding (B, 6, C), or per token (B, L, 6, C).
            context: text states (B, Lt, C).
            rope: from :func:`wan_models.rope.rope_table`.
            seq_lens: (B,) valid tokens of each sample.
            conditions: of the attached layers.

        Returns:
            (B, L, C) in the dtype of ``x``.

        Raises:
            ValueError: ``e0`` has another shape, or a condition lacks its layers, its grid or
                another condition it goes with.
        """
        tokens, dim = x.shape[1:]
        if e0.shape[1:] not in ((6, dim), (tokens, 6, dim)):
            raise ValueError(
                f"e0 has shape {tuple(e0.shape)}: use (B, 6, {dim}), or (B, {tokens}, 6, {dim}) "
                "for one time step per token"
            )
        e = self.modulation.float() + e0.float()
        if e0.dim() == 3:
            e = e.unsqueeze(1)
        shift_sa, scale_sa, gate_sa, shift_ff, scale_ff, gate_ff = e.unbind(2)
        attn = self.self_attn
        state = normed(self.norm1, x, shift_sa, scale_sa, (attn.q, attn.k, attn.v))
        attended, maps = self._attend(state, rope, seq_lens, conditions)
        x, state = add_normed(
            x, attended, gate_sa, self.norm3, None, None, (self.cross_attn.q,)
        )
        branch = self.cross_attn(state, context, conditions.cross)
        last = self.norm2, shift_ff, scale_ff, (self.ffn[0],)
        if conditions.late:
            x = self._late_branches(add(x, branch, None), rope, maps, conditions)
            state = normed(last[0], x, *last[1:])
        else:
            x, state = add_normed(x, branch, None, *last)
        return add(x, fed(self.ffn, state), gate_ff)

    def _attend(
        self,
        x: torch.Tensor,
        rope: torch.Tensor,
        seq_lens: torch.Tensor | None,
        conditions: BlockConditions,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The variant of self-attention that the conditions ask for, and MultiTalk's maps."""
        attn = self.self_attn
        masks, chunks = conditions.multitalk_masks, conditions.chunks
        if masks is not None and conditions.multitalk_maps is not None:
            raise ValueError("conditions: give multitalk_masks or multitalk_maps, not both")
        if conditions.radial is not None and not self.sparse:
            raise ValueError(
                f"conditions.radial is given, but the attention mode is {attn.mode!r}: make the "
                "block or the model with mode='radial'"
            )
        asked = [
            name
            for name, given in (
                ("attention mode 'radial'", self.sparse),
                ("conditions.multitalk_masks", masks is not None),
                ("conditions.chunks", chunks is not None),
            )
            if given
        ]
        if len(asked) > 1:
            raise ValueError(f"{asked[0]} and {asked[1]} each need a self-attention of their own")
        if self.sparse:
            if conditions.radial is None:
                raise ValueError("attention mode 'radial' needs conditions.radial, a RadialPattern")
            if seq_lens is not None:
                raise ValueError("attention mode 'radial' takes no padding: leave seq_lens out")
            out = attn.forward_radial(x, rope, conditions.radial, conditions.radial_dense)
            return out, conditions.multitalk_maps
        if masks is not None:
            grid = self._grid(conditions, "multitalk_masks")
            return attn.forward_multitalk(x, rope, grid, masks, seq_lens)
        if chunks is not None:
            if seq_lens is not None:
                raise ValueError("conditions.chunks takes no padding: leave seq_lens out")
            grid = self._grid(conditions, "chunks")
            return attn.forward_split(x, rope, grid, chunks), conditions.multitalk_maps
        return attn(x, rope, seq_lens), conditions.multitalk_maps

    def _late_branches(
        self,
        x: torch.Tensor,
        rope: torch.Tensor,
        maps: torch.Tensor | None,
        conditions: BlockConditions,
    ) -> torch.Tensor:
        """Motion, then speech of MultiTalk, then of HuMo: what :mod:`wan_models.addons` adds."""
        if conditions.motion is not None:
            attn = self._attached("motion_attn", "motion", "mtvcrafter")
            if conditions.motion_rope is None:
                raise ValueError("conditions.motion is given without motion_rope, its rotary table")
            moved = attn(self.norm4(x), rope, conditions.motion, conditions.motion_rope)
            x = add_scaled(x, moved, conditions.motion_scale)
        if conditions.multitalk_audio is not None:
            attn = self._attached("audio_cross_attn", "multitalk_audio", "multitalk")
            grid = self._grid(conditions, "multitalk_audio")
            heard = attn(self.norm_x(x), conditions.multitalk_audio, grid, maps)
            x = add_scaled(x, heard, conditions.multitalk_scale)
        if conditions.humo_audio is not None:
            wrapper = self._attached("audio_cross_attn_wrapper", "humo_audio", "humo")
            grid = self._grid(conditions, "humo_audio")
            heard = wrapper(x, conditions.humo_audio, grid)
            x = add_scaled(x, heard, conditions.humo_scale)
        return x

    def _attached(self, layer: str, condition: str, addon: str) -> nn.Module:
        module = getattr(self, layer)
        if module is None:
            raise ValueError(
                f"conditions.{condition} is given, but the block has no {layer}: "
                f"wan_models.addons.attach(model, {addon!r}) adds it"
            )
        return module

    @staticmethod
    def _grid(conditions: BlockConditions, condition: str) -> tuple[int, int, int]:
        if conditions.grid is None:
            raise ValueError(
                f"conditions.{condition} is given without grid, the tokens along (time, rows, "
                "columns)"
            )
        return conditions.grid
