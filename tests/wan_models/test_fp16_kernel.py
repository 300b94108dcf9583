"""The 16-bit kernel for Hopper, compiled without a GPU: what its speed rests on."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.wan_models.triton_kernels import gluon_compiled, needs_triton


@needs_triton
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [64, 128])
def test_it_fits_and_no_product_waits_for_another(size: int, masked: bool, tmp_path: Path) -> None:
    """Scores are fp16 sums, nothing is spilled, and the assembler does not serialise products."""
    from triton import knobs
    from triton.experimental.gluon.language import NVMMASharedLayout

    from wan_models.attention import fp16_hopper as hopper

    def tiles(rows: int) -> str:
        layout = NVMMASharedLayout(min(2 * size, 128), 16, 4)
        return f"tensordesc<fp16[1, {rows}, 1, {size}],{layout!r}>"

    block = hopper.BLOCK
    constants = {
        "MASKED": masked, "D": size, "N": block, "STAGES": hopper.STAGES,
        "REGISTERS": hopper.REGISTERS,
    }
    types = {"q": tiles(64), "k": tiles(block), "v": tiles(block), "lengths": "*i64",
             "out": "*bf16"}
    unaligned = ("q", "k", "v", "queries", "keys", "heads", "lengths_s")
    kernel = gluon_compiled(hopper.attention, types, constants, unaligned)
    text = kernel.asm["ptx"]
    assert f"wgmma.mma_async.sync.aligned.m64n{block}k16.f16.f16.f16" in text
    assert f"wgmma.mma_async.sync.aligned.m64n{size}k16.f32.f16.f16" in text
    assert "cp.async.bulk.tensor.4d" in text
    assert kernel.metadata.shared <= 227 * 1024
    source = tmp_path / "kernel.ptx"
    source.write_text(text)
    said = subprocess.run(
        [knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", source, "-o", tmp_path / "kernel"],
        capture_output=True, text=True, check=True,
    ).stderr
    assert "serialized" not in said
    assert "0 bytes spill stores" in said
