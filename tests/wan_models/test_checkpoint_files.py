"""Reading files: addresses of the tensors, memory, shards."""

from __future__ import annotations

import json
import mmap
import resource
import struct

import pytest
import torch
from torch import nn

from tests.wan_models.checkpoint_files import (
    SMALL,
    LiveBytes,
    empty_model,
    same,
    small_model,
    state,
    state_bytes,
    write,
)
from wan_models import zoo
from wan_models.checkpoint import CheckpointError, load, reader, save
from wan_models.checkpoint import load as load_function
from wan_models.checkpoint.reader import open_checkpoint
from wan_models.quant import quantize_

# -- addresses ---------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [0, 1, 2, 3, 8, 15, 16])
def test_misaligned_tensors_are_repaired_and_counted(lead, tmp_path):
    made = small_model()
    tensors = state(made)
    file = write(tmp_path / "m.safetensors", tensors, lead=lead, header_modulo=0)
    loaded = empty_model()
    report = load(loaded, file, device="cpu")
    same(loaded, made)
    # Every tensor here is a multiple of 16 bytes, so all of them lie where the first one does.
    assert all(tensor.nbytes % 16 == 0 for tensor in tensors.values())
    assert set(report.repaired) == (set(tensors) if lead % 16 else set())
    assert all(tensor.data_ptr() % 16 == 0 for tensor in loaded.state_dict().values())


def test_only_the_misaligned_tensors_are_copied(tmp_path):
    made = small_model()
    tensors = state(made)
    first = dict(list(tensors.items())[:5])
    odd = {"odd.bytes": torch.zeros(9, dtype=torch.uint8)}
    later = {name: tensor for name, tensor in tensors.items() if name not in first}
    file = write(tmp_path / "m.safetensors", first | odd | later, header_modulo=0)
    with LiveBytes() as live:
        report = load(empty_model(), file, device="cpu", strict=False)
    assert report.extra == ("odd.bytes",)
    assert report.repaired
    assert set(report.repaired) == set(later)
    copied = sum(tensor.nbytes for tensor in later.values())
    assert live.now == copied
    assert live.peak == copied


def test_a_header_that_ends_at_a_multiple_of_8_misaligns_everything(tmp_path):
    made = small_model()
    file = write(tmp_path / "m.safetensors", state(made), header_modulo=8)
    report = load(empty_model(), file, device="cpu")
    assert len(report.repaired) == report.tensors
    same(report.model, made)


def test_misaligned_tensors_are_right_in_another_type(tmp_path):
    made = small_model()
    file = write(tmp_path / "m.safetensors", state(made), lead=1, header_modulo=0)
    report = load(empty_model(), file, device="cpu", dtype=torch.float32)
    assert report.repaired == ()  # a conversion makes new memory anyway
    for name, tensor in report.model.state_dict().items():
        assert torch.equal(tensor, made.state_dict()[name].float()), name


def test_quantised_tensors_at_odd_addresses(tmp_path):
    made = small_model()
    quantize_(made, "fp4_scaled", ["head.head"])
    file = write(tmp_path / "m.safetensors", state(made), lead=3, header_modulo=0)
    report = load(empty_model(), file, device="cpu", quantization="fp4_scaled")
    same(report.model, made)
    for name in ("weight", "weight_scale"):
        assert f"blocks.0.ffn.0.{name}" in report.repaired


def test_writing_to_a_loaded_model_leaves_the_file_alone(tmp_path):
    file = tmp_path / "m.safetensors"
    save(small_model(), file)
    content = file.read_bytes()
    loaded = load(empty_model(), file, device="cpu").model
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.fill_(7)
    assert file.read_bytes() == content
    assert all((parameter == 7).all() for parameter in loaded.parameters())


def test_tensors_do_not_share_a_storage(tmp_path):
    file = tmp_path / "m.safetensors"
    save(small_model(), file)
    loaded = load(empty_model(), file, device="cpu").model
    parameters = list(loaded.parameters())
    storages = {parameter.untyped_storage()._cdata for parameter in parameters}
    assert len(storages) == len(parameters)
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in parameters)
    assert all(p.requires_grad for p in parameters)  # as in the model that was given


def test_loading_within_inference_mode_makes_ordinary_tensors(tmp_path):
    file = tmp_path / "m.safetensors"
    save(small_model(), file)
    with torch.inference_mode():
        loaded = load_function(SMALL, file, device="cpu").model
    assert not any(parameter.is_inference() for parameter in loaded.parameters())


def test_reading_one_tensor(tmp_path):
    file = write(tmp_path / "m.safetensors", {"a": torch.arange(6.0).view(2, 3)}, lead=1)
    source = open_checkpoint(file)
    assert torch.equal(source.read(source.entries["a"]), torch.arange(6.0).view(2, 3))
    assert torch.equal(source.read(source.entries["a"].rows(1, 2)), torch.tensor([[3.0, 4, 5]]))


# -- memory ------------------------------------------------------------------------------------


def test_on_the_cpu_in_the_file_s_type_nothing_is_copied(tmp_path):
    file = tmp_path / "m.safetensors"
    save(small_model(), file)
    loaded = empty_model()
    with LiveBytes() as live:
        report = load(loaded, file, device="cpu")
    assert live.peak == 0
    assert report.nbytes == state_bytes(loaded)


def test_a_file_is_mapped_in_windows(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "WINDOW", 3 * mmap.ALLOCATIONGRANULARITY)
    made = small_model()
    file = write(tmp_path / "m.safetensors", state(made), lead=5)
    source = open_checkpoint(file)
    windows = reader._windows(source.entries.values())
    assert len(windows) > 3
    for window in windows:
        assert window.start % mmap.ALLOCATIONGRANULARITY == 0
        assert window.end <= file.stat().st_size
    assert sum(w.end - w.start <= 3 * mmap.ALLOCATIONGRANULARITY for w in windows) > 3
    same(load(empty_model(), file, device="cpu").model, made)


def test_a_file_of_full_size_takes_no_memory(tmp_path):
    with torch.device("meta"):
        made = zoo.build("t2v-14b")
    header, end = {}, 0
    for name, tensor in made.state_dict().items():
        size = tensor.numel() * 2
        header[name] = {
            "dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [end, end + size]
        }
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    file = tmp_path / "m.safetensors"
    with file.open("wb") as out:  # a hole: no disk either
        out.write(struct.pack("<Q", len(text)) + text)
        try:
            out.truncate(8 + len(text) + end)
        except OSError as error:
            pytest.skip(f"no files of {end} bytes here: {error}")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report = load(made, file, device="cpu")
    assert (report.tensors, report.nbytes, report.repaired) == (1095, end, ())
    assert end > 28e9
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB
    assert (made.blocks[39].ffn[2].weight[-1] == 0).all()


def test_a_conversion_holds_the_model_once(tmp_path):
    file = tmp_path / "m.safetensors"
    save(small_model(), file)
    loaded = empty_model()
    with LiveBytes() as live:
        load(loaded, file, device="cpu", dtype=torch.float32)
    assert live.now == live.peak == state_bytes(loaded)


@pytest.mark.parametrize("recipe", ["fp8_e4m3fn_scaled", "fp4_scaled"])
def test_quantising_holds_one_layer_in_full_precision(recipe, tmp_path):
    file = tmp_path / "m.safetensors"
    made = small_model()
    save(made, file)
    loaded = empty_model()
    quantize_(loaded, recipe)
    with LiveBytes() as live:
        load(loaded, file, device="cpu")
    largest = max(p.numel() for n, p in made.named_parameters())
    # fp32 copies of one weight beside what stays: for NVFP4 of values, scales and codes.
    assert live.peak < state_bytes(loaded) + 32 * largest
    full = 4 * sum(parameter.numel() for parameter in made.parameters())
    assert live.peak < 0.9 * full


def test_each_tensor_goes_where_a_function_says(tmp_path):
    file = tmp_path / "m.safetensors"
    made = small_model()
    quantize_(made, "fp8_e4m3fn_scaled")
    save(made, file, naming="diffusers")
    asked = set()

    def device(name: str) -> str:
        asked.add(name)
        return "cpu"

    load(empty_model(), file, device=device)
    assert asked == made.state_dict().keys()
    with pytest.raises(ValueError, match="device='meta' holds no values"):
        load(empty_model(), file, device="meta")
    with pytest.raises(ValueError, match=r"dtype=torch\.int8: use one of torch\.float64"):
        load(empty_model(), file, device="cpu", dtype=torch.int8)


# -- shards ------------------------------------------------------------------------------------


def shards(tmp_path, made: nn.Module, count: int = 3):
    tensors = list(state(made).items())
    where = {}
    for i in range(count):
        name = f"model-{i + 1:05}-of-{count:05}.safetensors"
        part = dict(tensors[i::count])
        write(tmp_path / name, part, header_modulo=16 * i)
        where |= dict.fromkeys(part, name)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": where}))
    return index, where


@pytest.mark.parametrize("folder", [False, True])
def test_several_files(folder, tmp_path):
    made = small_model()
    index, _ = shards(tmp_path, made)
    report = load(empty_model(), tmp_path if folder else index, device="cpu")
    same(report.model, made)


def test_shards_that_are_missing_or_hold_something_else(tmp_path):
    made = small_model()
    index, where = shards(tmp_path, made)
    first, lost, third = sorted(set(where.values()))
    (tmp_path / lost).unlink()
    moved = [name for name, file in where.items() if file == third][:2]
    where |= dict.fromkeys(moved, first)
    index.write_text(json.dumps({"weight_map": where}))
    target = empty_model()
    with pytest.raises(CheckpointError) as error:
        load(target, index, device="cpu")
    found = {(p.kind, p.name): p.detail for p in error.value.problems}
    assert len(found) == len(error.value.problems)
    expected = {name: f"no file {lost}" for name, file in where.items() if file == lost}
    expected |= dict.fromkeys(moved, f"the index has it in {first}")
    assert found == {("missing", name): detail for name, detail in expected.items()}
    assert all(tensor.is_meta for tensor in target.state_dict().values())


def test_a_tensor_in_two_shards(tmp_path):
    made = small_model()
    index, where = shards(tmp_path, made, 2)
    files = sorted(set(where.values()))
    tensors = state(made)
    again = next(name for name, file in where.items() if file == files[0])
    second = [name for name, file in where.items() if file == files[1]]
    write(tmp_path / files[1], {name: tensors[name] for name in [*second, again]})
    with pytest.raises(CheckpointError, match=rf"twice {again} \(in {files[0]} and {files[1]}\)"):
        load(empty_model(), index, device="cpu")


def test_a_folder_has_to_be_clear(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"does not exist: use a safetensors file, index"):
        load(empty_model(), tmp_path / "none.safetensors", device="cpu")
    with pytest.raises(FileNotFoundError, match="holds nothing: name the safetensors file"):
        load(empty_model(), tmp_path, device="cpu")
    save(small_model(), tmp_path / "a.safetensors")
    load(empty_model(), tmp_path, device="cpu")
    save(small_model(), tmp_path / "b.safetensors")
    with pytest.raises(FileNotFoundError, match=r"holds a\.safetensors, b\.safetensors: name"):
        load(empty_model(), tmp_path, device="cpu")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_an_index_of_another_form(text, tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(CheckpointError, match="corrupt index"):
        load(empty_model(), index, device="cpu")
