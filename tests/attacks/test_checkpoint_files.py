"""Weights and indices of a stranger's checkpoint: the tensors that were saved, or a refusal that names the file."""

import json
import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mutation import EXAMPLES, bounded_memory, damage, header_end, join, mutate, split
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from victim import INDEX, WEIGHTS, logits, nothing_but_named_errors, quantized

from hf_guidedquant.cli import main
from hf_guidedquant.errors import CheckpointError, DamagedFileError, NonFiniteTensorError, TensorMismatchError
from hf_guidedquant.inspection import inspect

pytest_plugins = ["victim"]  # intact, folder, forbid_weights

LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture
def shards(tmp_path) -> Path:
    quantized().save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    return tmp_path / "shards"


def change_tensors(folder: Path, **changes) -> None:
    """Replace tensors of :data:`LAYER`; None takes one away."""
    tensors = load_file(folder / WEIGHTS) | {f"{LAYER}.{key}": value for key, value in changes.items()}
    save_file({key: value for key, value in tensors.items() if value is not None}, folder / WEIGHTS, {"format": "pt"})


def load_or_refuse(folder: Path, *names: str) -> None:
    """The checkpoint loads as the model that was saved, and saves again; or it is refused by name."""
    with bounded_memory(), nothing_but_named_errors(*names):
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        with TemporaryDirectory() as again:
            loaded.save_pretrained(again)
        assert torch.equal(logits(loaded), logits(quantized()))


def inspect_or_refuse(folder: Path, intact: Path, *names: str) -> None:
    with bounded_memory(), nothing_but_named_errors(*names):
        assert inspect(folder) == inspect(intact)


@EXAMPLES
@given(data=st.data())
def test_any_header_loads_the_same_model_or_is_refused_by_name(data, folder, intact):
    header, content = split(intact / WEIGHTS)
    mutate(data, header)
    (folder / WEIGHTS).write_bytes(join(header, content))
    load_or_refuse(folder, WEIGHTS, "The checkpoint does not hold")
    inspect_or_refuse(folder, intact, WEIGHTS, "The checkpoint does not hold")


@EXAMPLES
@given(data=st.data())
def test_flipped_header_bytes_and_cut_files_load_the_same_model_or_are_refused_by_name(data, folder, intact):
    content = (intact / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(damage(data, content, header_end(content)))
    load_or_refuse(folder, WEIGHTS, "The checkpoint does not hold")
    inspect_or_refuse(folder, intact, WEIGHTS, "The checkpoint does not hold")


@EXAMPLES
@given(data=st.data())
def test_any_index_gives_the_same_model_or_is_refused_by_name(data, shards):
    expected, index = inspect(shards), json.loads((shards / INDEX).read_text())
    mutate(data, index)
    original = (shards / INDEX).read_bytes()
    (shards / INDEX).write_text(json.dumps(index))
    with bounded_memory(), nothing_but_named_errors("index", "safetensors", "The checkpoint does not hold"):
        assert inspect(shards) == expected
    (shards / INDEX).write_bytes(original)


@pytest.mark.parametrize("text", ["", "[" * 10**5, "nul", "\ud800", '{"weight_map": 5}'], ids=range(5))
def test_an_unreadable_index_is_refused(text, shards):
    (shards / INDEX).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError, match="index"):
        inspect(shards)


# Files of a stranger's checkpoint can point anywhere on the disk.
@pytest.mark.parametrize("absolute", [False, True])
def test_an_index_that_points_outside_the_folder_is_refused(absolute, shards, tmp_path, forbid_weights):
    shard = sorted(shards.glob("*.safetensors"))[0]
    outside = Path(shutil.move(shard, tmp_path / "evil.safetensors"))
    index = json.loads((shards / INDEX).read_text())
    name = str(outside) if absolute else "../evil.safetensors"
    index["weight_map"] |= dict.fromkeys(load_file(outside), name)
    (shards / INDEX).write_text(json.dumps(index))
    with pytest.raises((CheckpointError, OSError), match="evil"):
        AutoModelForCausalLM.from_pretrained(shards)
    with pytest.raises(CheckpointError, match="evil"):
        inspect(shards)


def test_a_truncated_shard_is_refused(shards, forbid_weights):
    shard = sorted(shards.glob("*.safetensors"))[-1]
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(DamagedFileError, match=shard.name):
        AutoModelForCausalLM.from_pretrained(shards)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"lut": None}, f"missing: {LAYER}.lut"),
        ({"indices": torch.zeros(3)}, f"not expected: {LAYER}.indices"),
        ({"lut": None, "lux": torch.zeros(96, 8)}, f"missing: {LAYER}.lut; not expected: {LAYER}.lux"),
        ({"lut": torch.zeros(96, 4).half()}, r"expected float16 \[96, 8\], got float16 \[96, 4\]"),
        ({"lut": torch.zeros(96, 8)}, r"expected float16 \[96, 8\], got float32 \[96, 8\]"),
        ({"weight": torch.zeros(3, 96, 2, dtype=torch.int64)}, r"expected int32 \[3, 96, 2\], got int64 \[3, 96, 2\]"),
    ],
)
def test_missing_extra_renamed_and_misshapen_tensors_are_refused_before_weights_load(
    changes, told, folder, forbid_weights
):
    change_tensors(folder, **changes)
    with pytest.raises(TensorMismatchError, match=told):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_codebooks_that_are_not_finite_are_refused(value, folder):
    change_tensors(folder, lut=torch.full((96, 8), value).half())
    with pytest.raises(NonFiniteTensorError, match=LAYER):
        AutoModelForCausalLM.from_pretrained(folder)


def test_no_code_points_outside_its_codebook(folder):
    """Whatever bits a file holds, a code of b bits is below ``2**b``: there is no index that could be out of bounds."""
    words = torch.randint(-(2**31), 2**31, (3, 96, 2), generator=torch.Generator().manual_seed(0)).int()
    codebook = torch.arange(96 * 8).view(96, 8).half()
    change_tensors(folder, weight=words, lut=codebook)
    dense = AutoModelForCausalLM.from_pretrained(folder).get_submodule(LAYER).dequantize()
    assert torch.equal((dense / 8).floor(), torch.arange(96).view(-1, 1).expand_as(dense))


def test_a_flipped_byte_is_found_by_verify_which_names_the_file(shards, capsys):
    shard = sorted(shards.glob("*.safetensors"))[1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert inspect(shards)
    assert main(["inspect", str(shards), "--verify"]) == 1
    message = capsys.readouterr().err
    assert message.startswith(f"DamagedFileError: {shard.name}:")


@pytest.mark.parametrize("change", [lambda text: text[:-10], lambda text: "", lambda text: "\udcff".join(text)])
def test_checksums_that_are_missing_for_a_file_are_refused_by_verify(change, folder):
    sums = folder / "SHA256SUMS"
    sums.write_text(change(sums.read_text()), encoding="utf-8", errors="surrogateescape")
    with pytest.raises(DamagedFileError, match=WEIGHTS):
        inspect(folder, verify=True)


def test_pickled_weights_are_refused(folder, forbid_weights):
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(CheckpointError, match=WEIGHTS):
        inspect(folder)
