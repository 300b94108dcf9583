"""K of a scaled product, symbolic on one side and known on the other."""

from __future__ import annotations

import pytest
import torch

import contig_pass
from contig_pass import analysis

OPTIONS = {"inner": "aot_eager", "target": "sm90", "policy": "strict"}


def product(a: torch.Tensor, b: torch.Tensor, one: torch.Tensor) -> torch.Tensor:
    return torch._scaled_mm(a, b, one, one, out_dtype=torch.bfloat16)


def operands() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    a = torch.ones(32, 64).to(torch.float8_e4m3fn)
    b = torch.ones(48, 64).to(torch.float8_e4m3fn).t()
    return a, b, torch.ones(())


@pytest.mark.parametrize(("operand", "dims"), [(0, (0, 1)), (1, (0,))])
def test_k_is_taken_from_the_side_that_knows_it(operand: int, dims: tuple[int, ...]) -> None:
    torch._dynamo.reset()
    contig_pass.forget_reports()
    given = operands()
    for dim in dims:
        torch._dynamo.mark_dynamic(given[operand], dim)  # refuses to be specialised
    out = torch.compile(product, backend="contig_safe", options=OPTIONS)(*given)
    assert torch.equal(out, torch.full((32, 48), 64.0, dtype=torch.bfloat16))
    (report,) = contig_pass.last_reports()
    assert report.rows == ()
    assert report.totals.uses == report.totals.clean == 4


def test_without_that_the_use_cannot_be_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(analysis, "with_common_k", lambda op, layouts: layouts)
    given = operands()
    torch._dynamo.mark_dynamic(given[0], 1)
    with pytest.raises(Exception, match=r"self at .*: .*multiple of 16"):
        torch.compile(product, backend="contig_safe", options=OPTIONS)(*given)


def test_a_pitch_that_k_is_part_of_is_known_too() -> None:
    def padded(a: torch.Tensor, b: torch.Tensor, one: torch.Tensor) -> torch.Tensor:
        wide = torch.nn.functional.pad(a.view(torch.uint8), (0, 16)).view(a.dtype)
        return product(wide[:, : a.shape[1]], b, one)

    torch._dynamo.reset()
    contig_pass.forget_reports()
    given = operands()
    torch._dynamo.mark_dynamic(given[0], 1)
    options = {**OPTIONS, "policy": "contract"}
    torch.compile(padded, backend="contig_safe", options=options)(*given)
    (report,) = contig_pass.last_reports()
    assert report.fixes == ()
    (row,) = report.skips
    assert (row.operand, row.before.strides) == ("self", (80, 1))
    assert "no copy needed" in row.reason
