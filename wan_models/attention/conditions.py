"""What a cross-attention is given beside the text."""

from __future__ import annotations

from typing import NamedTuple

import torch

from wan_models.attention.nag import NagParams, scalar


class CrossConditions(NamedTuple):
    """Side inputs of the text and image cross-attentions, all optional.

    Each but the image and NAG needs layers that are attached after construction. Strengths are
    floats, or 0-d fp32 tensors where they change at run time.

    Attributes:
        image: (B, Li, C) image tokens, apart from the text.
        audio: FantasyTalking, (B, T, A, W) with one window for each latent frame, or (B, A, W)
            for all tokens alike.
        audio_scale: strength of that branch.
        adapter: FantasyPortrait, shaped like ``audio``.
        adapter_scale: strength of that branch.
        adapter_tokens: the adapter works on this many leading tokens; None stands for all.
        nag_context: (B, Ln, C), text to be guided away from; no image tokens in front of it.
        nag: strengths of that guidance.
        fusion: (B, Lf, C), tokens of the model that runs beside this one (Ovi).
        fusion_rope: rotary tables for the video tokens and for the tokens of ``fusion``.
        fusion_lens: (B,) valid tokens of ``fusion``.
        grid: video tokens along (time, rows, columns). With it a 4-D ``audio`` or ``adapter``
            that was made for another number of latent frames is always noticed, without it only
            where the number of tokens is no multiple.
    """

    image: torch.Tensor | None = None
    audio: torch.Tensor | None = None
    audio_scale: torch.Tensor | float = 1.0
    adapter: torch.Tensor | None = None
    adapter_scale: torch.Tensor | float = 1.0
    adapter_tokens: int | None = None
    nag_context: torch.Tensor | None = None
    nag: NagParams = NagParams()
    fusion: torch.Tensor | None = None
    fusion_rope: tuple[torch.Tensor, torch.Tensor] | None = None
    fusion_lens: torch.Tensor | None = None
    grid: tuple[int, int, int] | None = None

    def as_tensors(self, device: torch.device | str | None = None) -> CrossConditions:
        """The same with every strength a 0-d fp32 tensor: changing one recompiles nothing."""
        return self._replace(
            audio_scale=scalar(self.audio_scale, device),
            adapter_scale=scalar(self.adapter_scale, device),
            nag=self.nag.as_tensors(device),
        )


NO_CONDITIONS = CrossConditions()
