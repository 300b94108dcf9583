"""Random inputs for blocks and models, conditions of add-ons included."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from wan_models.block import BlockConditions
from wan_models.config import WanConfig
from wan_models.rope import motion_rope_table, rope_table

#: Tokens of FantasyTalking's audio and of FantasyPortrait's features for each latent frame.
AUDIO_TOKENS, ADAPTER_TOKENS, ADAPTER_WIDTH = 17, 97, 2048
#: MultiTalk's audio tokens of one person, and HuMo's, for each latent frame.
MULTITALK_TOKENS, MULTITALK_WIDTH = 32, 768
HUMO_TOKENS, HUMO_WIDTH = 16, 1536
#: Joints of a body, one motion token each.
JOINTS = 24


class BlockInputs(NamedTuple):
    """Positional inputs of :class:`wan_models.block.WanBlock`."""

    x: torch.Tensor
    e0: torch.Tensor
    context: torch.Tensor
    rope: torch.Tensor


class ModelInputs(NamedTuple):
    """Positional inputs of :class:`wan_models.model.WanModel`."""

    latents: torch.Tensor
    timesteps: torch.Tensor
    context: torch.Tensor
    image: torch.Tensor | None
    vace: torch.Tensor | None
    conditions: BlockConditions


class _Random:
    """Normal numbers from one seed, on one device; the meta device has shapes alone."""

    def __init__(self, dtype: torch.dtype, device: torch.device | str, seed: int) -> None:
        self.dtype, self.device = dtype, torch.device(device)
        # The meta device has no generator, and no numbers either.
        meta = self.device.type == "meta"
        self.generator = None if meta else torch.Generator(device).manual_seed(seed)

    def __call__(self, *shape: int, of: torch.dtype | None = None) -> torch.Tensor:
        made = torch.randn(
            *shape, generator=self.generator, device=self.device, dtype=torch.float32
        )
        return made.to(of or self.dtype)


def block_inputs(
    config: WanConfig,
    grid: tuple[int, int, int],
    *,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    column_major: bool = False,
) -> BlockInputs:
    """Random inputs for a block.

    Args:
        config: sizes.
        grid: tokens along (time, rows, columns); L is their product.
        batch: B.
        dtype: of x and context; e0 and the rotary table are fp32.
        device: where to make them; ``"meta"`` gives shapes and strides alone.
        seed: of the random numbers.
        column_major: give x the strides (C*L, 1, L) that patchifying by ``flatten(2)`` and
            ``transpose(1, 2)`` leaves behind, instead of dense rows.
    """
    normal = _Random(dtype, device, seed)
    tokens = grid[0] * grid[1] * grid[2]
    if column_major:
        x = normal(batch, config.dim, *grid).flatten(2).transpose(1, 2)
    else:
        x = normal(batch, tokens, config.dim)
    return BlockInputs(
        x,
        normal(batch, 6, config.dim, of=torch.float32) / config.dim**0.5,
        normal(batch, config.text_len, config.dim),
        rope_table(grid, config.head_dim, device=device),
    )


def model_inputs(
    config: WanConfig,
    grid: tuple[int, int, int],
    *,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    addons: Sequence[str] = (),
    text_tokens: int | None = None,
) -> ModelInputs:
    """Random inputs for a model: what its configuration and its add-ons take, all of it.

    Args:
        config: sizes; decides whether there are an image and a control video, and whether there
            is one time step for each token.
        grid: tokens along (time, rows, columns).
        batch: B.
        dtype: of everything but time steps and rotary tables.
        device: where to make them; ``"meta"`` gives shapes alone.
        seed: of the random numbers.
        addons: names that were attached, see :func:`wan_models.addons.attach`.
        text_tokens: tokens of each prompt before padding; by default ``text_len``.

    Raises:
        ValueError: an unknown add-on.
    """
    normal = _Random(dtype, device, seed)
    sizes = [size * patch for size, patch in zip(grid, config.patch_size, strict=True)]
    steps = (batch, grid[0] * grid[1] * grid[2]) if config.token_timesteps else (batch,)
    return ModelInputs(
        latents=normal(batch, config.in_channels, *sizes),
        timesteps=(normal(*steps, of=torch.float32).abs() * 400).clamp(max=1000),
        context=normal(batch, text_tokens or config.text_len, config.text_dim),
        image=(
            normal(batch, config.image_tokens, config.image_dim) if config.image_dim else None
        ),
        vace=normal(batch, config.vace_channels, *sizes) if config.vace_layers else None,
        conditions=_conditions(config, grid, batch, normal, addons),
    )


def block_conditions(
    config: WanConfig,
    grid: tuple[int, int, int],
    addons: Sequence[str],
    *,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> BlockConditions:
    """Random conditions for a block with these add-ons, its grid and image tokens included.

    The arguments are those of :func:`model_inputs`.
    """
    normal = _Random(dtype, device, seed)
    made = _conditions(config, grid, batch, normal, addons)
    if config.image_dim:
        image = normal(batch, config.image_tokens, config.dim)
        made = made._replace(cross=made.cross._replace(image=image))
    return made._replace(grid=grid)


def _conditions(
    config: WanConfig,
    grid: tuple[int, int, int],
    batch: int,
    normal: _Random,
    addons: Sequence[str],
) -> BlockConditions:
    made = BlockConditions()
    for name in addons:
        if name not in _CONDITIONS:
            raise ValueError(f"add-on {name!r}: use one of {', '.join(map(repr, _CONDITIONS))}")
        made = _CONDITIONS[name](made, config, grid, batch, normal)
    return made


def _of_cross(made: BlockConditions, **fields: object) -> BlockConditions:
    return made._replace(cross=made.cross._replace(**fields))


def _fantasytalking(
    made: BlockConditions, config: WanConfig, grid: tuple[int, ...], batch: int, normal: _Random
) -> BlockConditions:
    return _of_cross(made, audio=normal(batch, grid[0], AUDIO_TOKENS, ADAPTER_WIDTH))


def _fantasyportrait(
    made: BlockConditions, config: WanConfig, grid: tuple[int, ...], batch: int, normal: _Random
) -> BlockConditions:
    return _of_cross(made, adapter=normal(batch, grid[0], ADAPTER_TOKENS, ADAPTER_WIDTH))


def _multitalk(
    made: BlockConditions, config: WanConfig, grid: tuple[int, ...], batch: int, normal: _Random
) -> BlockConditions:
    """Two persons, left and right half of the first frame, and the rest as background."""
    audio = normal(batch * grid[0], 2 * MULTITALK_TOKENS, MULTITALK_WIDTH)
    columns = torch.arange(grid[2], device=normal.device).repeat(grid[1])
    left, right = columns < grid[2] // 3, columns >= grid[2] - grid[2] // 3
    masks = torch.stack([left, right, ~(left | right)]).to(torch.float32)
    return made._replace(multitalk_audio=audio, multitalk_masks=masks)


def _humo(
    made: BlockConditions, config: WanConfig, grid: tuple[int, ...], batch: int, normal: _Random
) -> BlockConditions:
    return made._replace(humo_audio=normal(batch, grid[0] * HUMO_TOKENS, HUMO_WIDTH))


def _mtvcrafter(
    made: BlockConditions, config: WanConfig, grid: tuple[int, ...], batch: int, normal: _Random
) -> BlockConditions:
    joints = normal(JOINTS, 3, of=torch.float32)
    return made._replace(
        motion=normal(batch, grid[0] * JOINTS, config.dim),
        motion_rope=motion_rope_table(grid[0], joints, config.head_dim),
    )


def _ovi(
    made: BlockConditions, config: WanConfig, grid: tuple[int, ...], batch: int, normal: _Random
) -> BlockConditions:
    """Tokens of a sound track, five for each latent frame, with rotary along time alone."""
    target = (5 * grid[0], 1, 1)
    tables = [rope_table(g, config.head_dim, device=normal.device) for g in (grid, target)]
    lengths = torch.full((batch,), target[0], dtype=torch.int32, device=normal.device)
    return _of_cross(
        made,
        fusion=normal(batch, target[0], config.dim),
        fusion_rope=tuple(tables),
        fusion_lens=lengths,
    )


_CONDITIONS: dict[str, Callable[..., BlockConditions]] = {
    "fantasytalking": _fantasytalking,
    "fantasyportrait": _fantasyportrait,
    "multitalk": _multitalk,
    "humo": _humo,
    "mtvcrafter": _mtvcrafter,
    "ovi": _ovi,
}
