"""Block swap: the last blocks live in host memory and pass through two device buffers."""

from wan_models.block_swap.swap import BlockSwap

__all__ = ["BlockSwap"]
