"""VACE: blocks beside the main ones that turn a control video into hints."""

from __future__ import annotations

import torch
from torch import nn

from wan_models.block import WanBlock
from wan_models.config import WanConfig


class VaceBlock(WanBlock):
    """A whole block on the control's tokens, and the projection that makes its hint.

    c <- before_proj(c) + x      in the first block alone, x being the embedded latents
    c <- block(c);  hint = after_proj(c)

    Args:
        config: sizes.
        mode: attention kernel, see :class:`wan_models.block.WanBlock`.
        first: whether it is the first VACE block.
    """

    def __init__(self, config: WanConfig, mode: str = "sdpa", *, first: bool = False) -> None:
        super().__init__(config, mode)
        self.before_proj = nn.Linear(config.dim, config.dim) if first else None
        self.after_proj = nn.Linear(config.dim, config.dim)

    def forward(  # type: ignore[override]
        self, control: torch.Tensor, x: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One VACE block.

        Args:
            control: (B, L, C): the embedded control video, then what the block before returned.
            x: (B, L, C): the embedded latents.
            args, kwargs: as in :meth:`WanBlock.forward`, from ``e0`` on.

        Returns:
            The hint for the main block, and the control for the next VACE block; (B, L, C) each.
        """
        if self.before_proj is not None:
            control = self.before_proj(control) + x
        control = super().forward(control, *args, **kwargs)
        return self.after_proj(control), control
