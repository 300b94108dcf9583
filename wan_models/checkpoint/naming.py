"""Names of tensors: official, diffusers, and what files put around them.

Three things are told apart: a prefix in front of every name, the path of the layer (official or
diffusers), and the part of the layer (``weight``, ``bias``, scales; see
:mod:`wan_models.checkpoint.quantised`). Source of the diffusers paths: the names in its
``WanTransformer3DModel`` and ``WanVACETransformer3DModel``.
"""

from __future__ import annotations

from collections.abc import Iterable

#: The namings, each with what it stands for.
NAMINGS = {
    "official": "official paths; scales as weight_scale, weight_scale_2, input_scale",
    "diffusers": "diffusers paths; scales as in official",
    "comfyui_old": "official paths; scale_weight, scale_input and a scaled_fp8 marker",
    "comfyui": "official paths; weight_scale, weight_scale_2, input_scale, comfy_quant",
    "lightx2v": "official paths; one weight_scale a row, weights perhaps transposed",
}
#: Prefixes that files are found with, longest first.
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "")
#: What ``torch.compile`` puts into the names of a compiled block's tensors.
COMPILED = "_orig_mod"

#: Paths below a block, official and diffusers. norm2 and norm3 change places.
_IN_BLOCK = {
    "modulation": "scale_shift_table",
    "norm2": "norm3",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "self_attn.q": "attn1.to_q",
    "self_attn.k": "attn1.to_k",
    "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0",
    "self_attn.norm_q": "attn1.norm_q",
    "self_attn.norm_k": "attn1.norm_k",
    "cross_attn.q": "attn2.to_q",
    "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v",
    "cross_attn.o": "attn2.to_out.0",
    "cross_attn.norm_q": "attn2.norm_q",
    "cross_attn.norm_k": "attn2.norm_k",
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    "before_proj": "proj_in",
    "after_proj": "proj_out",
}
#: Paths outside of blocks.
_OUTSIDE = {
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "head.modulation": "scale_shift_table",
    "head.head": "proj_out",
}
#: Fused diffusers projections and the official ones that their rows belong to, in order.
FUSED = {
    "attn1.to_qkv": ("self_attn.q", "self_attn.k", "self_attn.v"),
    "attn2.to_kv": ("cross_attn.k", "cross_attn.v"),
    "attn2.to_added_kv": ("cross_attn.k_img", "cross_attn.v_img"),
}
#: Paths that some files give another name: theirs, and the model's.
_ALIASES = {
    "audio_proj": "multitalk_audio_proj",
    "emo_k_proj": "ip_adapter_single_stream_k_proj",
    "emo_v_proj": "ip_adapter_single_stream_v_proj",
}
_BLOCKS = ("blocks", "vace_blocks")
_ANCHORS = (*_BLOCKS, "patch_embedding", "time_embedding", "head", "condition_embedder")


def check_naming(naming: str) -> None:
    """Raises ValueError if there is no naming called ``naming``."""
    if naming not in NAMINGS:
        raise ValueError(f"naming={naming!r}: use one of {', '.join(map(repr, NAMINGS))}")


def find_prefix(names: Iterable[str]) -> str | None:
    """The prefix with which most ``names`` are those of a Wan model; None if none are."""
    names = [name.split(".") for name in names]
    counts = {}
    for prefix in PREFIXES:
        head = prefix.split(".")[:-1]
        bare = (name[len(head) :] for name in names if name[: len(head)] == head)
        counts[prefix] = sum(bool(name) and name[0] in _ANCHORS for name in bare)
    best = max(counts, key=counts.__getitem__)
    return best if counts[best] else None


def uses_diffusers_paths(names: Iterable[str]) -> bool:
    """Whether bare names (without prefix) are diffusers' rather than official ones."""
    return any({"attn1", "attn2", "condition_embedder"} & set(name.split(".")) for name in names)


def without_compiled(name: str) -> str:
    """``name`` without the components that compiling put in."""
    return ".".join(part for part in name.split(".") if part != COMPILED)


def official(name: str) -> str:
    """The official name for a bare diffusers name."""
    return _translated(name, _FROM_DIFFUSERS_BLOCK, _FROM_DIFFUSERS)


def diffusers(name: str) -> str:
    """The bare diffusers name for an official one."""
    return _translated(name, _IN_BLOCK, _OUTSIDE)


def fused_parts(name: str) -> tuple[str, ...]:
    """Official names of the tensors that a fused diffusers tensor holds, or nothing."""
    lead, rest = _split_block(name)
    for fused, parts in FUSED.items():
        if lead and rest.startswith(f"{fused}."):
            return tuple(f"{lead}{part}{rest[len(fused):]}" for part in parts)
    return ()


def alias(name: str, known: frozenset[str] | set[str]) -> str:
    """``name``, or its other name if only that is one of ``known``."""
    if name in known:
        return name
    other = ".".join(_ALIASES.get(part, part) for part in name.split("."))
    return other if other in known else name


def _translated(name: str, in_block: dict[str, str], outside: dict[str, str]) -> str:
    lead, rest = _split_block(name)
    table = in_block if lead else outside
    parts = rest.split(".")
    for count in range(len(parts), 0, -1):  # the longest path first
        path = ".".join(parts[:count])
        if path in table:
            return ".".join((lead + table[path], *parts[count:]))
    return name


def _split_block(name: str) -> tuple[str, str]:
    """``"blocks.3.ffn.0"`` as ``("blocks.3.", "ffn.0")``; no lead outside of blocks."""
    parts = name.split(".", 2)
    if len(parts) == 3 and parts[0] in _BLOCKS and parts[1].isdigit():
        return f"{parts[0]}.{parts[1]}.", parts[2]
    return "", name


_FROM_DIFFUSERS_BLOCK = {theirs: ours for ours, theirs in _IN_BLOCK.items()}
_FROM_DIFFUSERS = {theirs: ours for ours, theirs in _OUTSIDE.items()}
