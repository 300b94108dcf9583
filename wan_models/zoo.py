"""Every model by name, at full size or tiny with the same structure."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from wan_models import addons
from wan_models.attention.kernels import check_mode
from wan_models.config import CONFIGS, WanConfig
from wan_models.model import WanModel
from wan_models.quant import high_precision, quantize_


@dataclass(frozen=True)
class Variant:
    """One model of the zoo.

    Attributes:
        config: sizes at full size.
        addons: what is attached to it, see :func:`wan_models.addons.attach`.
    """

    config: WanConfig
    addons: tuple[str, ...] = ()


_PLAIN = {name: Variant(config) for name, config in CONFIGS.items() if name != "tiny"}
#: Every model. The add-ons lie on the model that they were published for.
VARIANTS = _PLAIN | {
    "fantasytalking-14b": Variant(CONFIGS["i2v-14b"], ("fantasytalking",)),
    "fantasyportrait-14b": Variant(CONFIGS["i2v-14b"], ("fantasyportrait",)),
    "multitalk-14b": Variant(CONFIGS["i2v-14b"], ("multitalk",)),
    "mtvcrafter-14b": Variant(CONFIGS["i2v-14b"], ("mtvcrafter",)),
    # HuMo takes its reference images as latents beside the noise, like the 2.2 I2V model.
    "humo-14b": Variant(CONFIGS["i2v-a14b"], ("humo",)),
    # The video half of Ovi; the tokens of its sound half come in the conditions.
    "ovi-5b": Variant(CONFIGS["ti2v-5b"], ("ovi",)),
}
NAMES = tuple(VARIANTS)
SIZES = ("full", "tiny")


def variant(name: str, size: str = "full") -> Variant:
    """Sizes and add-ons of a model.

    Raises:
        ValueError: an unknown name or size.
    """
    if name not in VARIANTS:
        raise ValueError(f"model {name!r}: use one of {', '.join(map(repr, NAMES))}")
    if size not in SIZES:
        raise ValueError(f"size {size!r}: use one of {', '.join(map(repr, SIZES))}")
    found = VARIANTS[name]
    return Variant(found.config.tiny(), found.addons) if size == "tiny" else found


def build(
    name: str,
    size: str = "full",
    quantization: str | None = None,
    attention: str = "sdpa",
    *,
    dtype: torch.dtype = torch.bfloat16,
) -> WanModel:
    """A model with random weights, add-ons attached, for inference.

    It is made on the default device: within ``torch.device("meta")`` without memory.

    Args:
        name: one of :data:`NAMES`.
        size: ``"full"``, or ``"tiny"``: dimension 256 and two or three blocks.
        quantization: name of a recipe, see :mod:`wan_models.quant`, for all linears but
            :data:`wan_models.quant.HIGH_PRECISION`; None leaves all in ``dtype``.
        attention: kernel, see :func:`wan_models.attention.attention`, or ``"radial"``.
        dtype: of the parameters.

    Raises:
        ValueError: an unknown name, size or recipe, or a kernel that this machine rules out.
    """
    chosen = variant(name, size)
    device = torch.get_default_device()
    check_mode(attention, device, dtype=dtype, head_dim=chosen.config.head_dim)
    with _default_dtype(dtype):
        model = WanModel(chosen.config, attention)
        for addon in chosen.addons:
            addons.attach(model, addon)
    model.eval().requires_grad_(False)
    if quantization is not None:
        quantize_(model, quantization, high_precision(model))
    return model


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Parameters are made in ``dtype`` at once: at full size two copies might not fit."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
