"""The Wan video transformer, whole: latents, time and text in, latents out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from wan_models.attention.radial import RadialPattern
from wan_models.block import NO_CONDITIONS, BlockConditions, WanBlock
from wan_models.config import WanConfig
from wan_models.embeddings import (
    ImageEmbedding,
    PatchEmbedding,
    embed_time,
    pad_text,
    text_embedding,
    time_embedding,
    time_projection,
)
from wan_models.head import Head, unpatchify
from wan_models.rope import rope_table
from wan_models.vace import VaceBlock

#: Blocks from the first on that attend densely in mode ``"radial"``.
DENSE_BLOCKS = 1


class WanModel(nn.Module):
    """Wan 2.1 and 2.2: text, image, first-and-last-frame and VACE to video.

    Parameter names are the official ones. Add-ons come by :func:`wan_models.addons.attach`.

    Args:
        config: sizes, see :data:`wan_models.CONFIGS`.
        mode: attention kernel, see :class:`wan_models.block.WanBlock`.
    """

    def __init__(self, config: WanConfig, mode: str = "sdpa") -> None:
        super().__init__()
        self.config = config
        dim, patch = config.dim, config.patch_size
        self.patch_embedding = PatchEmbedding(config.in_channels, dim, patch)
        self.text_embedding = text_embedding(config.text_dim, dim)
        self.time_embedding = time_embedding(config.freq_dim, dim)
        self.time_projection = time_projection(dim)
        self.img_emb = None
        if config.image_dim:
            positions = config.image_tokens if config.images > 1 else 0
            self.img_emb = ImageEmbedding(config.image_dim, dim, positions)
        self.blocks = nn.ModuleList(WanBlock(config, mode) for _ in range(config.num_layers))
        self.head = Head(dim, config.out_channels * patch[0] * patch[1] * patch[2], config.eps)
        if config.vace_layers:
            self.vace_patch_embedding = PatchEmbedding(config.vace_channels, dim, patch)
            self.vace_blocks = nn.ModuleList(
                VaceBlock(config, mode, first=number == 0)
                for number in range(len(config.vace_layers))
            )

    @property
    def dtype(self) -> torch.dtype:
        """Type of the residual stream: that of the text embedding."""
        return self.text_embedding[0].bias.dtype

    def compile_blocks(self, **options: object) -> None:
        """``torch.compile`` every block in place, each on its own: equal blocks share a compile.

        Args:
            options: of ``torch.compile``, such as ``backend="contig_safe"``.
        """
        for name, module in self.named_children():
            if name in ("blocks", "vace_blocks"):
                for block in module:
                    block.compile(**options)

    def embed_text(self, context: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
        """Prompts to context: (B, text_len, C).

        Args:
            context: (B, Lt, text_dim), or one (Lt, text_dim) for each sample.

        Raises:
            ValueError: see :func:`wan_models.embeddings.pad_text`.
        """
        padded = pad_text(context, self.config.text_len, self.config.text_dim)
        return self.text_embedding(padded.to(self.dtype))

    def forward(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor | Sequence[torch.Tensor],
        image: torch.Tensor | None = None,
        vace: torch.Tensor | None = None,
        conditions: BlockConditions = NO_CONDITIONS,
        *,
        vace_scale: torch.Tensor | float = 1.0,
        seq_len: int | None = None,
    ) -> torch.Tensor:
        """One denoising step.

        Args:
            latents: (B, in_channels, T, rows, columns), of any float type.
            timesteps: (B,), or (B, L) for one of each token, padding included; 0 to 1000.
            context: text encoder states (B, Lt, text_dim), or one (Lt, text_dim) for each sample;
                padded to ``text_len``.
            image: image encoder states (B, Li, image_dim), for models with an image branch, which
                is skipped without them.
            vace: control (B, vace_channels, T, rows, columns), for VACE models, which are plain
                text-to-video without it.
            conditions: of the attached add-ons, of any float type. The grid, the image and, for
                the mode that needs one, a radial pattern of default sizes are filled in here.
            vace_scale: strength of the hints: a number, or fp32 () or one for each VACE block.
            seq_len: tokens to pad to with zero rows, which nobody attends to.

        Returns:
            (B, out_channels, T, rows, columns) fp32.

        Raises:
            ValueError: an input that the model has no layers for, or a shape that does not fit.
        """
        grid = self._grid(latents)
        # In rows once: a stream that stays column-major is read across by every norm of every block
        # (diffusers#14236), and the first block that returns rows makes the next ones compile anew.
        x = self.patch_embedding(latents).to(self.dtype).contiguous()
        seq_lens = None
        if seq_len is not None:
            x, seq_lens = _pad_tokens(x, seq_len)
        if timesteps.shape not in ((x.shape[0],), x.shape[:2]):
            raise ValueError(
                f"timesteps have shape {tuple(timesteps.shape)}: use ({x.shape[0]},), or "
                f"{tuple(x.shape[:2])} for one of each token"
            )
        e, e0 = embed_time(
            timesteps, self.time_embedding, self.time_projection, self.config.freq_dim
        )
        text = self.embed_text(context)
        if text.shape[0] != x.shape[0]:
            raise ValueError(f"context has {text.shape[0]} prompts for {x.shape[0]} samples")
        rope = rope_table(grid, self.config.head_dim, device=x.device)
        conditions = self._complete(conditions, image, grid, x)
        control, scales = self._control(vace, vace_scale, latents, x)
        start, layers = x, self.config.vace_layers
        for index, block in enumerate(self.blocks):
            x = block(x, e0, text, rope, seq_lens, self._of_block(index, conditions))
            if control is not None and index in layers:
                number = layers.index(index)
                own = BlockConditions(grid=grid, radial=conditions.radial)
                hint, control = self.vace_blocks[number](
                    control, start, e0, text, rope, seq_lens, own
                )
                x = x + hint * scales[number]
        return unpatchify(self.head(x, e), grid, self.config.patch_size).float()

    def _grid(self, latents: torch.Tensor) -> tuple[int, int, int]:
        """Tokens along (time, rows, columns)."""
        channels, patch = self.config.in_channels, self.config.patch_size
        if latents.dim() != 5 or latents.shape[1] != channels:
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}: use (B, {channels}, T, rows, columns)"
            )
        sizes = latents.shape[2:]
        if any(size % part for size, part in zip(sizes, patch, strict=True)):
            raise ValueError(
                f"latents have (T, rows, columns) = {tuple(sizes)}: use multiples of {patch}"
            )
        return sizes[0] // patch[0], sizes[1] // patch[1], sizes[2] // patch[2]

    def _complete(
        self,
        conditions: BlockConditions,
        image: torch.Tensor | None,
        grid: tuple[int, int, int],
        x: torch.Tensor,
    ) -> BlockConditions:
        """The conditions in the model's type, and what follows from the other inputs."""
        cross = conditions.cross._replace(grid=grid)
        conditions = conditions._replace(cross=cross, grid=grid)
        conditions = conditions.to(x.dtype).as_tensors(x.device)
        if conditions.motion is not None and all(b.motion_attn is None for b in self.blocks):
            raise ValueError(
                "conditions.motion is given, but no block has motion_attn: "
                "wan_models.addons.attach(model, 'mtvcrafter') adds it"
            )
        if conditions.radial is None and any(block.sparse for block in self.blocks):
            # Which blocks of tokens attend to which is decided for whole numbers of them.
            pattern = RadialPattern((int(grid[0]), int(grid[1]), int(grid[2])))
            conditions = conditions._replace(radial=pattern)
        if image is None:
            return conditions
        expected = (x.shape[0], self.config.image_tokens, self.config.image_dim)
        if self.img_emb is None:
            raise ValueError("image is given, but the model has no image branch")
        if image.shape != expected:
            raise ValueError(f"image has shape {tuple(image.shape)}: use {expected}")
        embedded = self.img_emb(image.to(x.dtype))
        return conditions._replace(cross=conditions.cross._replace(image=embedded))

    def _of_block(self, index: int, conditions: BlockConditions) -> BlockConditions:
        """The conditions that this block has layers for."""
        if conditions.motion is not None and self.blocks[index].motion_attn is None:
            conditions = conditions._replace(motion=None, motion_rope=None)
        if conditions.radial is not None and index < DENSE_BLOCKS:
            conditions = conditions._replace(radial_dense=True)
        return conditions

    def _control(
        self,
        vace: torch.Tensor | None,
        scale: torch.Tensor | float,
        latents: torch.Tensor,
        x: torch.Tensor,
    ) -> tuple[torch.Tensor | None, tuple[torch.Tensor, ...]]:
        """The embedded control video, padded like ``x``, and the strength of each hint."""
        if vace is None:
            return None, ()
        config = self.config
        if not config.vace_layers:
            raise ValueError("vace is given, but the model has no VACE blocks")
        expected = (latents.shape[0], config.vace_channels, *latents.shape[2:])
        if vace.shape != expected:
            raise ValueError(f"vace has shape {tuple(vace.shape)}: use {expected}")
        count = len(config.vace_layers)
        if not isinstance(scale, torch.Tensor):
            scale = torch.full((), scale, dtype=torch.float32, device=x.device)
        if scale.shape not in ((), (count,)):
            raise ValueError(f"vace_scale has shape {tuple(scale.shape)}: use () or ({count},)")
        control = self.vace_patch_embedding(vace).to(x.dtype)
        if control.shape[1] < x.shape[1]:
            control, _ = _pad_tokens(control, x.shape[1])
        return control, scale.expand(count).unbind()


def _pad_tokens(x: torch.Tensor, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, L, C) with zero rows up to ``seq_len`` tokens, and (B,) the tokens before them."""
    batch, tokens = x.shape[:2]
    if seq_len < tokens:
        raise ValueError(f"seq_len={seq_len}: the latents make {tokens} tokens")
    seq_lens = torch.full((batch,), tokens, dtype=torch.int32, device=x.device)
    return F.pad(x, (0, 0, 0, seq_len - tokens)), seq_lens
