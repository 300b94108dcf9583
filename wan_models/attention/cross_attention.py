"""Cross-attention of a Wan block to the text, and to what is attached beside it."""

from __future__ import annotations

import torch
from torch import nn

from wan_models.attention.base import QKVAttention, add_scaled, grid_text
from wan_models.attention.conditions import NO_CONDITIONS, CrossConditions
from wan_models.layers import WanLayerNorm, WanRMSNorm
from wan_models.rope import apply_rope


class WanCrossAttention(QKVAttention):
    """Video tokens attend to text tokens; no rotary, and padding is attended as in training.

    Further branches share the query and add to the text's result before the output projection:
    FantasyTalking's audio, FantasyPortrait's adapter, the tokens of a model that runs beside this
    one (Ovi). Their layers are attached after construction, under the names of the add-ons'
    checkpoints, with the dtype and device of the norms.

    Args:
        dim: model dimension C.
        num_heads: heads H.
        eps: of the norms.
        mode: attention kernel, see :func:`wan_models.attention.kernels.attention`.
    """

    def __init__(self, dim: int, num_heads: int, eps: float = 1e-6, mode: str = "sdpa") -> None:
        super().__init__(dim, num_heads, eps, mode)
        self.dim = dim
        self.eps = eps

    def attach_audio(self, width: int = 2048) -> None:
        """Add FantasyTalking's ``k_proj`` and ``v_proj`` (C, width), without bias.

        Raises:
            ValueError: they are attached already.
        """
        self._attach(k_proj=self._linear(width), v_proj=self._linear(width))

    def attach_adapter(self, width: int = 2048) -> None:
        """Add FantasyPortrait's ``ip_adapter_single_stream_k_proj`` and ``..._v_proj``.

        Raises:
            ValueError: they are attached already.
        """
        self._attach(
            ip_adapter_single_stream_k_proj=self._linear(width),
            ip_adapter_single_stream_v_proj=self._linear(width),
        )

    def attach_fusion(self) -> None:
        """Add Ovi's ``k_fusion``, ``v_fusion``, ``pre_attn_norm_fusion`` and ``norm_k_fusion``.

        Raises:
            ValueError: they are attached already.
        """
        self._attach(
            k_fusion=self._linear(self.dim, bias=True),
            v_fusion=self._linear(self.dim, bias=True),
            pre_attn_norm_fusion=WanLayerNorm(self.dim, self.eps, affine=True),
            norm_k_fusion=WanRMSNorm(self.dim, self.eps),
        )

    def forward(
        self,
        x: torch.Tensor,
        context: torch.Tensor,
        conditions: CrossConditions = NO_CONDITIONS,
    ) -> torch.Tensor:
        """One cross-attention.

        Args:
            x: (B, L, C).
            context: text tokens (B, Lt, C).
            conditions: the other branches' inputs.

        Returns:
            (B, L, C).

        Raises:
            ValueError: a condition whose layers are not attached, or that fits neither the tokens
                nor the grid.
        """
        if conditions.image is not None:
            raise ValueError(
                f"{type(self).__name__} has no image branch: use WanI2VCrossAttention, or give no "
                "image"
            )
        q = self.query(x)
        return self.o(self.add_branches(self.text(q, context, conditions), q, conditions))

    def text(
        self, q: torch.Tensor, context: torch.Tensor, conditions: CrossConditions
    ) -> torch.Tensor:
        """(B, L, C): attention to the text, guided if the conditions say so."""
        if conditions.nag_context is None:
            return self.attend(q, *self.key_value(context)).flatten(2)
        return self.normalized_attention_guidance(
            q, context, conditions.nag_context, conditions.nag
        )

    def add_branches(
        self, out: torch.Tensor, q: torch.Tensor, conditions: CrossConditions
    ) -> torch.Tensor:
        """``out`` (B, L, C) and the audio's, the adapter's and the fusion's parts, in this order.

        Out of place: ``out`` and ``q`` may be read again.
        """
        if conditions.audio is not None:
            self._require("audio", "k_proj", "attach_audio")
            branch = self._side(
                "audio", q, conditions.audio, self.k_proj, self.v_proj, conditions.grid
            )
            out = add_scaled(out, branch, conditions.audio_scale)
        if conditions.adapter is not None:
            out = self._add_adapter(out, q, conditions)
        if conditions.fusion is not None:
            out = out + self._fusion(q, conditions)
        return out

    def _add_adapter(
        self, out: torch.Tensor, q: torch.Tensor, conditions: CrossConditions
    ) -> torch.Tensor:
        self._require("adapter", "ip_adapter_single_stream_k_proj", "attach_adapter")
        tokens = q.shape[1]
        prefix = tokens if conditions.adapter_tokens is None else conditions.adapter_tokens
        if not 1 <= prefix <= tokens:
            raise ValueError(f"adapter_tokens={prefix}: use 1 to {tokens}, the video tokens")
        branch = self._side(
            "adapter",
            q[:, :prefix],
            conditions.adapter,
            self.ip_adapter_single_stream_k_proj,
            self.ip_adapter_single_stream_v_proj,
            conditions.grid,
        )
        if prefix == tokens:
            return add_scaled(out, branch, conditions.adapter_scale)
        head = add_scaled(out[:, :prefix], branch, conditions.adapter_scale)
        return torch.cat([head, out[:, prefix:]], dim=1)

    def _side(
        self,
        name: str,
        q: torch.Tensor,
        states: torch.Tensor,
        to_k: nn.Module,
        to_v: nn.Module,
        grid: tuple[int, int, int] | None,
    ) -> torch.Tensor:
        """(B, L, C): attention of q to one window of states for each frame, or to all of them."""
        batch, tokens = q.shape[:2]
        if states.dim() not in (3, 4) or states.shape[0] != batch:
            raise ValueError(
                f"{name} has shape {tuple(states.shape)}: use ({batch}, T, A, width) for one "
                f"window a latent frame, or ({batch}, A, width)"
            )
        k, v = self.heads(to_k(states)), self.heads(to_v(states))
        if states.dim() == 3:
            return self.attend(q, k, v).flatten(2)
        frames = states.shape[1]
        _check_frames(name, frames, tokens, grid)
        return self.attend_per_frame(q, k.flatten(0, 1), v.flatten(0, 1), frames).flatten(2)

    def _fusion(self, q: torch.Tensor, conditions: CrossConditions) -> torch.Tensor:
        self._require("fusion", "k_fusion", "attach_fusion")
        target = self.pre_attn_norm_fusion(conditions.fusion)
        k = self.heads(self.norm_k_fusion(self.k_fusion(target)))
        v = self.heads(self.v_fusion(target))
        if conditions.fusion_rope is not None:
            q_table, k_table = conditions.fusion_rope
            q, k = apply_rope(q, q_table), apply_rope(k, k_table)
        return self.attend(q, k, v, conditions.fusion_lens).flatten(2)

    def _require(self, condition: str, layer: str, attach: str) -> None:
        if not hasattr(self, layer):
            raise ValueError(
                f"{condition} is given, but {type(self).__name__} has no {layer}: call {attach}() "
                "first, and load its weights"
            )

    def _attach(self, **layers: nn.Module) -> None:
        like = self.norm_q.weight
        for name in layers:
            if hasattr(self, name):
                raise ValueError(f"{name} is attached already: its weights would be lost")
        for name, layer in layers.items():
            setattr(self, name, layer.to(like.device, like.dtype))

    def _linear(self, width: int, *, bias: bool = False) -> nn.Linear:
        return nn.Linear(width, self.dim, bias=bias, device=self.norm_q.weight.device)


def _check_frames(
    name: str, frames: int, tokens: int, grid: tuple[int, int, int] | None
) -> None:
    if grid is not None and (frames != grid[0] or tokens != grid[0] * grid[1] * grid[2]):
        raise ValueError(
            f"{name} is for {grid_text((frames, *grid[1:]))}, but it meets {tokens} video tokens "
            f"and the grid is {grid_text(grid)}"
        )
    if tokens % frames:
        raise ValueError(
            f"{name} has {frames} latent frames, but {tokens} video tokens are no multiple of "
            f"{frames}: use one window for each latent frame of the video"
        )
