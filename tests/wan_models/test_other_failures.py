"""Failures beside layouts: writes nobody declared, sizes on the GPU, padding, weights in flight.

The numbers go on from ``test_layout_failures.py``. The layout pass has no part in these: each is
shown broken in the form that users met, then the property of the Wan classes that rules it out,
eagerly and under contig_safe.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import contig_pass
from tests.wan_models import attention_cases as cases
from tests.wan_models import scenario_checks as checks
from tests.wan_models import scenarios
from tests.wan_models import simulated_streams as simulated
from tests.wan_models.failures import SELF, quantised, safe
from tests.wan_models.scenarios import BF16, DIM, GRID, HEADS, ROPE, TEXT, TOKENS, bf16
from wan_models import TINY, WanBlock, WanModel, addons, block_inputs, model_inputs
from wan_models.attention import (
    WanCrossAttention,
    WanHuMoCrossAttention,
    WanSelfAttention,
    packages,
    sage,
)
from wan_models.attention.radial import RadialPattern
from wan_models.block_swap import BlockSwap, copier
from wan_models.quant import fp8
from wan_models.recorder import recording
from wan_models.rope import rope_table
from wan_models.vace import VaceBlock


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


def eager_inside(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Under contig_safe in one graph, which runs op by op."""
    return safe(function, inner="aot_eager", **options)


# -- 5: ``out=`` with a tensor that is not contiguous ---------------------------------------------


def clamping(clamp: Callable[[torch.Tensor], object]) -> Callable[..., torch.Tensor]:
    """The FP8 product of the public wrapper, which clamps the caller's tensor."""

    def product(x, weight, weight_scale, input_scale, bias, *, input_scaled=False):
        clamp(x)
        out = torch._scaled_mm(
            x.reshape(-1, x.shape[-1]).to(weight.dtype), weight.t(), scale_a=input_scale,
            scale_b=weight_scale, bias=bias, out_dtype=x.dtype,
        )
        return out.reshape(*x.shape[:-1], len(weight))

    return product


def clamp_out(x: torch.Tensor) -> None:
    torch.clamp(x, -448, 448, out=x)


def padded_text(batch: int) -> torch.Tensor:
    """(B, Lt, C) as a slice of a longer buffer, with values beyond the range of e4m3."""
    return (500 * bf16(batch, TEXT + 3, DIM, seed=2))[:, :TEXT]


def test_5_out_of_a_strided_tensor_breaks_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    attn, x = quantised(WanCrossAttention(DIM, HEADS)), bf16(2, TOKENS, DIM, seed=1)
    context = padded_text(2)
    assert not context.is_contiguous()
    with recording():
        expected = attn(x, context)
    with monkeypatch.context() as patch:
        patch.setattr(fp8, "fp8_linear", clamping(clamp_out))
        said = "non-contiguous `out=` tensor"
        for backend in ("inductor", "contig_safe"):  # Dynamo's, before any backend is asked
            with pytest.raises(torch._dynamo.exc.Unsupported, match=said):
                torch.compile(attn, backend=backend, fullgraph=True)(x, padded_text(2))
    torch._dynamo.reset()
    with recording() as received:
        assert torch.equal(eager_inside(attn)(x, context), expected)
        assert checks.objections(received) == []
    assert torch.equal(context, padded_text(2))


# -- 6: writes that nobody declared ---------------------------------------------------------------


def clamp_in_place(x: torch.Tensor) -> None:
    x.clamp_(-448, 448)


def test_6_a_clamp_in_place_reaches_who_reads_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of a VACE block is projected to a hint, and goes on to the next block."""
    block = quantised(VaceBlock(TINY))
    x, e0, context, rope = block_inputs(TINY, GRID, batch=2, dtype=BF16)
    inputs = (x, e0, context[:, :TEXT], rope)
    with recording() as received:
        hint, control = block(1000 * x, *inputs)
        assert control.abs().max() > 2000
        with monkeypatch.context() as patch:
            patch.setattr(fp8, "fp8_linear", clamping(clamp_in_place))
            same_hint, clamped = block(1000 * x, *inputs)
        assert torch.equal(same_hint, hint)
        assert clamped.abs().max() == 448  # what the next block gets, and no error
        received.clear()
        out = eager_inside(block)(1000 * x, *inputs)
        assert checks.objections(received) == []
    assert torch.equal(out[0], hint)
    assert torch.equal(out[1], control)


def test_6_a_clamp_in_place_refuses_an_expanded_text(monkeypatch: pytest.MonkeyPatch) -> None:
    attn, x = quantised(WanCrossAttention(DIM, HEADS)), bf16(2, TOKENS, DIM, seed=1)
    context = padded_text(1).expand(2, -1, -1)
    with monkeypatch.context() as patch:
        patch.setattr(fp8, "fp8_linear", clamping(clamp_in_place))
        with recording(), pytest.raises(RuntimeError, match="refers to a single memory location"):
            attn(x, context)
    context = padded_text(1).expand(2, -1, -1)
    with recording() as received:
        expected = attn(x, torch.cat([padded_text(1)] * 2))
        assert torch.equal(attn(x, context), expected)
        assert torch.equal(eager_inside(attn)(x, context), expected)
        assert checks.objections(received) == []
    assert torch.equal(context[0], padded_text(1)[0])


def uncopied(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """SageAttention 3 on the caller's own keys, which its kernel centres in place."""
    kernel = packages.function("sageattn_3", "sageattn3_blackwell")
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return kernel(*heads_first, per_block_mean=False).transpose(1, 2)


class StandIn(WanSelfAttention):
    """``forward_ip`` to the letter of its formula: the reference attends to the keys it keeps."""

    def forward_ip(self, x, rope, ip=None, ip_rope=None, cache=None):
        q, k, v = self.project(x, rope)
        k_ip, v_ip = cache or self.project(ip, ip_rope)[1:]
        out = self.attend(q, torch.cat([k, k_ip], dim=1), torch.cat([v, v_ip], dim=1))
        if cache is None:
            alone = self.attend(self.project(ip, ip_rope)[0], k_ip, v_ip)
            out = torch.cat([out, alone], dim=1)
        return self.o(out.flatten(2)), (k_ip, v_ip)


def test_6_keys_that_a_kernel_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Either the op's copy or the class's joined keys would do; each is shown alone."""
    cases.install(monkeypatch, cases.sageattn3())
    cases.pretend_for(monkeypatch, "sageattn_3")
    x, ip, later = (bf16(2, n, DIM, seed=n) for n in (TOKENS, 4, TOKENS + 1))
    later = later[:, :TOKENS]
    made = {
        kind: quantised(kind(DIM, HEADS, mode="sageattn_3")) for kind in (StandIn, WanSelfAttention)
    }

    def second_step(run: Callable[..., Any]) -> torch.Tensor:
        _, cache = run(x, ROPE, ip=ip)
        return run(later, ROPE, cache=cache)[0]

    with recording():
        exact = quantised(WanSelfAttention(DIM, HEADS, mode="sdpa_math"))
        right = exact.forward_ip(later, ROPE, ip=ip)[0][:, :TOKENS].double()
        with monkeypatch.context() as patch:
            patch.setattr(sage, "_sage_3", uncopied)
            naive = made[StandIn].forward_ip
            assert checks.error(second_step(naive), right) > 0.05
            assert checks.error(second_step(made[WanSelfAttention].forward_ip), right) < 0.01
            q = bf16(1, 3, HEADS, 64, seed=1)
            with pytest.raises(Exception, match="mutat"):
                torch.library.opcheck(sage.sageattn_3, (q, q + 1, q), test_utils="test_schema")
        for attn in made.values():
            assert checks.error(second_step(attn.forward_ip), right) < 0.01
        torch.library.opcheck(sage.sageattn_3, (q, q + 1, q), test_utils="test_schema")
    for attn in made.values():
        torch._dynamo.reset()
        with recording() as received:
            out = second_step(eager_inside(attn.forward_ip))
            assert checks.objections(received) == []
        assert checks.error(out, right) < 0.01


# -- 8: padding that a kernel asks for ------------------------------------------------------------

#: Tokens that a kernel takes at a time.
TILE = 128


@torch.library.custom_op("other_failures::tiled", mutates_args=())
def tiled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention by a kernel that reads keys in whole tiles."""
    if k.shape[1] % TILE:
        raise RuntimeError(f"the number of keys must be a multiple of {TILE}")
    return cases.exact(q, k, v).to(q.dtype)


@tiled.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return q.new_empty(q.shape)


class Tiled(WanSelfAttention):
    """Self-attention by that op."""

    def attend(self, q, k, v, k_lens=None):
        return tiled(q, k, v)


def test_8_a_tile_of_keys_is_no_matter_of_copies() -> None:
    attn, inputs = quantised(Tiled(DIM, HEADS)), SELF.inputs(1)
    contig_pass.register_contract("other_failures::tiled", "k", [contig_pass.Multiple(TILE, 1)])
    with recording(), pytest.raises(RuntimeError, match="must be a multiple of 128"):
        attn(*inputs)
    said = r"LayoutViolation: other_failures::tiled\.default operand k .* size of dim 1 a multiple "
    with recording(), pytest.raises(Exception, match=said):
        eager_inside(attn, policy="strict")(*inputs)


def test_8_padded_keys_that_are_not_masked_are_attended() -> None:
    attn, (x, rope) = quantised(Tiled(DIM, HEADS)), SELF.inputs(2)
    padded = torch.nn.functional.pad(x, (0, 0, 0, TILE - TOKENS))
    with recording():
        out = attn(padded, rope)[:, :TOKENS]  # runs, and no error
    right = SELF.expected(scenarios.exact(attn), scenarios.wide((x, rope)), ())[0]
    assert checks.error(out, right) > 0.5


MODES = {
    "sdpa": 0.01, "sdpa_flash": 0.01, "sdpa_math": 0.01, "flash_attn_2": 0.01,
    "flash_attn_3": 0.01, "sageattn": 0.01, "sageattn_3": 0.01, "fp8": 0.1,
    "fp16": 0.01,
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_8_padding_is_masked_in_every_mode(
    monkeypatch: pytest.MonkeyPatch, mode: str, batch: int
) -> None:
    cases.install_all(monkeypatch)
    cases.pretend_for(monkeypatch, mode)
    attn = quantised(WanSelfAttention(DIM, HEADS, mode=mode), "fp8_e4m3fn_scaled")
    x, rope = SELF.inputs(batch)
    right = SELF.expected(scenarios.exact(attn), scenarios.wide((x, rope)), ())[0]
    inputs = (torch.nn.functional.pad(x, (0, 0, 0, 5)), rope, torch.tensor([TOKENS] * batch))
    for run in (attn, eager_inside(attn)):
        assert checks.error(run(*inputs)[:, :TOKENS], right) < MODES[mode]


@pytest.mark.parametrize("mode", ["sageattn", "sageattn_3", "fp8", "fp16", "radial"])
def test_8_a_head_dimension_that_a_kernel_does_not_have_is_named(
    monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    cases.install_all(monkeypatch)
    cases.pretend_for(monkeypatch, mode)
    attn = WanSelfAttention(192, 2, mode=mode)
    with pytest.raises(ValueError, match="head dimension 64 or 128 needed, got 96") as caught:
        attn(torch.randn(1, TOKENS, 192), rope_table(GRID, 96))
    assert "\n" not in str(caught.value)


def test_8_frames_that_blocks_do_not_divide_are_named() -> None:
    with pytest.raises(ValueError, match=r"104 mod 16 = 8, 30\*52 = 1560 mod 128 = 24") as caught:
        RadialPattern((21, 30, 52))
    assert "\n" not in str(caught.value)


# -- 9: sizes that lie on the GPU -----------------------------------------------------------------


class HostReads(TorchDispatchMode):
    """Counts what on a GPU would make the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **kwargs or {})


def test_9_sizes_that_are_tensors() -> None:
    attn = quantised(WanHuMoCrossAttention(DIM, HEADS, audio_dim=64))
    x, audio = bf16(2, TOKENS, DIM, seed=1), bf16(2, GRID[0] * 16, 64, seed=4)
    sizes = tuple(torch.tensor(GRID))
    with recording() as received:
        with HostReads() as reads:
            expected = attn(x, audio, GRID)
        assert reads.count == 0
        with HostReads() as reads:
            assert torch.equal(attn(x, audio, sizes), expected)
        assert reads.count > 0  # right, but the host waits for the device
        with pytest.raises(torch._dynamo.exc.Unsupported, match="Data-dependent"):
            eager_inside(attn)(x, audio, sizes)
        torch._dynamo.reset()
        received.clear()
        assert torch.equal(eager_inside(attn)(x, audio, GRID), expected)
        assert checks.objections(received) == []


def test_9_a_step_of_a_whole_model_reads_nothing_from_the_device() -> None:
    model = scenarios.randomise(WanModel(TINY)).to(BF16)
    names = ("fantasytalking", "fantasyportrait", "multitalk", "humo", "mtvcrafter")
    for name in names:
        addons.attach(model, name)
    inputs = model_inputs(TINY, (2, 2, 3), dtype=BF16, addons=names, text_tokens=TEXT)
    with HostReads() as reads:
        out = model(*inputs)
    assert reads.count == 0
    assert out.isfinite().all()


# -- 10: weights that another stream fills --------------------------------------------------------


class Careless(copier.Copier):
    """Fills a buffer whoever still reads it."""

    def fill(self, buffer, host, slab):
        with torch.cuda.stream(self.stream):
            host.copy_to(slab)
            self.filled[buffer].record(self.stream)


class Hasty(copier.Copier):
    """Lets kernels run whether the copy is there or not."""

    def acquire(self, buffer):
        pass


def swapped_steps(
    patch: pytest.MonkeyPatch, kind: type[copier.Copier], first: str, compiled: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two steps of five blocks, four of them swapped, and the same without a swap."""
    device = simulated.Device(first)
    blocks = [scenarios.randomise(WanBlock(TINY), seed=seed).to(BF16) for seed in range(5)]
    x, *others = block_inputs(TINY, GRID, dtype=BF16)
    others[1] = others[1][:, :TEXT]
    expected = x
    for block in [*blocks, *blocks]:
        expected = block(expected, *others)
    if compiled:
        for block in blocks:
            block.compile(backend="contig_safe", fullgraph=True, options={"inner": "aot_eager"})
    launched = [simulated.Launched(block, device) for block in blocks]
    with patch.context() as patched:
        device.install(patched, kind)
        with BlockSwap(launched, 4, "cpu"):
            addresses = [p.data_ptr() for block in blocks for p in block.parameters()]
            out = [x]
            for block in [*launched, *launched]:
                out = block(out, *others)
            device.drain()
            # Nothing is freed or allocated while kernels are under way.
            assert [p.data_ptr() for block in blocks for p in block.parameters()] == addresses
    return out[0], expected


@pytest.mark.parametrize(
    ("kind", "first"), [(Careless, simulated.COPIES), (Hasty, simulated.KERNELS)]
)
def test_10_weights_in_flight_without_events(
    monkeypatch: pytest.MonkeyPatch, kind: type[copier.Copier], first: str
) -> None:
    out, expected = swapped_steps(monkeypatch, kind, first, compiled=False)
    assert not checks.error(out, expected.double()) < 0.1  # wrong, or no number at all


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("first", [simulated.COPIES, simulated.KERNELS])
def test_10_weights_in_flight(
    monkeypatch: pytest.MonkeyPatch, first: str, compiled: bool
) -> None:
    out, expected = swapped_steps(monkeypatch, copier.Copier, first, compiled)
    assert torch.equal(out, expected)
