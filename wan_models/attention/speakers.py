"""Which person a video token belongs to: reference maps and rotary positions (MultiTalk)."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from wan_models.attention.kernels import attention

#: Positions of the people: two are kept far apart, more of them lie side by side.
BUCKET = 4
FAR = 20
BACKGROUND = 12
MAX_PEOPLE = 6


def reference_masks(masks: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
    """Masks of the first frame at the resolution of its tokens.

    Args:
        masks: (classes, height, width), 1 where a person (or, last, the background) is, else 0.
        grid: tokens along (time, rows, columns).

    Returns:
        (classes, rows * columns) fp32; each token takes the nearest pixel's value.

    Raises:
        ValueError: ``masks`` is not three-dimensional.
    """
    if masks.dim() != 3:
        raise ValueError(f"masks has shape {tuple(masks.shape)}: use (classes, height, width)")
    return F.interpolate(masks.float()[None], size=grid[1:], mode="nearest")[0].flatten(1)


def reference_map(
    q: torch.Tensor, k_reference: torch.Tensor, masks: torch.Tensor
) -> torch.Tensor:
    """How much attention each token pays to each class's pixels in the first frame.

    For one head that is the softmax of q k^T / sqrt(D), summed over the class's keys and divided
    by their number; the map is the mean over heads. A sum of softmax weights times a mask is
    attention with the mask for values, so this is one call of a fused kernel, with the masks as
    the first channels of the values: the (L, S) scores are never stored. It always runs
    ``"sdpa"``, because the maps of two people differ by less than a quantised kernel's error.

    Args:
        q: (B, L, H, D), turned by the rotary embedding.
        k_reference: (B, S, H, D), the first frame's keys, turned likewise.
        masks: (classes, S), 1 or 0.

    Returns:
        (B, classes, L) fp32; 0 for a class without a pixel.

    Raises:
        ValueError: masks for another number of keys, or more classes than D.
    """
    batch, keys, heads, width = k_reference.shape
    if masks.dim() != 2 or masks.shape[1] != keys or masks.shape[0] > width:
        raise ValueError(
            f"reference masks have shape {tuple(masks.shape)}: use (classes, {keys}) for the "
            f"{keys} tokens of a frame, and at most {width} classes"
        )
    classes = masks.shape[0]
    values = F.pad(masks.t().to(q.dtype), (0, width - classes))
    values = values[None, :, None].repeat(batch, 1, heads, 1)
    summed = attention(q, k_reference, values, mode="sdpa")[..., :classes]
    size = masks.float().sum(1).clamp(min=1)
    return (summed.float().mean(2) / size).transpose(1, 2)


def query_positions(maps: torch.Tensor, people: int) -> torch.Tensor:
    """Rotary position of each video token among several people.

    A token belongs to the class with the largest value, the first one of equals. Within a
    person's bucket its position follows that class's own map, scaled so that the smallest value
    lies at the lower edge and the largest at the upper; a constant map lies at the lower edge.
    Two people have the buckets [0, 4] and [20, 24], more have [4i, 4i + 4]; the class after the
    people's is the background, at 12.

    Args:
        maps: (..., classes, L), with or without the background.
        people: how many of the classes are people.

    Returns:
        (..., L) fp32.

    Raises:
        ValueError: no people or too many, or another number of classes.
    """
    _check_people(people)
    classes = maps.shape[-2]
    if classes not in (people, people + 1):
        raise ValueError(
            f"maps have {classes} classes: {people} people need {people}, or {people + 1} with the "
            "background"
        )
    low, high = maps.amin(-1, keepdim=True), maps.amax(-1, keepdim=True)
    spread = high - low
    share = (maps - low) / torch.where(spread > 0, spread, 1.0)
    index = torch.arange(classes, device=maps.device)
    is_person = index < people
    lower = torch.where(is_person, index * _stride(people), BACKGROUND)
    positions = lower[:, None] + share.float() * (is_person * BUCKET)[:, None]
    return positions.gather(-2, maps.argmax(-2, keepdim=True)).squeeze(-2)


def key_positions(
    people: int, tokens: int, device: torch.device | str | None = None
) -> torch.Tensor:
    """Rotary position of a frame's audio tokens: the centre of their speaker's bucket.

    Args:
        people: speakers; each has ``tokens`` audio tokens, one speaker after the other.
        tokens: A.
        device: where the positions are put.

    Returns:
        (people * A,) fp32: 2 and 22 for two people, 4i + 2 for more.

    Raises:
        ValueError: no people or too many.
    """
    _check_people(people)
    speaker = torch.arange(people * tokens, device=device) // tokens
    return (speaker * _stride(people) + BUCKET // 2).float()


def _stride(people: int) -> int:
    return FAR if people == 2 else BUCKET


def _check_people(people: int) -> None:
    if not 1 <= people <= MAX_PEOPLE:
        raise ValueError(f"{people} people: use 1 to {MAX_PEOPLE}")
