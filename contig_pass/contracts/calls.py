"""Contracts of what is no op: users' Triton kernels and subgraphs.

Both take memory as it comes, so alignment is all that is asked, and a repair keeps the strides: a
Triton kernel receives them as numbers of their own, and a subgraph was traced with them.
"""

from __future__ import annotations

from contig_pass.contracts.registry import CALLS, Contract
from contig_pass.contracts.rules import AlignedPointer, StartsMemory
from contig_pass.layout import INPUT_ALIGNMENT

TRITON_KERNEL = Contract(
    op="triton kernel",
    operand="pointer",
    rules=(AlignedPointer(INPUT_ALIGNMENT),),
    source="Triton specialises kernels on pointers that are multiples of 16 bytes, and Inductor "
    "takes fresh memory to be so",
    family=CALLS,
    keep_strides=True,
)

SUBGRAPH = Contract(
    op="subgraph",
    operand="operand",
    rules=(AlignedPointer(INPUT_ALIGNMENT),),
    source="one compiled subgraph serves every call, whatever its operands' storage offsets",
    family=CALLS,
    keep_strides=True,
)

SUBGRAPH_RESULT = Contract(
    op="subgraph",
    operand="result",
    rules=(StartsMemory(),),
    source="measured, torch 2.11 to 2.14: Inductor's caller of torch.cond counts a result's offset "
    "twice and reads beyond it, without an error",
    family=CALLS,
    keep_strides=True,
)
