"""config.json of a stranger's checkpoint: what it may set, and that it makes nothing run, load or grow."""

import json
import logging
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mutation import EXAMPLES, bounded_memory, mutate
from transformers import AutoModelForCausalLM
from victim import CONFIG, ESCAPE, change_config, change_settings, logits, nothing_but_named_errors, quantized

from hf_guidedquant import GuidedQuantConfig
from hf_guidedquant.errors import CheckpointError, ConfigError
from hf_guidedquant.inspection import inspect

pytest_plugins = ["victim"]  # intact, folder, forbid_weights

LAYER = "model.layers.1.mlp.up_proj"
WRONG_BITS = [0, -1, 9, 2**31, True, "2", None, [3], 2.5]


@EXAMPLES
@given(data=st.data())
def test_any_config_loads_the_same_model_or_is_refused_by_name(data, folder, intact):
    config = json.loads((intact / CONFIG).read_text())
    # Another method's name would test the plugin that owns it.
    mutate(data, config["quantization_config"], spared=["quant_method"])
    (folder / CONFIG).write_text(json.dumps(config))
    names = ("GuidedQuantConfig.", CONFIG, "format", "The checkpoint does not hold", "quantized modules")
    with bounded_memory(), nothing_but_named_errors(*names):
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        with TemporaryDirectory() as again:
            loaded.save_pretrained(again)
        assert torch.equal(logits(loaded), logits(quantized()))
    with bounded_memory(), nothing_but_named_errors(*names):
        assert [(x.name, x.bits) for x in inspect(folder).layers] == [(x.name, x.bits) for x in inspect(intact).layers]


@pytest.mark.parametrize("bits", WRONG_BITS)
def test_bits_outside_1_to_8_are_refused_and_nothing_is_allocated(bits, folder, forbid_weights):
    config = json.loads((folder / CONFIG).read_text())["quantization_config"]
    change_settings(folder, modules={**config["modules"], LAYER: {"bits": bits}})
    for load in (AutoModelForCausalLM.from_pretrained, inspect):
        with bounded_memory(), pytest.raises(ConfigError, match=r"up_proj'\]\['bits'\] = .* an integer from 1 to 8"):
            load(folder)


@pytest.mark.parametrize("groups", [0, -1, 1025, 2**31, True, "2", None, [1]])
def test_a_number_of_groups_out_of_range_is_refused(groups, folder, forbid_weights):
    change_settings(folder, num_groups=groups)
    for load in (AutoModelForCausalLM.from_pretrained, inspect):
        with pytest.raises(ConfigError, match=r"num_groups = .* an integer from 1 to 1,024"):
            load(folder)


@pytest.mark.parametrize("version", ["2.0", "9999", 2])
def test_a_later_major_format_is_refused(version, folder, forbid_weights):
    change_settings(folder, format_version=version)
    for load in (AutoModelForCausalLM.from_pretrained, inspect):
        with pytest.raises(CheckpointError, match="Upgrade"):
            load(folder)


@pytest.mark.parametrize("settings", ["x", ["bits"], {}, None, {"bits": 3.5, "lut_dtype": []}])
def test_settings_of_a_module_that_are_none_are_refused(settings, folder, forbid_weights):
    config = json.loads((folder / CONFIG).read_text())["quantization_config"]
    change_settings(folder, modules={**config["modules"], LAYER: settings})
    with pytest.raises((CheckpointError, ConfigError), match=LAYER.replace(".", r"\.")):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("name", ["", "model", "model.layers", "model.norm", "lm_head", "model.embed_tokens"])
def test_a_module_that_is_no_quantized_layer_is_refused(name, folder, forbid_weights):
    config = json.loads((folder / CONFIG).read_text())["quantization_config"]
    change_settings(folder, modules={**config["modules"], name: {"bits": 3}})
    with pytest.raises(CheckpointError):
        AutoModelForCausalLM.from_pretrained(folder)


def test_data_tokenizers_and_patterns_are_ignored(folder, monkeypatch):
    def fetched(*args, **kwargs):
        raise AssertionError("loading a checkpoint must not fetch what it names")

    monkeypatch.setattr("hf_guidedquant.pipeline.load_rows", fetched)
    monkeypatch.setattr("hf_guidedquant.pipeline.AutoTokenizer.from_pretrained", fetched)
    monkeypatch.setattr("hf_guidedquant.calibration.store.snapshot_download", fetched)
    run_only = {
        "dataset": "c4",
        "tokenizer": "someone/else",
        "overrides": {"(a+)+$": {"bits": 2}},
        "seed": 7,
        "run_dir": str(folder / "run"),
        "statistics": "hf://someone/else",
        "device": "cuda:7",
    }
    change_settings(folder, **run_only)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    default = GuidedQuantConfig()
    for name in run_only:
        assert getattr(loaded.config.quantization_config, name) == getattr(default, name)
    assert torch.equal(logits(loaded), logits(quantized()))
    assert not (folder / "run").exists()


@pytest.mark.parametrize("load", [AutoModelForCausalLM.from_pretrained, inspect])
def test_code_beside_a_checkpoint_is_not_run(load, folder, tmp_path):
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom transformers import *\n")
    names = {"AutoConfig": "evil.LlamaConfig", "AutoModelForCausalLM": "evil.LlamaForCausalLM"}
    change_config(folder, lambda config: config.update(auto_map=names))
    assert load(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_an_attention_from_the_hub_is_not_fetched_by_inspect(key, folder, monkeypatch):
    def fetched(*args, **kwargs):
        raise AssertionError("code was fetched")

    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", fetched)
    change_config(folder, lambda config: config.update({key: "someone/else"}))
    assert inspect(folder).layers


def test_more_blocks_than_any_model_has_are_refused_by_inspect(folder):
    change_config(folder, lambda config: config.update(num_hidden_layers=10**9))
    with bounded_memory(), pytest.raises(CheckpointError, match="num_hidden_layers is 1000000000"):
        inspect(folder)


def test_unknown_keys_are_warned_of_without_control_characters(folder, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hf_guidedquant"), "propagate", True)
    change_settings(folder, **{ESCAPE: 1, "x" * 10**6: 2})
    inspect(folder)
    (message,) = [record.getMessage() for record in caplog.records if "unknown" in record.getMessage()]
    assert message.isprintable() and "gone" in message and len(message) < 1000
