"""What the sanitizer found, in one sentence each."""

from __future__ import annotations

from dataclasses import dataclass

from contig_pass.sanitizer.lines import NOWHERE, Line

#: Kinds of finding.
LAYOUT = "layout"
FAKE = "fake"
WRITE = "undeclared write"
SLOW = "slow attention"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong at one line.

    Attributes:
        kind: :data:`LAYOUT`: an operand breaks its contract. :data:`FAKE`: a kernel returned
            another layout than its fake implementation says. :data:`WRITE`: a kernel wrote to an
            operand without declaring it. :data:`SLOW`: attention runs without a fused kernel
            because of a layout.
        op: ``namespace::name`` of the op.
        operand: its argument's name; of a :data:`FAKE`, ``result``.
        line: the user's line that called the op.
        what: what is wrong, in words.
        memory: dtype, shape, strides and address of the operand.
        maker: name of the view op that made the operand what it is; empty if none was seen.
        made: the user's line that called it.
        remedy: what would be right.
        rules: the broken rules, in words.
        module: path of the module that was being called; empty if none was.
    """

    kind: str
    op: str
    operand: str
    line: Line
    what: str
    memory: str
    remedy: str
    maker: str = ""
    made: Line = NOWHERE
    rules: tuple[str, ...] = ()
    module: str = ""

    def __str__(self) -> str:
        made = f"; {self.maker} at {self.made} made it so" if self.maker else ""
        within = f", in module {self.module}" if self.module else ""
        subject = f"{self.op} {self.operand} at {self.line}{within}"
        return f"{subject}: {self.what}; it is {self.memory}{made}; {self.remedy}"

