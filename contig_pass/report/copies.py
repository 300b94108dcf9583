"""Copies that the user's own program asks for, and what each is good for."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from contig_pass.contracts.target import Target, target_of
from contig_pass.cost import bandwidth_of
from contig_pass.layout import Layout
from contig_pass.provenance import origin_of
from contig_pass.report.place import Place, plain

#: The call returned its argument: there is no copy.
NO_OP = "no-op"
#: The program makes a copy; the compiler itself leaves none of its own in the graph.
COMPILED_AWAY = "compiled away"
#: Nothing can tell the program with the copy from the program without it.
REDUNDANT = "redundant"
#: Likewise, and taken out: ``options={"remove_redundant": True}``.
REMOVED = "removed"
#: Its readers take what was copied as it is, or the pass makes the copy that they need.
UNNEEDED = "unneeded"
#: Something depends on it, or it could not be proved that nothing does.
NEEDED = "needed"

VERDICTS = (NO_OP, COMPILED_AWAY, REDUNDANT, REMOVED, UNNEEDED, NEEDED)


@dataclass(frozen=True)
class Copy:
    """One call that copies, or looks as if it did.

    Attributes:
        verdict: one of :data:`VERDICTS`.
        call: what was called, such as ``"contiguous"``; of a copy that another call brought with
            it that call and the op, such as ``"flatten (aten.clone)"``.
        proof: why that is the verdict.
        node: the call's name in the graph that Dynamo traced, or the copy's in the compiled graph.
        dtype, shape, device: of what is copied.
        before, after: its memory, and that of the copy.
        nbytes: bytes read plus written where the copy is a kernel of its own; 0 for a no-op;
            ``None`` if symbolic.
        microseconds: modelled time for them; likewise.
        module: dotted path of the module in the user's program.
        file, lineno, code: the user's source line.
    """

    verdict: str
    call: str
    proof: str
    node: str
    dtype: str
    shape: tuple[int | str, ...]
    device: str
    before: Place
    after: Place
    nbytes: int | None
    microseconds: float | None
    module: str
    file: str
    lineno: int
    code: str


def make_copy(
    node: fx.Node,
    verdict: str,
    proof: str,
    *,
    call: str,
    name: str,
    before: Layout,
    after: Layout,
    target: Target | None,
) -> Copy:
    """The row of the copy at ``node``.

    Args:
        node: the call, for its origin.
        verdict, proof, call: as in :class:`Copy`.
        name: of the call.
        before, after: what is copied, and the copy.
        target: the device whose bandwidth prices it; ``None``: the tensor's own.
    """
    nbytes: int | None = 0
    if verdict != NO_OP:
        nbytes = 2 * after.nbytes if isinstance(after.nbytes, int) else None
    rate = bandwidth_of(target or target_of(after.device))
    origin = origin_of(node)
    return Copy(
        verdict=verdict,
        call=call,
        proof=proof,
        node=name,
        dtype=str(before.dtype).removeprefix("torch."),
        shape=plain(before.shape),
        device=str(before.device),
        before=Place.of(before),
        after=Place.of(after),
        nbytes=nbytes,
        microseconds=None if nbytes is None else rate.microseconds(nbytes),
        module=origin.module,
        file=origin.file,
        lineno=origin.lineno,
        code=origin.code,
    )
