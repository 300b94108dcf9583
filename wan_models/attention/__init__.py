"""Attention classes of the Wan family, and the dispatcher behind them."""

from wan_models.attention.auto import choice, choices, measure
from wan_models.attention.conditions import CrossConditions
from wan_models.attention.cross_attention import WanCrossAttention
from wan_models.attention.humo_attention import WanHuMoCrossAttention
from wan_models.attention.i2v_cross_attention import WanI2VCrossAttention
from wan_models.attention.kernels import attention
from wan_models.attention.motion_attention import MTVCrafterMotionAttention
from wan_models.attention.multitalk import SingleStreamAttention, SingleStreamMultiAttention
from wan_models.attention.nag import NagParams, guide
from wan_models.attention.self_attention import WanSelfAttention
from wan_models.attention.speakers import reference_map, reference_masks

__all__ = [
    "CrossConditions",
    "MTVCrafterMotionAttention",
    "NagParams",
    "SingleStreamAttention",
    "SingleStreamMultiAttention",
    "WanCrossAttention",
    "WanHuMoCrossAttention",
    "WanI2VCrossAttention",
    "WanSelfAttention",
    "attention",
    "choice",
    "choices",
    "guide",
    "measure",
    "reference_map",
    "reference_masks",
]
