"""Call the kernel of an op below the dispatch modes, so that the ops it calls meet a mode again.

A mode is off while it handles an op, and with it for all that the op's kernel calls. Going on from
the keys below that of the modes, with the mode on, leaves out the one op only.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from contig_pass.inductor.hooks import CURRENT_MODE, KEYS_AFTER, KEYS_OF


def call_watched(
    op: torch._ops.OpOverload,
    args: tuple,
    kwargs: Mapping[str, Any],
    mode: AbstractContextManager,
) -> Any:
    """``op(*args, **kwargs)`` from within a mode's handler, with ``mode`` on inside the kernel.

    Where other modes are on as well, theirs is the op, and ``mode`` stays off.
    """
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    below = _below_modes()
    if not tensors or below is None or CURRENT_MODE.find()() is not None:
        return op(*args, **kwargs)
    keys = functools.reduce(operator.or_, map(KEYS_OF.find(), tensors)) & below
    with mode:
        return op.redispatch(keys, *args, **kwargs)


@functools.cache
def _below_modes() -> Any | None:
    """The dispatch keys that come after the modes'; ``None`` if this torch does not tell."""
    if not all(hook.exists() for hook in (CURRENT_MODE, KEYS_AFTER, KEYS_OF)):
        return None
    return KEYS_AFTER.find()(torch._C.DispatchKey.Python)
