"""Saved models: what comes back is what was saved, and what is damaged is refused by name before weights load."""

import json
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY, tiny_model, token_rows
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

import hf_guidedquant
from hf_guidedquant import GuidedQuantConfig
from hf_guidedquant.errors import AlreadyQuantizedError, CheckpointError, ModelError, OutputFolderError
from hf_guidedquant.inspection import inspect
from hf_guidedquant.nn import quantized_modules

LAYER = "model.layers.1.mlp.up_proj"
QUANTIZED = [f"{LAYER}.weight", f"{LAYER}.lut", f"{LAYER}.bias"]
ORDINARY = ["model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"]
WEIGHTS = "model.safetensors"
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def quantized(architecture: str = "llama"):
    config = GuidedQuantConfig(bits=3, method="squeezellm", dataset=token_rows(4))
    return hf_guidedquant.quantize(tiny_model(architecture), config)


@pytest.fixture(scope="module")
def model():
    return quantized()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> Path:
    """A checkpoint in one file; not to be changed."""
    return hf_guidedquant.save(model, tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture
def shards(model, tmp_path) -> Path:
    """The same model in several files."""
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    return tmp_path / "shards"


@pytest.fixture
def forbid_weights(monkeypatch):
    """Transformers' own reading of weights fails the test."""

    def reached(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", reached)


def load(folder: Path, auto=AutoModelForCausalLM, **options):
    return auto.from_pretrained(folder, **options)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.stack(token_rows(2))).logits


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def edit_json(file: Path, change) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def edit_settings(folder: Path, **values) -> None:
    edit_json(folder / "config.json", lambda config: config["quantization_config"].update(values))


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gpt2", "gemma3"])
@pytest.mark.parametrize("shard_size", ["5GB", "40KB"])
def test_reload_is_bit_exact(architecture, shard_size, tmp_path):
    before = quantized(architecture)
    before.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size == "40KB")
    after = load(tmp_path)
    assert torch.equal(logits(after), logits(before))
    expected, found = before.state_dict(), after.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def _mixtral():
    return MixtralForCausalLM(MixtralConfig(**SMALL, num_key_value_heads=4, num_local_experts=2, intermediate_size=32))


def _gpt_neox():
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, intermediate_size=96))


# architectures' tensors under their historical names. These models cannot be loaded again at all.
@pytest.mark.parametrize("make", [_mixtral, _gpt_neox], ids=["experts", "historical-names"])
def test_a_model_whose_tensors_have_other_names_on_disk_comes_back(make, tmp_path):
    make().save_pretrained(tmp_path / "dense")
    before = load(tmp_path / "dense", quantization_config=GuidedQuantConfig(bits=3, method="rtn"))
    after = load(hf_guidedquant.save(before, tmp_path / "quantized"))
    assert quantized_modules(after).keys() == quantized_modules(before).keys()
    assert torch.equal(logits(after), logits(before))


def test_loading_twice_and_saving_again_gives_the_same_bytes(saved, tmp_path):
    load(saved)
    again = hf_guidedquant.save(load(saved), tmp_path / "again")
    assert (again / WEIGHTS).read_bytes() == (saved / WEIGHTS).read_bytes()
    assert json.loads((again / "config.json").read_text()) == json.loads((saved / "config.json").read_text())


def test_the_bare_body_of_a_language_model_loads(saved, model):
    body = load(saved, AutoModel)
    ids = torch.stack(token_rows(2))
    with torch.no_grad():
        assert torch.equal(body(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_a_classifier_on_a_language_model_keeps_the_quantized_body(saved, model, tmp_path):
    classifier = load(saved, AutoModelForSequenceClassification, num_labels=3)
    assert len(quantized_modules(classifier)) == len(quantized_modules(model))
    ids = torch.stack(token_rows(2))
    with torch.no_grad():
        assert torch.equal(classifier.model(ids).last_hidden_state, model.model(ids).last_hidden_state)
    hf_guidedquant.save(classifier, tmp_path / "classifier")
    again = load(tmp_path / "classifier", AutoModelForSequenceClassification)
    assert torch.equal(logits(again), logits(classifier))


def test_a_body_becomes_a_language_model_again(saved, model, tmp_path):
    hf_guidedquant.save(load(saved, AutoModel), tmp_path / "body")
    assert len(inspect(tmp_path / "body").layers) == len(quantized_modules(model))
    whole = load(tmp_path / "body")
    assert quantized_modules(whole).keys() == quantized_modules(model).keys()
    assert torch.equal(whole.get_submodule(LAYER).lut, model.get_submodule(LAYER).lut)


def test_an_interrupted_save_leaves_nothing_behind(model, tmp_path):
    class FailingTokenizer:
        def save_pretrained(self, folder):
            assert (folder / WEIGHTS).exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hf_guidedquant.save(model, tmp_path / "model", FailingTokenizer())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_content_is_refused_and_left_as_it_is(model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputFolderError, match=re.escape(str(tmp_path))):
        hf_guidedquant.save(model, tmp_path)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("notes.txt", "mine")]


def test_an_empty_folder_is_filled(model, tmp_path):
    hf_guidedquant.save(model, tmp_path / "new" / "model")
    (tmp_path / "empty").mkdir()
    is_there = (tmp_path / "empty").stat().st_ino
    hf_guidedquant.save(model, tmp_path / "empty")
    assert (tmp_path / "empty").stat().st_ino == is_there  # so it may be a mount
    (tmp_path / "link").symlink_to(tmp_path / "linked")
    assert hf_guidedquant.save(model, tmp_path / "link") == tmp_path / "linked"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "other").symlink_to(tmp_path / "elsewhere")
    hf_guidedquant.save(model, tmp_path / "other")
    for name in ("empty", "linked", "elsewhere"):
        assert {file.name for file in (tmp_path / name).iterdir()} == {
            file.name for file in (tmp_path / "new" / "model").iterdir()
        }
        assert (tmp_path / name / WEIGHTS).read_bytes() == (tmp_path / "new" / "model" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("is_there", [False, True])
def test_a_finished_model_is_kept_where_it_cannot_be_moved(is_there, model, tmp_path):
    target = tmp_path / "model"
    if is_there:
        target.mkdir()

    class Latecomer:
        """Somebody else who fills the folder in the meantime."""

        def save_pretrained(self, folder):
            (target / WEIGHTS).mkdir(parents=True)
            (target / WEIGHTS / "notes.txt").write_text("mine")

    with pytest.raises(OutputFolderError, match="cannot be filled") as caught:
        hf_guidedquant.save(model, target, Latecomer())
    kept = Path(str(caught.value).split(" is in ")[1].removesuffix("."))
    assert torch.equal(logits(load(kept)), logits(model)) if not is_there else (kept / WEIGHTS).is_file()
    assert (target / WEIGHTS / "notes.txt").read_text() == "mine"


def _missing(tensors, name):
    del tensors[name]


def _extra(tensors, name):
    tensors[f"{name}_extra"] = torch.zeros(3)


def _renamed(tensors, name):
    tensors["elsewhere"] = tensors.pop(name)


def _wrong_shape(tensors, name):
    tensors[name] = tensors[name][..., :-1].contiguous()


def _wrong_dtype(tensors, name):
    wrong = {torch.int32: torch.int64, torch.float16: torch.float32, torch.float32: torch.int32}
    tensors[name] = tensors[name].to(wrong[tensors[name].dtype])


DAMAGES = [_missing, _extra, _renamed, _wrong_shape, _wrong_dtype]


def test_an_intact_checkpoint_gets_as_far_as_its_weights(folder, forbid_weights):
    with pytest.raises(AssertionError, match="weights were read"):
        load(folder)


@pytest.mark.parametrize("name", QUANTIZED + ORDINARY)
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__.strip("_"))
def test_damaged_tensors_are_named_before_weights_load(damage, name, folder, forbid_weights):
    edit_tensors(folder, lambda tensors: damage(tensors, name))
    with pytest.raises(CheckpointError, match=re.escape(name)):
        load(folder)


@pytest.mark.parametrize("architecture, name", [("llama-tied", "model.embed_tokens"), ("gpt2", "transformer.wte")])
def test_a_missing_weight_that_the_head_is_tied_to_is_named(architecture, name, tmp_path, forbid_weights):
    quantized(architecture).save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda tensors: _missing(tensors, f"{name}.weight"))
    with pytest.raises(CheckpointError, match=re.escape(name)):
        load(tmp_path)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight", f"{LAYER}.lut"])
@pytest.mark.parametrize("auto", [AutoModel, AutoModelForSequenceClassification])
def test_a_missing_tensor_of_the_body_is_named_whatever_the_head(auto, name, folder, forbid_weights):
    edit_tensors(folder, lambda tensors: _missing(tensors, name))
    # The body's own names have no prefix; either form tells the tensor.
    with pytest.raises(CheckpointError, match=re.escape(name.removeprefix("model."))):
        load(folder, auto)


def test_a_truncated_shard_is_named(shards, forbid_weights):
    shard = sorted(shards.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=shard.name):
        load(shards)


def test_a_missing_shard_is_named(shards, forbid_weights):
    shard = sorted(shards.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises((CheckpointError, OSError), match=shard.name):
        load(shards)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_codebook_is_named(value, folder):
    edit_tensors(folder, lambda tensors: tensors[f"{LAYER}.lut"][5].fill_(value))
    with pytest.raises(CheckpointError, match=re.escape(LAYER)):
        load(folder)


def test_a_later_major_format_is_refused_and_a_later_minor_one_is_read(folder, model):
    edit_settings(folder, format_version="1.7")
    assert torch.equal(logits(load(folder)), logits(model))
    edit_settings(folder, format_version="2.0")
    with pytest.raises(CheckpointError, match=r"format 2\.0"):
        load(folder)


def test_unknown_keys_are_ignored_with_a_warning(folder, model, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hf_guidedquant"), "propagate", True)
    edit_settings(folder, invented_later=[1, 2])
    assert torch.equal(logits(load(folder)), logits(model))
    assert [record.levelname for record in caplog.records if "invented_later" in record.getMessage()] == ["WARNING"]


WITHOUT_PLUGIN = """
import sys
from transformers import AutoModelForCausalLM, pipeline
for load in (AutoModelForCausalLM.from_pretrained, lambda folder: pipeline("text-generation", model=folder)):
    try:
        load(sys.argv[1])
        print("loaded")
    except Exception as error:
        print(type(error).__name__, "size mismatch" if "mismatch" in str(error) else error)
print("hf_guidedquant" in sys.modules)
"""


def test_without_the_plugin_loading_fails_on_a_size_instead_of_giving_random_weights(saved):
    command = [sys.executable, "-c", WITHOUT_PLUGIN, str(saved)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["RuntimeError size mismatch", "ValueError size mismatch", "False"], done.stderr
    assert "Unknown quantization type, got guidedquant" in done.stderr


def test_a_quantized_model_is_not_quantized_again(saved, model):
    with pytest.raises(AlreadyQuantizedError, match="guidedquant"):
        hf_guidedquant.quantize(model, GuidedQuantConfig(method="rtn"))
    with pytest.raises(AlreadyQuantizedError, match="guidedquant"):
        hf_guidedquant.quantize(load(saved), GuidedQuantConfig(method="rtn"))


def test_a_config_passed_for_a_quantized_checkpoint_is_not_used_and_a_warning_says_so(saved, model, caplog):
    given = GuidedQuantConfig(bits=2, method="rtn", dataset=token_rows())
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        loaded = load(saved, quantization_config=given)
    assert "Of the settings given, bits, method, dataset are not applied" in caplog.text
    caplog.clear()
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        load(saved, quantization_config=GuidedQuantConfig(cache_dequantized=True, fuse_layers=False))
    assert "not applied" not in caplog.text
    assert loaded.config.quantization_config.bits == 3
    assert torch.equal(logits(loaded), logits(model))


def test_a_model_that_another_method_quantized_is_refused(folder, forbid_weights):
    foreign = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    other = tiny_model()
    other.config.quantization_config = foreign
    with pytest.raises(AlreadyQuantizedError, match="gptq"):
        hf_guidedquant.quantize(other, GuidedQuantConfig(method="rtn"))
    edit_json(folder / "config.json", lambda config: config.update(quantization_config=foreign))
    with pytest.raises(ValueError, match="GPTQConfig"):
        load(folder, quantization_config=GuidedQuantConfig(method="rtn"))


# random values to weights that the file does not hold; these are quantized without a word.
def test_weights_that_no_file_holds_are_not_quantized(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda tensors: _renamed(tensors, "model.layers.0.mlp.up_proj.weight"))
    method = {"quant_method": "unheard-of"}
    edit_json(tmp_path / "config.json", lambda config: config.update(quantization_config=method))
    with pytest.raises(ModelError, match=r"model\.layers\.0\.mlp\.up_proj"):
        load(tmp_path, quantization_config=GuidedQuantConfig(method="rtn"))
