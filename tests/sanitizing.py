"""Ops for tests of the sanitizer, honest and dishonest ones, and layouts to give them."""

from __future__ import annotations

from pathlib import Path

import torch

from contig_pass.sanitizer import Finding, Sanitizer

_LIBRARY = torch.library.Library("sanitizer_tests", "DEF")


def define(schema: str, kernel: object, fake: object = None) -> None:
    """Make an op of namespace ``sanitizer_tests``, with a fake implementation if one is given."""
    name = schema.split("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    if fake is not None:
        torch.library.register_fake(f"sanitizer_tests::{name}", fake, lib=_LIBRARY)


def _sneaky(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    y.add_(1)
    return x + y


def _shifted(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.numel() + 1)[1:].view(x.shape).copy_(x)


def _turned(x: torch.Tensor) -> torch.Tensor:
    return x.t().contiguous().t()


def _swap(x: torch.Tensor, y: torch.Tensor) -> None:
    held = x.clone()
    x.copy_(y)
    y.copy_(held)


def _double(x: torch.Tensor) -> torch.Tensor:
    return x.mul_(2)


define("sneaky(Tensor x, Tensor y) -> Tensor", _sneaky, lambda x, y: torch.empty_like(x))
define("turned(Tensor x) -> Tensor", _turned, lambda x: torch.empty_like(x))
define("shifted(Tensor x) -> Tensor", _shifted, lambda x: torch.empty_like(x))
define("narrowed(Tensor x) -> Tensor", lambda x: x.half(), lambda x: torch.empty_like(x))
define("fewer(Tensor x) -> Tensor[]", lambda x: [x + 1], lambda x: [x.new_empty(1)] * 2)
define("faithful(Tensor x) -> Tensor", lambda x: x * 2, lambda x: torch.empty_like(x))
define("fakeless(Tensor x) -> Tensor", lambda x: x * 2)
define("swap(Tensor(a!) x, Tensor(b!) y) -> ()", _swap, lambda x, y: None)
define("double(Tensor(a!) x) -> Tensor(a!)", _double, lambda x: x)
define("whole(Tensor(a) x) -> Tensor(a)", lambda x: x.view(x.shape), lambda x: x.view(x.shape))

ops = torch.ops.sanitizer_tests


def line_of(file: str, text: str) -> int:
    """Number of the only line of ``file`` that ends in the comment ``text``."""
    lines = Path(file).read_text().splitlines()
    (number,) = (i for i, line in enumerate(lines, 1) if line.rstrip().endswith(f"# {text}"))
    return number


def only(sanitizer: Sanitizer) -> Finding:
    """The one thing that was found."""
    (finding,) = sanitizer.findings
    return finding


def off(*shape: int, by: int = 1) -> torch.Tensor:
    """A dense fp32 view that starts ``by`` elements into fresh memory."""
    return torch.randn(torch.Size(shape).numel() + by)[by:].view(shape)


def strided(*shape: int) -> torch.Tensor:
    """Every second element along the last dimension of fresh memory."""
    return torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]
