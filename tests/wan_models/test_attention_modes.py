"""The dispatcher: every mode's values, padding, layouts, ops, contracts, rules and refusals."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from torch.library import opcheck

import contig_pass
from tests.wan_models import attention_cases as cases
from tests.wan_models.attention_cases import exact, operands, pretend_for, relative_error
from wan_models.attention import flash, fp8, sage, sdpa
from wan_models.attention.kernels import attention, check_mode
from wan_models.attention.varlen import pack

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BF16 = torch.bfloat16
PACKAGE_MODES = tuple(cases.CAPABILITIES)
SDPA_ON_CPU = ("sdpa", "sdpa_flash", "sdpa_math")
OPS = torch.ops.wan_models


@pytest.fixture
def gpu_packages(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    cases.install_all(monkeypatch)
    return monkeypatch


@pytest.mark.parametrize("lengths", [None, (9, 4), (1, 9), (5, 5)])
@pytest.mark.parametrize("mode", [*SDPA_ON_CPU, *PACKAGE_MODES])
def test_values_and_padding(gpu_packages, mode, lengths):
    pretend_for(gpu_packages, mode)
    dtype, bound = (BF16, 4e-3) if mode in PACKAGE_MODES else (torch.float32, 1e-6)
    if mode == "flash_attn_3_fp8":
        bound = 0.05  # rounding of q, k and v; the stand-in's weights are exact
    q, k, v = operands(dtype=dtype)
    k_lens = None if lengths is None else torch.tensor(lengths)
    expected = exact(q, k, v, k_lens)
    if lengths is not None:  # padding that would be seen if it counted
        for b, length in enumerate(lengths):
            k[b, length:], v[b, length:] = 30.0, 1e4
    out = attention(q, k, v, mode=mode, k_lens=k_lens)
    assert out.dtype == dtype
    assert relative_error(out, expected) < bound


@pytest.mark.parametrize(
    "name", ["flash_attn_2", "flash_attn_3", "flash_attn_4", "sageattn", "sageattn_3"]
)
def test_ops_are_exact_in_fp32(gpu_packages, name):
    """The stand-ins compute in float64, so only the op's own work could err."""
    q, k, v = operands()
    lens = torch.tensor([9, 4])
    assert relative_error(getattr(OPS, name)(q, k, v), exact(q, k, v)) < 1e-6
    if name.startswith("flash_attn"):
        packed = getattr(OPS, f"{name}_varlen")(*pack(q, k, v, lens)).unflatten(0, (2, 7))
        assert relative_error(packed, exact(q, k, v, lens)) < 1e-6
    else:
        masked = getattr(OPS, f"{name}_masked")(q, k, v, lens)
        assert relative_error(masked, exact(q, k, v, lens)) < 1e-6


@pytest.mark.parametrize("layout", cases.LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mode", [*SDPA_ON_CPU, *PACKAGE_MODES, "fp8", "fp16"])
def test_layouts_give_the_values_of_dense_operands(gpu_packages, mode, masked, layout):
    pretend_for(gpu_packages, mode)
    dense = operands(dtype=BF16)
    views = [layout(x) for x in dense]
    assert all(torch.equal(a, b) for a, b in zip(dense, views, strict=True))
    assert all(x.stride() != dense[i].stride() or x.storage_offset() for i, x in enumerate(views))
    lens = torch.tensor([9, 4]) if masked else None
    torch.testing.assert_close(
        attention(*views, mode=mode, k_lens=lens), attention(*dense, mode=mode, k_lens=lens),
        rtol=0, atol=0 if mode in (*PACKAGE_MODES, "fp8", "fp16") else 2**-8,
    )


def every_call(layout=lambda x: x) -> dict[str, tuple]:
    q, k, v = (layout(x) for x in operands(batch=2, dtype=BF16))
    lens = torch.tensor([9, 4])
    packed = pack(q, k, v, lens)
    narrow = [x.to(cases.E4M3) for x in (q, k, v)]
    return {
        "flash_attn_2": (q, k, v), "flash_attn_2_varlen": packed,
        "flash_attn_3": (q, k, v), "flash_attn_3_varlen": packed,
        "flash_attn_4": (q, k, v), "flash_attn_4_varlen": packed,
        "flash_attn_3_fp8": (*narrow, *[torch.rand(2, 2)] * 3),
        "flash_attn_3_fp8_varlen": (*pack(*narrow, lens), *[torch.rand(4, 2)] * 3),
        "sageattn": (q, k, v), "sageattn_masked": (q, k, v, lens),
        "sageattn_3": (q, k, v), "sageattn_3_masked": (q, k, v, lens),
        "fp8_attention": (q, k, v, lens),
        "fp16_attention": (*(x.half() for x in (q, k, v)), lens, BF16),
    }


@pytest.mark.parametrize("layout", [None, cases.head_major, cases.padded_slice],
                         ids=["dense", "head_major", "padded_slice"])
@pytest.mark.parametrize("name", list(every_call()))
def test_opcheck(gpu_packages, name, layout):
    """Schemas tell the truth of mutation and aliasing, fakes of strides."""
    arguments = every_call(layout or (lambda x: x))[name]
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    if layout is None:
        tests += ("test_aot_dispatch_static",)
    if name.startswith("flash_attn_3_fp8"):
        tests = tests[1:]  # its comparison is not implemented for e4m3 on the CPU
        before = [x.clone() if torch.is_tensor(x) else x for x in arguments]
    opcheck(getattr(OPS, name).default, tuple(arguments), test_utils=tests)
    if name.startswith("flash_attn_3_fp8"):
        for was, is_now in zip(before, arguments, strict=True):
            assert not torch.is_tensor(was) or torch.equal(was.float(), is_now.float())


def test_flash_3_of_either_version(monkeypatch):
    q, k, v = operands()
    for returns_tuple in (False, True):
        cases.install(monkeypatch, cases.flash_attn_interface(returns_tuple=returns_tuple))
        assert relative_error(OPS.flash_attn_3(q, k, v), exact(q, k, v)) < 1e-6


def test_masks_of_the_flash_backend_go_by_bounds(monkeypatch):
    """torch's flash kernel takes no mask on CUDA; its variable-length form is given the padding."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", cases.packed_attention)
    q, k, v = operands()
    lens = torch.tensor([9, 4])
    packed = pack(q, k, v, lens)
    out = OPS.sdpa_flash_varlen(*packed).unflatten(0, (2, 7))
    assert relative_error(out, exact(q, k, v, lens)) < 1e-6
    opcheck(OPS.sdpa_flash_varlen.default, tuple(packed),
            test_utils=("test_schema", "test_faketensor"))
    check_mode("sdpa_flash", CUDA, masked=True, dtype=BF16)


def test_sage_3_leaves_kept_keys_alone(gpu_packages):
    """Keys of an earlier step are used again, so the kernel's centring must not reach them."""
    q, k, v = operands()
    before = k.clone()
    kernel = sys.modules["sageattn3"].sageattn3_blackwell
    own = k.transpose(1, 2).clone()
    kernel(q.transpose(1, 2), own, v.transpose(1, 2), per_block_mean=False)
    assert not torch.equal(own.transpose(1, 2), before)  # the stand-in does write
    first = OPS.sageattn_3(q, k, v)
    assert torch.equal(k, before)
    assert torch.equal(OPS.sageattn_3(q, k, v), first)
    OPS.sageattn_3_masked(q, k, v, torch.tensor([9, 3]))
    assert torch.equal(k, before)


@pytest.mark.parametrize("name", ["sageattn", "sageattn_3"])
def test_sage_calls_the_kernel_once_for_samples_of_one_length(gpu_packages, name):
    package, entry = {
        "sageattn": ("sageattention", "sageattn"),
        "sageattn_3": ("sageattn3", "sageattn3_blackwell"),
    }[name]
    module = sys.modules[package]
    kernel, seen = getattr(module, entry), []

    def counted(q, k, v, **options):
        seen.append(tuple(k.shape))
        return kernel(q, k, v, **options)

    gpu_packages.setattr(module, entry, counted)
    q, k, v = operands(batch=4)
    for lengths, calls in (((6, 6, 6, 6), 1), ((6, 6, 3, 3), 2), ((6, 0, 3, 9), 3)):
        seen.clear()
        out = getattr(OPS, f"{name}_masked")(q, k, v, torch.tensor(lengths))
        assert len(seen) == calls
        for b, length in enumerate(lengths):
            part = slice(b, b + 1)
            if length == 0:
                assert torch.equal(out[part], torch.zeros_like(out[part]))
            else:
                expected = exact(q[part], k[part, :length], v[part, :length])
                assert relative_error(out[part], expected) < 1e-6


def test_host_reads_are_marked():
    for op in (OPS.sageattn_masked, OPS.sageattn_3_masked):
        assert torch.Tag.cudagraph_unsafe in op.default.tags
    for op in (OPS.sageattn, OPS.flash_attn_3_varlen, OPS.fp8_attention, OPS.fp16_attention):
        assert torch.Tag.cudagraph_unsafe not in op.default.tags


def test_packed_sequences():
    q, k, v = operands(batch=3, queries=5, keys=8)
    packed = pack(q, k, v, torch.tensor([8, 0, 11]))
    assert packed.q_bounds.tolist() == [0, 5, 5, 10, 10, 15, 15]
    assert packed.k_bounds.tolist() == [0, 8, 8, 8, 16, 24, 24]
    assert (packed.q_longest, packed.k_longest) == (5, 8)
    assert packed.k.data_ptr() == k.data_ptr()  # nothing is gathered


@pytest.mark.parametrize("mode", [*PACKAGE_MODES, "fp8", "fp16"])
@pytest.mark.parametrize("layout", [cases.misaligned, cases.strided], ids=lambda f: f.__name__)
@pytest.mark.parametrize("masked", [False, True])
def test_contig_safe_supplies_the_layout(gpu_packages, mode, layout, masked):
    """Operands that the kernels refuse eagerly arrive right in one compiled graph."""
    pretend_for(gpu_packages, mode)
    dense = operands(dtype=BF16)
    lens = torch.tensor([9, 4]) if masked else None
    broken = [layout(x) for x in dense]

    def function(q, k, v):
        # Inside the graph, so that the backend and not the caller has to repair them.
        q, k, v = (layout(x) for x in (q, k, v))
        return attention(q, k, v, mode=mode, k_lens=lens)

    # SageAttention 3 copies what is not dense, and k always; packing copies what does not merge.
    # What is cast, to 8 bits or to fp16, is fresh, but in the order of its source.
    copies = mode.startswith("sageattn_3") or (
        mode in ("flash_attn_3_fp8", "fp16") and layout is cases.misaligned
    ) or (mode.startswith("flash") and masked and layout is cases.strided)
    if not (copies or (mode == "fp8" and layout is cases.misaligned)):
        with pytest.raises((RuntimeError, ValueError), match=r"misaligned|contiguous|unit-stride"):
            attention(*broken, mode=mode, k_lens=lens)
    expected = attention(*dense, mode=mode, k_lens=lens)
    compiled = torch.compile(
        function, backend="contig_safe", fullgraph=True, options={"inner": "aot_eager"}
    )
    assert torch.equal(compiled(*dense), expected)
    fixes = contig_pass.last_reports()[-1].totals.fixes
    wanted = 0 if copies else 3
    if mode.startswith("sageattn_3") and layout is cases.misaligned:
        wanted = 2  # a q or v that is dense it reads as it lies
    assert fixes == wanted


def test_lengths_are_no_constants(gpu_packages):
    counted = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    q, k, v = operands(dtype=BF16)
    for mode in ("sdpa", "flash_attn_2", "sageattn", "fp8", "fp16"):
        torch._dynamo.reset()
        counted.clear()
        pretend_for(gpu_packages, mode)
        compiled = torch.compile(
            lambda q, k, v, lens, mode=mode: attention(q, k, v, mode=mode, k_lens=lens),
            backend=counted, fullgraph=True,
        )
        for lengths in ((9, 4), (2, 7)):
            lens = torch.tensor(lengths)
            assert torch.equal(
                compiled(q, k, v, lens), attention(q, k, v, mode=mode, k_lens=lens)
            )
        assert counted.frame_count == 1


def test_one_graph_for_several_sizes(gpu_packages):
    counted = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    for mode in ("sdpa", "flash_attn_2", "sageattn_3", "fp8", "fp16"):
        torch._dynamo.reset()
        counted.clear()
        cases.pretend(gpu_packages, cases.CAPABILITIES.get(mode))
        compiled = torch.compile(
            lambda q, k, v, lens, mode=mode: attention(q, k, v, mode=mode, k_lens=lens),
            backend=counted, fullgraph=True, dynamic=True,
        )
        for keys in (9, 12):
            q, k, v = operands(queries=keys - 2, keys=keys, dtype=BF16)
            lens = torch.tensor([keys, 4])
            torch.testing.assert_close(
                compiled(q, k, v, lens), attention(q, k, v, mode=mode, k_lens=lens)
            )
        assert counted.frame_count == 1


@pytest.mark.parametrize(
    ("sm", "dtype", "size", "masked", "other", "backend"),
    [
        (None, BF16, 128, True, {}, "torch"),
        ((9, 0), BF16, 128, False, {}, "cudnn"),
        ((9, 0), BF16, 128, True, {}, "cudnn"),
        ((9, 0), BF16, 128, False, {"cudnn": False}, "flash"),
        ((9, 0), BF16, 128, True, {"cudnn": False}, "efficient"),
        ((9, 0), BF16, 128, False, {"several_tokens": False}, "flash"),
        ((9, 0), BF16, 256, False, {}, "flash"),
        ((9, 0), BF16, 128, False, {"unit_stride": False}, "math"),
        ((9, 0), torch.float32, 128, False, {}, "efficient"),
        ((9, 0), torch.float32, 6, False, {}, "math"),
        ((9, 0), torch.float64, 128, False, {}, "math"),
        ((9, 0), BF16, 100, False, {}, "math"),
        ((10, 0), torch.float16, 64, True, {}, "cudnn"),
        ((8, 9), BF16, 128, False, {}, "flash"),
        ((8, 9), BF16, 128, True, {}, "efficient"),
        ((12, 0), BF16, 128, False, {}, "flash"),
        ((7, 5), torch.float16, 64, False, {}, "efficient"),
        ((7, 5), BF16, 64, False, {}, "math"),
    ],
)
def test_sdpa_chooses_by_rule(sm, dtype, size, masked, other, backend):
    choice = sdpa.choose(sm, dtype, size, masked=masked, **other)
    assert choice.backend == backend
    assert choice.reason


def test_sdpa_uses_what_it_chose(monkeypatch):
    """On a pretended GPU without fused kernels the head-major result of math comes back."""
    cases.pretend(monkeypatch, (9, 0))
    q = torch.randn(1, 6, 2, 7)
    assert attention(q, q, q, mode="sdpa").stride() == (84, 7, 42, 1)
    cases.pretend(monkeypatch, None)
    assert attention(q, q, q, mode="sdpa").stride() == (84, 14, 7, 1)


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("keys", [16, 13, 1])
def test_additive_mask(dtype, keys):
    lens = torch.tensor([keys, 1])
    mask = sdpa.additive_mask(lens, keys, dtype)
    assert mask.shape == (2, 1, 1, keys)
    assert mask.stride(0) * dtype.itemsize % 16 == 0
    assert mask.stride(-1) == 1
    for b in range(2):
        expected = [0.0 if s < lens[b] else -torch.inf for s in range(keys)]
        assert mask[b, 0, 0].tolist() == expected


def test_contracts_are_registered_once_however_often_modules_load(gpu_packages):
    for module in (flash, sage, sdpa, fp8):
        importlib.reload(module)

    def function(*operands: torch.Tensor) -> torch.Tensor:
        return OPS.flash_attn_3(*map(cases.misaligned, operands))

    report = contig_pass.explain(function, *operands(dtype=BF16))
    assert report.totals.fixes == 3
    assert all("hopper/flash_attn_interface.py" in row.source for row in report.rows)
