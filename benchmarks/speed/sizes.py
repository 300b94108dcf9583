"""Sizes of what is timed, and the work in it: FLOPs, bytes, and the peaks they are held against."""

from __future__ import annotations

from dataclasses import dataclass, replace

from wan_models import TINY, WAN_14B, WanConfig

#: Dense peaks of an H100 SXM: TFLOPS by type of product (NVIDIA's data sheet, without sparsity).
PEAK_TFLOPS = {"bf16": 989.0, "fp8": 1979.0}
#: Its memory bandwidth in TB/s (same source).
PEAK_TBS = 3.35


@dataclass(frozen=True)
class Size:
    """One resolution.

    Attributes:
        name: as in a table.
        grid: tokens along (time, rows, columns) of 81 frames.
        config: sizes of the transformer.
    """

    name: str
    grid: tuple[int, int, int]
    config: WanConfig = WAN_14B

    @property
    def tokens(self) -> int:
        """L."""
        return self.grid[0] * self.grid[1] * self.grid[2]


#: 832x480 and 1280x720, 81 frames: 32,760 and 75,600 tokens.
SIZES = {"480p": Size("480p", (21, 30, 52)), "720p": Size("720p", (21, 45, 80))}
#: For a CPU. Two grids, because one command changes the resolution.
SMOKE = {
    "480p": Size("480p", (3, 4, 5), TINY),
    "720p": Size("720p", (3, 4, 7), TINY),
}


def one_layer(size: Size) -> WanConfig:
    """The configuration with a single block."""
    return replace(size.config, num_layers=1)


def linear_shapes(config: WanConfig) -> dict[str, tuple[int, int]]:
    """(K, N) of the products of a block that see every video token."""
    dim, ffn = config.dim, config.ffn_dim
    return {
        "projection": (dim, dim),
        "q, k and v in one": (dim, 3 * dim),
        "feed-forward in": (dim, ffn),
        "feed-forward out": (ffn, dim),
    }


def attention_flops(queries: int, keys: int, config: WanConfig) -> float:
    """Two products of 2 L S D for each head."""
    return 4.0 * queries * keys * config.dim


def linear_flops(tokens: int, config: WanConfig) -> float:
    """All linears of a block, with k and v of the text."""
    dim, ffn = config.dim, config.ffn_dim
    video = 2.0 * tokens * (6 * dim * dim + 2 * dim * ffn)
    return video + 2.0 * config.text_len * 2 * dim * dim


def block_flops(tokens: int, config: WanConfig) -> dict[str, float]:
    """Of one block by part."""
    return {
        "linears": linear_flops(tokens, config),
        "attention": attention_flops(tokens, tokens, config),
        "text attention": attention_flops(tokens, config.text_len, config),
    }


def operand_bytes(tokens: int, config: WanConfig) -> float:
    """What kernels must move that make 8-bit operands of attention, fused as far as they go.

    In bytes a token, with C the model dimension: RMS norm, rotary and quantise of q and of k, RMS
    norm and quantise of the text's q, v to 8 bits: read 2C, write C each. The text's k and v are
    left out.
    """
    return float(tokens * 4 * 3 * config.dim)


def elementwise_bytes(tokens: int, config: WanConfig, *, narrow_attention: bool = True) -> float:
    """What a block's other elementwise kernels must move if each is fused as far as it goes.

    In bytes a token, with C the model dimension, F the inner one, 16-bit activations and 8-bit
    operands of products:

    * norm, modulate, quantise: read 2C, write C;
    * where attention is in 16 bits, RMS norm and rotary of q and of k, RMS norm of the text's q:
      read 2C, write 2C each; where it is not, see :func:`operand_bytes`;
    * the results of both attentions to 8 bits: read 2C, write C each;
    * residual, gate and the next norm, quantised: read 4C, write 3C, twice;
    * GELU and quantise: read 2F, write F;
    * the last residual and gate: read 4C, write 2C.
    """
    dim, ffn = config.dim, config.ffn_dim
    of_queries_and_keys = 0 if narrow_attention else 3 * 4
    return float(tokens * ((3 + of_queries_and_keys + 2 * 3 + 2 * 7 + 6) * dim + 3 * ffn))


def model_flops(tokens: int, config: WanConfig) -> float:
    """Of one forward, embeddings and head left out."""
    return config.num_layers * sum(block_flops(tokens, config).values())


def tflops(flops: float, milliseconds: float) -> float:
    """TFLOPS of ``flops`` in that time."""
    return flops / milliseconds / 1e9


def terabytes(moved: float, milliseconds: float) -> float:
    """TB/s of ``moved`` bytes in that time."""
    return moved / milliseconds / 1e9
