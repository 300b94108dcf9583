"""Cross-attention of an image-to-video block: to the text, and to an image's tokens."""

from __future__ import annotations

import torch
from torch import nn

from wan_models.attention.conditions import NO_CONDITIONS, CrossConditions
from wan_models.attention.cross_attention import WanCrossAttention
from wan_models.layers import WanRMSNorm


class WanI2VCrossAttention(WanCrossAttention):
    """As :class:`WanCrossAttention`, and the image has keys and values of its own.

    Args:
        dim: model dimension C.
        num_heads: heads H.
        eps: of the norms.
        mode: attention kernel, see :func:`wan_models.attention.kernels.attention`.
        image_tokens: rows of the context, in front of the text, that are the image's (CLIP
            ViT-H: 257, twice that for a first and a last frame). They are looked for only where
            the conditions hold no image. 0: the context is text alone, and without an image in
            the conditions there is no image branch.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        eps: float = 1e-6,
        mode: str = "sdpa",
        *,
        image_tokens: int = 257,
    ) -> None:
        super().__init__(dim, num_heads, eps, mode)
        if image_tokens < 0:
            raise ValueError(f"image_tokens={image_tokens}: use 0 or more")
        self.image_tokens = image_tokens
        self.k_img = nn.Linear(dim, dim)
        self.v_img = nn.Linear(dim, dim)
        self.norm_k_img = WanRMSNorm(dim, eps)

    def forward(
        self,
        x: torch.Tensor,
        context: torch.Tensor,
        conditions: CrossConditions = NO_CONDITIONS,
    ) -> torch.Tensor:
        """One cross-attention.

        Args:
            x: (B, L, C).
            context: text tokens (B, Lt, C) if the conditions hold an image, else the image's
                tokens followed by the text's (B, Li + Lt, C).
            conditions: the other branches' inputs.

        Returns:
            (B, L, C).

        Raises:
            ValueError: the context has no text after the image's tokens; or as in the base class.
        """
        image = conditions.image
        if image is None and self.image_tokens:
            if context.shape[1] <= self.image_tokens:
                raise ValueError(
                    f"context has {context.shape[1]} tokens, {self.image_tokens} of them are the "
                    "image's: put the text after them, or give the image in the conditions"
                )
            image, context = context[:, : self.image_tokens], context[:, self.image_tokens :]
        q = self.query(x)
        out = self.text(q, context, conditions)
        if image is not None:
            k = self.heads(self.norm_k_img(self.k_img(image)))
            v = self.heads(self.v_img(image))
            out = out + self.attend(q, k, v).flatten(2)
        return self.o(self.add_branches(out, q, conditions))
