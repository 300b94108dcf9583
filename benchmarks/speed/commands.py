"""The seven speed commands, for ``python -m benchmarks``."""

from __future__ import annotations

import argparse

from benchmarks.speed import attention, block, compiling, gemm, memory, model, quant
from benchmarks.speed.command import register

COMMANDS = tuple(
    module.COMMAND for module in (gemm, quant, attention, block, model, compiling, memory)
)


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register all of them."""
    for command in COMMANDS:
        register(command, subparsers)
