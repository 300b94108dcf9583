"""Which attention kernels and quantised products work here, and why the others do not.

Each is called once on a small problem, in a process of its own, and compared with float64.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from contig_pass.doctor import processes
from contig_pass.doctor.catalogue import catalogue
from contig_pass.doctor.processes import Ended, one_line
from contig_pass.doctor.products import BY_128, MXFP8, NVFP4, ROW_WISE, TENSOR_WISE
from contig_pass.doctor.programs import Program

WORKS = "works"

#: (B, H, L, D) of the problem that attention kernels are given.
_SHAPE = (1, 2, 256, 64)
#: Relative errors that attention may have, by the precision of its products.
_FOUR_BIT, _EIGHT_BIT, _HALF = 0.3, 0.15, 0.02

_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Package:
    """An attention package that is not torch's.

    Attributes:
        distribution: its name for the installer.
        module: what to import.
        function: its entry point, called with q, k and v.
        heads_first: it takes (B, H, L, D), not (B, L, H, D).
        error: relative error that it may have.
    """

    distribution: str
    module: str
    function: str
    heads_first: bool = False
    error: float = _HALF


#: Entry points as in the packages' public sources.
PACKAGES = (
    Package("flash-attn", "flash_attn", "flash_attn_func"),
    Package("flash-attn-3", "flash_attn_interface", "flash_attn_func"),
    Package("fa3-fwd", "fa3_fwd_interface", "flash_attn_func"),
    Package("flash-attn-4", "flash_attn.cute", "flash_attn_func"),
    Package("sageattention", "sageattention", "sageattn", heads_first=True, error=_EIGHT_BIT),
    Package("sageattn3", "sageattn3", "sageattn3_blackwell", heads_first=True, error=_FOUR_BIT),
)

_PRODUCTS = {
    "FP8, tensor-wise scales": ("aten::_scaled_mm.default", TENSOR_WISE),
    "FP8, row-wise scales": ("aten::_scaled_mm.default", ROW_WISE),
    "FP8, 1x128 by 128x128 blocks": ("aten::_scaled_mm.default", BY_128),
    "MXFP8": ("aten::_scaled_mm.default", MXFP8),
    "NVFP4": ("aten::_scaled_mm.default", NVFP4),
    "int8": ("aten::_int_mm.default", "int8"),
}


@dataclass(frozen=True)
class Kernel:
    """One kernel or path: whether it works here.

    Attributes:
        name: of it.
        version: of the package; ``""`` if it is torch's or not installed.
        state: :data:`WORKS`, or why it does not.
    """

    name: str
    version: str
    state: str


def attention_kernels(device: str, jobs: int, timeout: float) -> tuple[Kernel, ...]:
    """The backends of torch's attention, then the packages."""
    backends = {f"SDPA {name}": partial(_backend, b, device) for name, b in _BACKENDS.items()}
    packages = {p.distribution: partial(_package, p, device) for p in PACKAGES}
    states = _states({**backends, **packages}, jobs, timeout)
    versions = {p.distribution: _version(p) for p in PACKAGES}
    return tuple(Kernel(name, versions.get(name, ""), state) for name, state in states.items())


def quantised_products(device: str, jobs: int, timeout: float) -> tuple[Kernel, ...]:
    """The matrix products that quantised linears are made of."""
    programs = {(p.op, p.variant): p for p in catalogue()}
    probes = {
        name: partial(_product, programs[key], device)
        for name, key in _PRODUCTS.items() if key in programs
    }
    return tuple(Kernel(name, "", state) for name, state in _states(probes, jobs, timeout).items())


def _states(
    probes: dict[str, Callable[[], str]], jobs: int, timeout: float
) -> dict[str, str]:
    ends = processes.run_all(list(probes.values()), jobs=jobs, timeout=timeout)
    return dict(zip(probes, map(_state, ends), strict=True))


def _state(end: Ended) -> str:
    return f"{end.problem}: {end.message}" if end.problem else end.value or WORKS


# -- one of each, in a process of its own; what they return says why it does not work ------------


def _qkv(device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(_SHAPE).to(dtype).to(device) for _ in range(3)]


def _backend(backend: SDPBackend, device: str) -> str:
    if device != "cuda" and backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        return "needs a CUDA device"
    tensors = _qkv(device, torch.float32 if device == "cpu" else torch.bfloat16)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")  # torch says in warnings why a backend is not used
        try:
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(*tensors)
        except RuntimeError as error:
            reasons = [_reason(str(w.message)) for w in told]
            return "; ".join(dict.fromkeys(filter(None, reasons))) or one_line(error)
    return _wrong(out, tensors, _HALF)


def _reason(warning: str) -> str:
    """torch's words without where in its source they are; ``""`` for a mere heading."""
    text = warning.partition(" (Triggered internally")[0].strip()
    return "" if text.endswith("because:") else text


def _package(package: Package, device: str) -> str:
    try:
        if importlib.util.find_spec(package.module) is None:
            return "not installed"
    except (ImportError, ValueError):
        return "not installed"
    if device != "cuda":
        return "needs a CUDA device"
    try:
        function = getattr(importlib.import_module(package.module), package.function)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return f"does not import: {one_line(error)}"
    tensors = _qkv(device, torch.bfloat16)
    given = tensors if package.heads_first else [t.transpose(1, 2).contiguous() for t in tensors]
    try:
        out = function(*given)
        torch.cuda.synchronize()
    except Exception as error:
        return one_line(error)
    out = out[0] if isinstance(out, tuple) else out
    return _wrong(out if package.heads_first else out.transpose(1, 2), tensors, package.error)


def _product(program: Program, device: str) -> str:
    given = program.arguments(torch.device(device), {})
    try:
        got = program.run(given)[0].double().cpu()
    except Exception as error:
        return one_line(error)
    want = program.expected(given).cpu() if program.expected else got
    return _off(got, want, max(program.tolerance, 1e-3))


def _wrong(out: torch.Tensor, tensors: list[torch.Tensor], allowed: float) -> str:
    q, k, v = (tensor.double().cpu() for tensor in tensors)
    want = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1) @ v
    return _off(out.double().cpu(), want, allowed)


def _off(got: torch.Tensor, want: torch.Tensor, allowed: float) -> str:
    error = float((got - want).norm() / want.norm())
    return "" if error <= allowed else f"wrong values: relative error {error:.2g}"


def _version(package: Package) -> str:
    try:
        return importlib.metadata.version(package.distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""
