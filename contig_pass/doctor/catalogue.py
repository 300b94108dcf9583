"""Every program that the doctor knows."""

from __future__ import annotations

from contig_pass.contracts.registry import resolve_op
from contig_pass.doctor import attention, products
from contig_pass.doctor.programs import Program
from contig_pass.errors import ContractError


def catalogue() -> tuple[Program, ...]:
    """The programs whose op this version of torch has."""
    return tuple(p for p in (*products.programs(), *attention.programs()) if _exists(p.op))


def _exists(op: str) -> bool:
    try:
        resolve_op(op)
    except ContractError:
        return False
    return True
