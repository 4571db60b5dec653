"""Published any-precision checkpoints: converting one runs, leaks and allocates nothing that it names."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from hypothesis import given
from hypothesis import strategies as st
from mutation import EXAMPLES, bounded_memory, mutate
from safetensors.torch import load_file
from test_importer import Code, Published
from transformers import AutoConfig
from victim import CONFIG, WEIGHTS, change_config, nothing_but_named_errors

import hf_guidedquant
from hf_guidedquant.errors import CheckpointError, UnsafeFileError


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    return Published(tiny_model()).write(tmp_path_factory.mktemp("published") / "model")


@pytest.fixture
def folder(intact, tmp_path) -> Path:
    return Path(shutil.copytree(intact, tmp_path / "model"))


@pytest.fixture(scope="module")
def expected(intact, tmp_path_factory) -> dict[str, torch.Tensor]:
    return load_file(hf_guidedquant.convert(intact, tmp_path_factory.mktemp("expected") / "out", bits=3) / WEIGHTS)


@EXAMPLES
@given(data=st.data())
def test_any_description_gives_the_same_tensors_or_is_refused_by_name(data, intact, folder, expected, tmp_path):
    config = json.loads((intact / CONFIG).read_text())
    mutate(data, config["anyprec"])
    (folder / CONFIG).write_text(json.dumps(config))
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    with bounded_memory(), nothing_but_named_errors("anyprec", "bits=3", "The checkpoint does not hold", CONFIG):
        hf_guidedquant.convert(folder, tmp_path / "out", bits=3)
        found = load_file(tmp_path / "out" / WEIGHTS)
        assert found.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_a_pickle_with_code_is_refused_and_not_run_by_convert(folder, tmp_path):
    (folder / WEIGHTS).unlink()
    torch.save({"x": Code(tmp_path / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(UnsafeFileError, match=r"pytorch_model\.bin would run code"):
        hf_guidedquant.convert(folder, tmp_path / "out")
    assert not (tmp_path / "ran").exists()


# What lies beside the weights is copied, and may then be published with them.
@pytest.mark.parametrize("name", ["LICENSE.md", "tokenizer.model", "additional_chat_templates/x.jinja"])
def test_a_link_to_a_file_elsewhere_is_refused_and_not_copied(name, folder, tmp_path):
    secret = tmp_path / "elsewhere" / Path(name).name
    secret.parent.mkdir()
    secret.write_text("secret")
    if "/" in name:
        (folder / name).parent.symlink_to(secret.parent)
    else:
        (folder / name).symlink_to(secret)
    with pytest.raises(UnsafeFileError, match="is a link to"):
        hf_guidedquant.convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_links_of_the_hubs_cache_are_followed(intact, tmp_path):
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "0", tmp_path / "models--x" / "blobs"
    shutil.copytree(intact, blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs", file.name))
    assert (hf_guidedquant.convert(snapshot, tmp_path / "out") / "LICENSE.txt").read_text() == "terms"


def test_code_that_a_config_names_is_neither_run_nor_taken_over(folder, tmp_path):
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    code = {"auto_map": {"AutoConfig": "evil.X"}, "attn_implementation": "some/one", "_attn_implementation": "some/one"}
    change_config(folder, lambda config: config.update(code, extra=code))
    result = hf_guidedquant.convert(folder, tmp_path / "out")
    written = (result / CONFIG).read_text()
    assert AutoConfig.from_pretrained(result).model_type == "llama"
    assert "evil" not in written and "some/one" not in written
    assert not (tmp_path / "ran").exists() and not (result / "evil.py").exists()


def test_more_blocks_than_any_model_has_are_refused_by_convert(folder, tmp_path):
    change_config(folder, lambda config: config.update(num_hidden_layers=10**9))
    with bounded_memory(), pytest.raises(CheckpointError, match="num_hidden_layers is 1000000000"):
        hf_guidedquant.convert(folder, tmp_path / "out")
