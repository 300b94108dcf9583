"""Checkpoints: safetensors files in every usual naming, to and from a model.

| naming | paths | a quantised linear ``X`` |
|---|---|---|
| ``official`` | official | ``X.weight``, ``X.weight_scale``, for NVFP4 ``X.weight_scale_2``, \
``X.input_scale`` if there is one |
| ``diffusers`` | diffusers, fused projections too | the same |
| ``comfyui_old`` | official | FP8: ``X.weight``, ``X.scale_weight``, ``X.scale_input``, and in \
each file a marker ``scaled_fp8``; two elements in it forbid FP8 products |
| ``comfyui`` | official | as in ``official``, with ``X.comfy_quant`` (JSON); NVFP4 in tiles |
| ``lightx2v`` | official | FP8: ``X.weight``, perhaps (K, N), and a ``weight_scale`` a row |
"""

from wan_models.checkpoint.contents import Detected
from wan_models.checkpoint.detect import detect, variant
from wan_models.checkpoint.errors import CheckpointError, Problem
from wan_models.checkpoint.load import LoadReport, load
from wan_models.checkpoint.naming import NAMINGS
from wan_models.checkpoint.save import save

__all__ = [
    "NAMINGS",
    "CheckpointError",
    "Detected",
    "LoadReport",
    "Problem",
    "detect",
    "load",
    "save",
    "variant",
]
