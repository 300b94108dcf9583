"""Checkpoints written byte by byte, independently of the code under test, and a memory meter."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wan_models import TINY, WanConfig, WanModel
from wan_models.quant import quantize_

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.uint8: "U8",
}
SMALL = replace(TINY, dim=128, ffn_dim=256, num_heads=1, text_dim=32, text_len=8)
RECIPES = (
    None,
    "fp8_e4m3fn",
    "fp8_e5m2",
    "fp8_e4m3fn_scaled",
    "fp8_e4m3fn_scaled_fast",
    "fp8_e4m3fn_dynamic_fast",
    "fp8_e5m2_scaled_fast",
    "fp4_experimental",
    "fp4_scaled",
    "fp4_scaled_fast",
)
#: The layer that files written here are about; not square, so that no mistake goes unseen.
PATH = "blocks.1.ffn.0"


def small_model(config: WanConfig = SMALL, dtype: torch.dtype = torch.bfloat16) -> WanModel:
    """Random weights, every tensor another."""
    torch.manual_seed(0)
    made = WanModel(config).eval().requires_grad_(False)
    for parameter in made.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    return made.to(dtype)


def empty_model(config: WanConfig = SMALL) -> WanModel:
    with torch.device("meta"):
        return WanModel(config).eval()


def quantised_model(recipe: str | None, config=SMALL):
    made = small_model(config)
    if recipe is not None:
        quantize_(made, recipe, ["time_embedding.*"])
    return made


def layer(made: nn.Module) -> nn.Module:
    return made.get_submodule(PATH)


def state(made: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in made.state_dict().items()}


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().clone().flatten().view(torch.uint8).numpy().tobytes()


def write(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    lead: int = 0,
    header_modulo: int | None = None,
    metadata: Mapping[str, str] | None = None,
    edit: Mapping[str, Mapping[str, object]] | None = None,
    cut: int = 0,
) -> Path:
    """Write a safetensors file.

    Args:
        path: the file.
        tensors: in the order in which they lie in the file.
        lead: bytes of nothing before the first tensor.
        header_modulo: what the first byte behind the header is modulo 64.
        metadata: of the header.
        edit: changes to the header's entries.
        cut: bytes to leave out at the end.
    """
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    body = bytes(lead)
    for name, tensor in tensors.items():
        start = len(body)
        body += raw(tensor)
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, len(body)],
        }
    for name, change in (edit or {}).items():
        header[name] = {**header.get(name, {}), **change}
    text = json.dumps(header).encode()
    if header_modulo is not None:
        text += b" " * ((header_modulo - 8 - len(text)) % 64)
    path.write_bytes(len(text).to_bytes(8, "little") + text + body[: len(body) - cut])
    return path


def read(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Type, shape and bytes of every tensor in a file."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    return {
        name: (e["dtype"], tuple(e["shape"]), content[start + e["data_offsets"][0] :][
            : e["data_offsets"][1] - e["data_offsets"][0]
        ])
        for name, e in header.items()
    }


def same(one: nn.Module, other: nn.Module) -> None:
    """Fails unless both have the same layers and the same bits in every tensor."""
    kinds = [{n: (type(m).__name__, getattr(m, "recipe", None)) for n, m in each.named_modules()}
             for each in (one, other)]
    assert kinds[0] == kinds[1]
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert tensor.shape == second[name].shape, name
        assert raw(tensor) == raw(second[name]), name


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made within it: now and at most. Mapped files do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu":
                # Views of a mapped file come from set_, which makes no memory.
                self._count(leaf.untyped_storage(), counts="set_" not in func.__name__)
        return out

    def _count(self, storage: torch.UntypedStorage, *, counts: bool) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes() if counts else 0
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def state_bytes(module: nn.Module) -> int:
    return sum(math.prod(t.shape) * t.itemsize for t in module.state_dict().values())
