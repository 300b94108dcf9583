"""Names of linears, and which linears of a Wan model stay in high precision.

A name is a whole dotted path below the module at hand, with ``*`` for exactly one component: never
a substring, since "add" or "norm" inside some longer name then catches layers nobody meant.
"""

from __future__ import annotations

import re

from torch import nn

#: What the public wrapper keeps out of its FP8 products, by name. These run once a step or once a
#: video on few rows, and every block reads what they give. Its list has "adapter" as a substring,
#: which also keeps FantasyPortrait's per-block projections: they are quantised here, like every
#: layer attached to a block. Convolutions (the patch embedding), modulation and norms are no
#: linears. ``head.head`` is quantised, as in the wrapper since its second version, so that its
#: files load as they are; name it in ``skip`` to keep it.
HIGH_PRECISION = (
    "time_embedding.0",
    "time_embedding.2",
    "time_projection.1",
    "text_embedding.0",
    "text_embedding.2",
    "img_emb.proj.1",
    "img_emb.proj.3",
    # MultiTalk and InfiniteTalk: waveform features to audio tokens.
    "multitalk_audio_proj.proj1",
    "multitalk_audio_proj.proj1_vf",
    "multitalk_audio_proj.proj2",
    "multitalk_audio_proj.proj3",
    # HuMo: the same.
    "audio_proj.audio_proj_glob_1.layer",
    "audio_proj.audio_proj_glob_2.layer",
    "audio_proj.audio_proj_glob_3.layer",
)


#: Keys and values of the text, of a model and of a block. With 512 rows they take 0.05 ms of a
#: block's 40 in FP8 as in bf16 (H100), so 8 bits pay in memory alone: in 16 bits a 14B model takes
#: 2.1 GB more, 16.6 in all. They tolerate it like the others. Hence they are quantised unless asked
#: for.
TEXT = (
    "blocks.*.cross_attn.k",
    "blocks.*.cross_attn.v",
    "cross_attn.k",
    "cross_attn.v",
)

_WHY = {
    **dict.fromkeys(
        HIGH_PRECISION, "few rows, once a step or a video, and every block reads the result"
    ),
    **dict.fromkeys(TEXT, "512 rows gain no time in 8 bits"),
}


def high_precision(module: nn.Module, *, text: bool = False) -> list[str]:
    """The entries of :data:`HIGH_PRECISION` that name an ``nn.Linear`` of ``module``.

    To be given to :func:`wan_models.quant.quantize_` as ``skip``, with entries of one's own
    beside them. Entries that this model has no linear for are left out.

    Args:
        module: a whole Wan model; of a block it keeps nothing, unless ``text``.
        text: also the keys and values of the text, :data:`TEXT`, for more memory.
    """
    names = [name for name, child in module.named_modules() if isinstance(child, nn.Linear)]
    entries = (*HIGH_PRECISION, *TEXT) if text else HIGH_PRECISION
    return [entry for entry in entries if any(matches(entry, name) for name in names)]


def why_kept(entry: str) -> str:
    """The reason for a ``skip`` entry, for the report of quantize_."""
    reason = f"named in skip by {entry!r}"
    return f"{reason}: {_WHY[entry]}" if entry in _WHY else reason


def matches(entry: str, name: str) -> bool:
    """Whether ``entry`` means the linear called ``name``: see the module's docstring."""
    return re.fullmatch(re.escape(entry).replace(r"\*", r"[^.]+"), name) is not None
