"""See what ``torch._scaled_mm`` receives on the CPU, inside compiled code as well.

Inductor's code calls the op through the dispatcher, so a kernel registered for the CPU sees every
operand as it arrives: strides and true address. Values are computed by a plain float product of
dense copies, so that they do not depend on the layouts.
"""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Received:
    """One operand at one call.

    Attributes:
        weight: digest of the call's second matrix, by which its layer can be found.
        operand: ``"a"``, ``"b"`` or ``"bias"``.
        shape, strides: in elements.
        address: of the first element, modulo 16.
        itemsize: bytes of one element.
    """

    weight: str
    operand: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    address: int
    itemsize: int


def digest(weight: torch.Tensor) -> str:
    """A name for the content of a one-byte matrix, whatever its layout."""
    return hashlib.sha256(weight.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


@contextlib.contextmanager
def recording() -> Iterator[list[Received]]:
    """Within the block every ``_scaled_mm`` on the CPU adds its operands to the list."""
    received: list[Received] = []

    def compute(
        a: torch.Tensor,
        b: torch.Tensor,
        scale_a: torch.Tensor,
        scale_b: torch.Tensor,
        bias: torch.Tensor | None = None,
        scale_result: torch.Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        use_fast_accum: bool = False,
    ) -> torch.Tensor:
        del scale_result, use_fast_accum
        weight = digest(b.t())
        for name, tensor in (("a", a), ("b", b), ("bias", bias)):
            if tensor is not None:
                received.append(
                    Received(
                        weight, name, tuple(tensor.shape), tensor.stride(),
                        tensor.data_ptr() % 16, tensor.element_size(),
                    )
                )
        product = (a.contiguous().float() * scale_a) @ (b.contiguous().float() * scale_b)
        if bias is not None:
            product = product + bias.float()
        return product.to(out_dtype or a.dtype)

    def compute_out(*args: object, out: torch.Tensor, **kwargs: object) -> torch.Tensor:
        return out.copy_(compute(*args, **kwargs))  # type: ignore[arg-type]

    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"(?s).*Overriding a previously registered")
        library.impl("_scaled_mm", compute, "CPU")
        library.impl("_scaled_mm.out", compute_out, "CPU")
    try:
        yield received
    finally:
        library._destroy()
