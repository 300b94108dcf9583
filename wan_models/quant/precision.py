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


def high_precision(module: nn.Module) -> list[str]:
    """The entries of :data:`HIGH_PRECISION` that name an ``nn.Linear`` of ``module``.

    To be given to :func:`wan_models.quant.quantize_` as ``skip``, with entries of one's own
    beside them. Entries that this model has no linear for are left out.

    Args:
        module: a whole Wan model; of a block it keeps nothing.
    """
    names = [name for name, child in module.named_modules() if isinstance(child, nn.Linear)]
    return [entry for entry in HIGH_PRECISION if any(matches(entry, name) for name in names)]


def matches(entry: str, name: str) -> bool:
    """Whether ``entry`` means the linear called ``name``: see the module's docstring."""
    return re.fullmatch(re.escape(entry).replace(r"\*", r"[^.]+"), name) is not None
