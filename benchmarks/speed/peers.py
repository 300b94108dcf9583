"""The peers of a block: the seed's hand fix, diffusers' block, torchao, FlashAttention 3.

They are written as their users write them and share nothing with our path but the inputs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.speed.rows import Unavailable
from wan_models import BlockInputs, WanBlock, WanConfig

E4M3 = torch.float8_e4m3fn
_LIMIT = 448.0
_FA3_MODULES = ("flash_attn_interface", "fa3_fwd_interface")

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


# -- the hand fix --------------------------------------------------------------------------------


class HandFixedLinear(nn.Module):
    """A linear as the seed patches it: static scale 1, ``.contiguous()`` on what it multiplies."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        wide = linear.weight.detach().float()
        scale = wide.abs().amax() / _LIMIT
        self.register_buffer("weight", (wide / scale).to(E4M3))
        self.register_buffer("scale_weight", scale)
        self.register_buffer("scale_input", torch.ones((), device=wide.device))
        self.register_buffer("bias", linear.bias.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, L, K). Returns (B, L, N)."""
        x = x.contiguous()
        rows = x.reshape(-1, x.shape[-1]).clamp(-_LIMIT, _LIMIT).to(E4M3).contiguous()
        out = torch._scaled_mm(
            rows, self.weight.t(), out_dtype=x.dtype, bias=self.bias,
            scale_a=self.scale_input, scale_b=self.scale_weight,
        )
        return out.reshape(*x.shape[:-1], -1)


def hand_fixed(block: WanBlock) -> WanBlock:
    """``block`` with every linear replaced, in place."""
    for name, linear in list(block.named_modules()):
        if isinstance(linear, nn.Linear):
            parent, _, leaf = name.rpartition(".")
            setattr(block.get_submodule(parent), leaf, HandFixedLinear(linear))
    return block


# -- attention of peers --------------------------------------------------------------------------


def cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """(B, L, H, D) through torch's cuDNN kernel, without a copy; on a CPU torch's choice."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.device.type != "cuda":
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def fa3() -> Callable[..., Any]:
    """``flash_attn_func`` of FlashAttention 3.

    Raises:
        Unavailable: it is not installed, does not import, or there is no Hopper GPU.
    """
    if not torch.cuda.is_available():
        raise Unavailable("FlashAttention 3 needs a Hopper GPU")
    problems = []
    for module in _FA3_MODULES:
        try:
            return importlib.import_module(module).flash_attn_func
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            problems.append(f"{module}: {str(error).partition(chr(10))[0]}")
    raise Unavailable(f"FlashAttention 3: {'; '.join(problems)}")


@torch.library.custom_op("benchmarks_speed::fa3", mutates_args=())
def fa3_op(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """FlashAttention 3 in 16 bits behind an op, as anyone composes it with a compiler."""
    return first(fa3()(q, k, v))


@fa3_op.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return q.new_empty(q.shape)


def first(result: Any) -> torch.Tensor:
    """The output of a package that may return the log-sum-exp beside it."""
    return result[0] if isinstance(result, tuple) else result


# -- diffusers -----------------------------------------------------------------------------------


class PeerProcessor:
    """diffusers' ``WanAttnProcessor`` for text to video, with the attention kernel as a choice."""

    def __init__(self, attend: Attend) -> None:
        self.attend = attend

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """hidden_states: (B, L, C). Returns the same shape."""
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(source))
        value = attn.to_v(source)
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, value))
        if rotary_emb is not None:
            query, key = (_rotated(x, *rotary_emb) for x in (query, key))
        out = self.attend(query, key, value).flatten(2, 3).type_as(query)
        return attn.to_out[1](attn.to_out[0](out))


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """As diffusers writes it."""
    x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = x1 * cos - x2 * sin
    out[..., 1::2] = x1 * sin + x2 * cos
    return out.type_as(x)


def diffusers_block(
    config: WanConfig, attend: Attend, device: str, seed: int = 0
) -> nn.Module:
    """diffusers' ``WanTransformerBlock`` in bf16 with its own random weights.

    Raises:
        Unavailable: diffusers is not installed, or has no such block.
    """
    try:
        from diffusers.models.transformers.transformer_wan import WanTransformerBlock
    except (ImportError, RuntimeError) as error:
        raise Unavailable(f"diffusers: {str(error).partition(chr(10))[0]}") from error
    torch.manual_seed(seed)
    with torch.device(device):
        block = WanTransformerBlock(
            config.dim, config.ffn_dim, config.num_heads, "rms_norm_across_heads", True, config.eps
        )
    block = block.to(torch.bfloat16).eval().requires_grad_(False)
    for attn in (block.attn1, block.attn2):
        attn.set_processor(PeerProcessor(attend))
    return block


def diffusers_inputs(inputs: BlockInputs) -> tuple[Any, ...]:
    """Our block's inputs as diffusers' block takes them."""
    cos, sin = (
        part.repeat_interleave(2, dim=-1)[None].to(inputs.x.device) for part in inputs.rope
    )
    return inputs.x, inputs.context, inputs.e0, (cos, sin)


def torchao_(block: nn.Module, granularity: str) -> nn.Module:
    """Quantise by torchao's dynamic FP8, in place: ``"row"`` or ``"tensor"``.

    Its recommended Inductor settings are left out, because they are global and would apply to
    every other row too.

    Raises:
        Unavailable: torchao is not installed, or refuses this device.
    """
    if not torch.cuda.is_available():
        raise Unavailable("torchao's FP8 needs a GPU of capability 8.9 or later")
    try:
        from torchao.quantization import (
            Float8DynamicActivationFloat8WeightConfig,
            PerRow,
            PerTensor,
            quantize_,
        )
    except ImportError as error:
        raise Unavailable(f"torchao: {str(error).partition(chr(10))[0]}") from error
    scales = PerRow() if granularity == "row" else PerTensor()
    try:
        settings = Float8DynamicActivationFloat8WeightConfig(
            granularity=scales, set_inductor_config=False
        )
    except TypeError:  # an older one
        settings = Float8DynamicActivationFloat8WeightConfig(granularity=scales)
    quantize_(block, settings)
    return block
