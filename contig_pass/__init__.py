"""Layout safety for quantised kernels under ``torch.compile``: the public names."""

from contig_pass.backend import contig_safe
from contig_pass.contracts import register_contract, unregister_contract
from contig_pass.contracts.rules import (
    AlignedPitch,
    AlignedPointer,
    ColumnMajor,
    Dense,
    Multiple,
    NoOverlap,
    RowMajor,
    Rule,
    UnitStrideLast,
)
from contig_pass.errors import ContigPassError
from contig_pass.explain import explain
from contig_pass.export import aoti_compile_and_package, apply
from contig_pass.preparing.relay import prepare
from contig_pass.report.log import forget_reports, last_reports
from contig_pass.report.model import Report
from contig_pass.sanitizer import sanitize

__all__ = [
    "AlignedPitch",
    "AlignedPointer",
    "ColumnMajor",
    "ContigPassError",
    "Dense",
    "Multiple",
    "NoOverlap",
    "Report",
    "RowMajor",
    "Rule",
    "UnitStrideLast",
    "aoti_compile_and_package",
    "apply",
    "contig_safe",
    "explain",
    "forget_reports",
    "last_reports",
    "prepare",
    "register_contract",
    "sanitize",
    "unregister_contract",
]
