"""Models whose parameters the test kernels read, and what ``prepare`` must leave as it is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import contig_pass
from contig_pass import prepare
from tests import kernels


@pytest.fixture(autouse=True)
def kernel_contracts() -> Iterator[None]:
    with kernels.contracts():
        kernels.received.clear()
        yield


def shifted(*shape: int, by: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A dense tensor whose first element lies ``by`` elements beyond an aligned address."""
    count = torch.Size(shape).numel()
    return torch.arange(float(count + by)).to(dtype)[by:].view(shape)


def frozen(tensor: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad=False)


class Reads(torch.nn.Module):
    """``read(module, x)`` on the tensors that it is given, as parameters."""

    def __init__(self, read: object, **tensors: torch.Tensor) -> None:
        super().__init__()
        self.read = read
        for name, tensor in tensors.items():
            self.register_parameter(
                name, tensor if isinstance(tensor, torch.nn.Parameter) else frozen(tensor)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.read(self, x)


X = torch.ones(())


def run_prepared(model: torch.nn.Module, *args: torch.Tensor) -> contig_pass.Report:
    """Compile and run the prepared model: no fix, legal memory, and the parameters' own."""
    expected = model(*args)
    kernels.received.clear()
    out = torch.compile(model, backend="contig_safe", fullgraph=True)(*args)
    assert torch.equal(out, expected)
    assert kernels.bad() == []
    report = contig_pass.last_reports()[-1]
    assert report.fixes == ()
    return report


def addresses() -> list[int]:
    return [seen.address for seen in kernels.received]


def prepared(model: torch.nn.Module, *args: torch.Tensor, **kwargs: object) -> contig_pass.Report:
    """``prepare``; names, values, identities and flags stay, a second time finds nothing."""
    before = {name: (value, value.clone()) for name, value in model.state_dict(
        keep_vars=True).items()}
    flags = {name: (type(p), p.requires_grad, p.dtype) for name, p in model.named_parameters()}
    report = prepare(model, *args, **kwargs)
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    for name, (tensor, value) in before.items():
        assert after[name] is tensor
        assert torch.equal(tensor, value)
        assert tensor.shape == value.shape
    assert flags == {
        name: (type(p), p.requires_grad, p.dtype) for name, p in model.named_parameters()
    }
    again = prepare(model, *args, **kwargs)
    assert again.fixes == ()
    assert len(again.skips) == len(report.skips)
    return report
