"""Attention classes of the Wan family, and the dispatcher behind them."""

from wan_models.attention.cross_attention import WanCrossAttention
from wan_models.attention.kernels import attention
from wan_models.attention.self_attention import WanSelfAttention

__all__ = ["WanCrossAttention", "WanSelfAttention", "attention"]
