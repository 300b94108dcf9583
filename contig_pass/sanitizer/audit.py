"""Is a custom op honest: about the layout of its results, and about what it writes to?

Looked at for ops outside torch's own namespaces, once for each way in which operands lie.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from contig_pass.sanitizer.calls import EagerCall

_logger = logging.getLogger("contig_pass")

#: Namespaces of ops that come with torch. Some of them, as c10d's, write without saying so.
_TORCHS_OWN = frozenset(
    (
        *("aten", "prim", "prims", "profiler", "inductor", "export", "higher_order", "rngprims"),
        *("c10d", "c10d_functional", "_c10d_functional", "_c10d_functional_autograd", "_dtensor"),
        *("fsdp", "symm_mem", "streams", "static_runtime", "sparse", "mkl", "mkldnn", "onednn"),
        *("mkldnn_prepacked", "prepacked", "xnnpack", "quantized", "_quantized"),
        *("quantized_decomposed", "contig_pass"),
    )
)


def is_foreign(op: torch._ops.OpOverload) -> bool:
    """Whether ``op`` does not come with torch."""
    return op.namespace not in _TORCHS_OWN


# -- writes --------------------------------------------------------------------------------------


def undeclared(call: EagerCall, limit: int) -> dict[str, torch.Tensor]:
    """Copies of the operands that ``call`` does not declare to write to, by name.

    Args:
        call: the call to come.
        limit: bytes; larger operands are left out.
    """
    declared = {
        tensor.value.untyped_storage().data_ptr()
        for tensor in call.tensors.values()
        if tensor.argument in call.written
    }
    copies = {}
    for name, tensor in call.tensors.items():
        value = tensor.value
        private = value.untyped_storage().data_ptr() not in declared
        if private and value.nbytes <= limit and not value.is_quantized:
            with contextlib.suppress(NotImplementedError):  # of a dtype that cannot be copied
                copies[name] = value.clone()
    return copies


def written(call: EagerCall, before: dict[str, torch.Tensor]) -> Iterator[str]:
    """Names of the operands that are no longer what they were ``before``."""
    for name, held in before.items():
        if not _same_bits(held, call.tensors[name].value):
            yield name


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype == torch.bool:  # one of two values, whatever the byte is
        return torch.equal(one, other)
    return torch.equal(_bytes(one), _bytes(other))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


# -- fake implementations ------------------------------------------------------------------------


def promised(op: Any, args: tuple, kwargs: dict[str, Any]) -> list[torch.Tensor] | None:
    """What the op's fake implementation returns for such operands; ``None`` if it cannot tell."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        return mode.from_tensor(tensor, static_shapes=True)

    try:
        args, kwargs = tree_map_only(torch.Tensor, fake, (args, kwargs))
        with mode:
            return _tensors(op(*args, **kwargs))
    except Exception as error:  # none is registered, or what it does needs values
        _logger.debug("%s: no fake result to compare with: %s", op, error)
        return None


def differences(kept: list[torch.Tensor], result: Any) -> Iterator[tuple[torch.Tensor, str]]:
    """Tensors that a kernel returned, with what the fake promised otherwise.

    Strides of dimensions of one element do not count, nor does where an empty tensor lies.
    """
    returned = _tensors(result)
    if len(returned) != len(kept) and returned:
        yield returned[0], f"{len(kept)} tensors, and there are {len(returned)}"
        return
    for real, fake in zip(returned, kept, strict=False):
        for what, theirs, ours in (
            ("dtype", fake.dtype, real.dtype),
            ("shape", tuple(fake.shape), tuple(real.shape)),
            ("strides", _strides(fake), _strides(real)),
            ("storage offset", _offset(fake), _offset(real)),
        ):
            if theirs != ours:
                yield real, f"{what} {theirs}, and it is {ours}"
                break


def _tensors(result: Any) -> list[torch.Tensor]:
    leaves = tree_leaves(result)
    return [t for t in leaves if isinstance(t, torch.Tensor) and t.layout is torch.strided]


def _strides(tensor: torch.Tensor) -> tuple[int | None, ...]:
    if tensor.numel() == 0:
        return ()
    pairs = zip(tensor.stride(), tensor.shape, strict=True)
    return tuple(stride if size > 1 else None for stride, size in pairs)


def _offset(tensor: torch.Tensor) -> int:
    return tensor.storage_offset() if tensor.numel() else 0
