"""Our path as rows: recipes and attention kernels by what is there, blocks, and their compile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

import contig_pass
from benchmarks.speed.measure import Settings
from benchmarks.speed.rows import Unavailable
from benchmarks.speed.sizes import Size
from wan_models import WanBlock, WanConfig, WanModel, quantize_
from wan_models.attention import measure
from wan_models.attention.kernels import MODES, check_mode
from wan_models.quant import RECIPES, high_precision

#: Recipes by kind, the first that there is being taken.
RECIPES_BY_KIND = {
    "FP8": ("fp8_e4m3fn_rowwise_fast", "fp8_e4m3fn_scaled_fast"),
    "FP4": ("fp4_scaled_fast",),
}
#: Attention modes by kind, likewise: our own kernel, or chosen by measurement, or else by rule.
MODES_BY_KIND = {
    "16-bit": ("fp16", "auto", "flash_attn_3", "sdpa"),
    "16-bit, fp32 scores": ("auto", "flash_attn_3", "sdpa"),
    "8-bit": ("auto_fp8", "fp8"),
    "own 8-bit": ("fp8",),
}


def recipe(kind: str, given: str | None = None) -> str:
    """The name of the recipe of ``kind``, ``"FP8"`` or ``"FP4"``, or the given one.

    Raises:
        Unavailable: there is none.
    """
    candidates = (given,) if given else RECIPES_BY_KIND[kind]
    for name in candidates:
        if name in RECIPES:
            return name
    raise Unavailable(f"wan_models.quant has no recipe {' or '.join(map(repr, candidates))}")


def mode(kind: str, config: WanConfig, device: str) -> str:
    """The attention mode of ``kind`` that this machine can run.

    Raises:
        Unavailable: none of them can; the message says why not.
    """
    reasons = []
    for name in MODES_BY_KIND[kind]:
        problem = mode_problem(name, config, device)
        if not problem:
            return name
        reasons.append(problem)
    raise Unavailable("; ".join(reasons))


def mode_problem(name: str, config: WanConfig, device: str) -> str:
    """Why an attention mode cannot run here, in one line, or ``""``."""
    if name not in MODES:
        return f"wan_models has no attention mode {name!r}"
    try:
        check_mode(name, torch.device(device), dtype=torch.bfloat16, head_dim=config.head_dim)
    except ValueError as problem:
        return str(problem)
    return ""


def measured_attention(mode: str, size: Size, device: str) -> dict[str, str]:
    """Figures of an attention mode: its name, and that of the kernel that a compile takes for it.

    A mode that chooses measures here what is fastest for the self-attention of a block: a compile
    takes what was measured last, else the first in order that can run, and never measures itself.
    An eager block would measure the text's attention last, whose fastest kernel may be another.
    """
    chosen = mode
    if mode in ("auto", "auto_fp8"):
        config = size.config
        chosen = measure(
            mode, 1, size.tokens, config.num_heads, config.head_dim, device=device
        ).mode
    return {"attention mode": mode, "attention": chosen}


def op(name: str) -> Callable[..., Any]:
    """``wan_models::name``.

    Raises:
        Unavailable: there is no such op.
    """
    if not hasattr(torch.ops.wan_models, name):
        raise Unavailable(f"wan_models has no op {name!r}")
    return getattr(torch.ops.wan_models, name)


def compiled(
    function: Callable[..., Any],
    settings: Settings,
    *,
    dynamic: bool = False,
    mode: str | None = None,
) -> Callable[..., Any]:
    """``function`` under contig_safe; in a smoke run without Inductor."""
    options = {"inner": "aot_eager"} if settings.smoke else None
    # By the function, not by its name: a checkout on the path has no entry points.
    return torch.compile(
        function, backend=contig_pass.contig_safe, fullgraph=True, dynamic=dynamic,
        **({"options": options} if options else {"mode": mode} if mode else {}),
    )


def inductor(function: Callable[..., Any], settings: Settings) -> Callable[..., Any]:
    """``function`` under plain Inductor, as peers are compiled; in a smoke run only traced."""
    backend = "eager" if settings.smoke else "inductor"
    return torch.compile(function, backend=backend, fullgraph=True, dynamic=False)


# -- weights -------------------------------------------------------------------------------------


def fresh_block(config: WanConfig, device: str, seed: int, mode: str = "sdpa") -> WanBlock:
    """A bf16 block with random weights that depend on ``seed`` alone, made on ``device``."""
    with torch.device("meta"):
        block = WanBlock(config, mode).bfloat16()
    return fill(block, device, seed)


def fill(module: nn.Module, device: str, seed: int) -> Any:
    """Give a module on the meta device memory and random parameters.

    Matrices have a spread of 1/sqrt(K), so that activations keep their size; modulations one of
    0.5, since gates near 0 would hide attention and feed-forward from a comparison of outputs.
    """
    module.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "modulation" in name:
                parameter.normal_(std=0.5, generator=generator)
            elif parameter.dim() > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
            elif name.endswith("bias"):
                parameter.normal_(std=0.02, generator=generator)
            else:
                parameter.fill_(1.0)
    return module.eval().requires_grad_(False)


def quantise_block(block: WanBlock, recipe: str) -> list[Any]:
    """Quantise a block in place, with the exceptions that a whole model has; what was done."""
    holder = nn.Module()
    holder.blocks = nn.ModuleList([block])
    return quantize_(holder, recipe, high_precision(holder))


def block(
    config: WanConfig, recipe: str, mode: str, device: str, seed: int = 0
) -> WanBlock:
    """A quantised block; the same seed gives the same weights before quantisation."""
    made = fresh_block(config, device, seed, mode)
    quantise_block(made, recipe)
    return made


class _FreshEachTime(nn.Module):
    """Stands for a block that is made from its seed whenever it is called: 0.7 GB, not 28."""

    sparse, motion_attn = False, None

    def __init__(self, config: WanConfig, device: str, seed: int) -> None:
        super().__init__()
        self.config, self.device, self.seed = config, device, seed

    def forward(self, *inputs: Any) -> torch.Tensor:
        return fresh_block(self.config, self.device, self.seed)(*inputs)


def _shell(config: WanConfig, device: str, seed: int) -> WanModel:
    """A bf16 model without blocks."""
    with torch.device("meta"):
        model = WanModel(config).bfloat16()
    model.blocks = nn.ModuleList()
    return fill(model, device, seed)


def reference_model(config: WanConfig, device: str, seed: int = 0) -> WanModel:
    """The bf16 model with the weights of :func:`model`, a block in memory at a time."""
    made = _shell(config, device, seed)
    made.blocks.extend(
        _FreshEachTime(config, device, seed + 1 + n) for n in range(config.num_layers)
    )
    return made


def model(
    config: WanConfig, recipe: str | None, mode: str, device: str, seed: int = 0
) -> WanModel:
    """A model whose blocks were quantised one by one as they were made.

    Embeddings and head stay in bf16.

    Args:
        config: sizes.
        recipe: None leaves all in bf16.
        mode: attention mode.
        device: where it is made.
        seed: of the weights.
    """
    made = _shell(config, device, seed)
    for number in range(config.num_layers):
        one = fresh_block(config, device, seed + 1 + number, mode)
        if recipe is not None:
            quantise_block(one, recipe)
        made.blocks.append(one)
    return made


def compile_blocks(model: WanModel, settings: Settings, *, dynamic: bool, mode: str | None) -> None:
    """Compile every block in place; equal ones share one compile."""
    options: dict[str, Any] = {"backend": contig_pass.contig_safe, "fullgraph": True}
    if settings.smoke:
        options["options"] = {"inner": "aot_eager"}
    elif mode:
        options["mode"] = mode
    model.compile_blocks(dynamic=dynamic, **options)


def stored_bytes(module: nn.Module) -> int:
    """Of parameters and buffers, each counted once."""
    seen: dict[int, int] = {}
    tensors: Sequence[torch.Tensor] = [*module.parameters(), *module.buffers()]
    for tensor in tensors:
        seen[id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(seen.values())
