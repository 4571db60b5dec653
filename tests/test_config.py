"""The config: bounds, what is persisted, what a checkpoint's config may do."""

import copy
import json
import logging
from dataclasses import asdict

import pytest

from hf_guidedquant import GuidedQuantConfig
from hf_guidedquant.config import PERSISTED, PRESETS, DistillSpec, ReconstructSpec, matches
from hf_guidedquant.errors import CheckpointError, ConfigError


@pytest.mark.parametrize("bits", [0, -1, 9, 2**31, True, "2", 0.9, 8.1, float("nan"), None])
def test_bits_outside_the_range_are_refused_by_name(bits):
    with pytest.raises(ConfigError, match=r"GuidedQuantConfig\.bits = .* from 1 to 8"):
        GuidedQuantConfig(bits=bits)


@pytest.mark.parametrize("others", [{"guided": False}, {"method": "rtn"}])
def test_a_mean_number_of_bits_needs_losses_that_can_be_compared(others):
    with pytest.raises(ConfigError, match=r"bits = 2\.5 is not allowed"):
        GuidedQuantConfig(bits=2.5, **others)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("method", "awq"),
        ("guided", 1),
        ("assistant_only_loss", "assistant"),
        ("output_curvature", 1),
        ("num_groups", 0),
        ("num_groups", 1025),
        ("lnq_sweeps", -1),
        ("lnq_iterations", -1),
        ("lnq_cycles", 0),
        ("kmeans_iterations", 1001),
        ("distill", 1),
        ("distill", None),
        ("distill", {"epoch": 2}),
        ("reconstruct", 0),
        ("reconstruct", {"epoch": 2}),
        ("preset", "better"),
        ("preset", ""),
        ("num_samples", 0),
        ("seq_len", 1),
        ("seed", -1),
        ("max_memory", 0),
        ("max_memory", float("nan")),
        ("device", "abacus"),
        ("cache_dequantized", None),
        ("fuse_layers", 1),
        ("run_dir", ""),
        ("run_dir", True),
        ("statistics", 3),
        ("modules_to_not_convert", "lm_head"),
        ("modules_to_not_convert", [""]),
        ("modules", []),
        ("quant_method", "gptq"),
        ("format_version", "newest"),
    ],
)
def test_a_wrong_value_names_field_value_and_range(field, value):
    with pytest.raises(ConfigError) as caught:
        GuidedQuantConfig(**{field: value})
    assert f"GuidedQuantConfig.{field} = {value!r}" in str(caught.value)
    assert caught.value.allowed in str(caught.value)


def test_assistant_only_loss_needs_a_loss():
    with pytest.raises(ConfigError, match="assistant_only_loss = True is not allowed; it must be False without guided"):
        GuidedQuantConfig(assistant_only_loss=True, guided=False)


@pytest.mark.parametrize("others", [{"guided": False}, {"method": "squeezellm"}, {"preset": "fast"}], ids=str)
def test_output_curvature_needs_gradients_and_lnq(others):
    with pytest.raises(ConfigError, match="output_curvature = True is not allowed; it must be False without guided"):
        GuidedQuantConfig(output_curvature=True, **others)


def test_a_saved_config_without_output_curvature_is_one_of_before():
    saved = GuidedQuantConfig(bits=2, modules={"layer": {"bits": 2}}).to_dict()
    assert saved.pop("output_curvature") is False
    assert GuidedQuantConfig.from_dict(saved).output_curvature is False


SPECS = {"reconstruct": ReconstructSpec, "distill": DistillSpec}


@pytest.mark.parametrize("training", SPECS)
@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("epochs", 0, "from 1 to 100"),
        ("epochs", 2.0, "from 1 to 100"),
        ("learning_rate", 0, "positive number up to 1"),
        ("learning_rate", 1.1, "positive number up to 1"),
        ("learning_rate", float("nan"), "positive number up to 1"),
        ("batch_tokens", 0, "from 1 to 16,777,216"),
        ("held_back", 0.0, "positive number up to 0.5"),
        ("held_back", 0.6, "positive number up to 0.5"),
        ("held_back", True, "positive number up to 0.5"),
    ],
)
def test_a_wrong_setting_of_a_training_names_field_value_and_range(training, field, value, allowed):
    with pytest.raises(ConfigError) as caught:
        GuidedQuantConfig(**{training: {field: value}})
    assert f"GuidedQuantConfig.{training}['{field}'] = {value!r}" in str(caught.value)
    assert allowed in str(caught.value)


def test_latent_weights_have_a_rate_and_a_decay_of_their_own():
    with pytest.raises(ConfigError, match=r"latent_learning_rate.*positive number up to 1"):
        GuidedQuantConfig(reconstruct={"latent_learning_rate": 0})
    with pytest.raises(ConfigError, match=r"latent_decay.*a number from 0 to 1"):
        GuidedQuantConfig(reconstruct={"latent_decay": 1.1})
    assert GuidedQuantConfig(reconstruct={"latent_decay": 0}).reconstruct_spec.latent_decay == 0
    with pytest.raises(ConfigError, match=r"reconstruct\['codes'\] = 0 .*True or False"):
        GuidedQuantConfig(reconstruct={"codes": 0})


@pytest.mark.parametrize("training", SPECS)
def test_the_settings_of_a_training_are_complete_and_copied(training):
    spec = SPECS[training]
    assert getattr(GuidedQuantConfig(), training) is False
    assert getattr(GuidedQuantConfig(), f"{training}_spec") is None
    assert getattr(GuidedQuantConfig(**{training: True}), f"{training}_spec") == spec()
    mine = {"epochs": 7}
    config = GuidedQuantConfig(**{training: mine})
    assert getattr(config, f"{training}_spec") == spec(epochs=7)
    assert mine == {"epochs": 7}
    assert config.to_dict()[training] == {**asdict(spec()), "epochs": 7}
    settings = copy.deepcopy(config)
    getattr(settings, training)["epochs"] = 8
    assert getattr(config, training)["epochs"] == 7


def test_what_is_given_counts_more_than_the_preset():
    assert GuidedQuantConfig(preset="paper") == GuidedQuantConfig(num_groups=4, lnq_sweeps=0)
    assert GuidedQuantConfig(preset="paper", num_groups=1, lnq_sweeps=3) == GuidedQuantConfig()
    best = GuidedQuantConfig(bits=2, preset="best", distill=False)
    assert (best.bits, best.num_groups, best.distill, best.reconstruct_spec) == (2, 4, False, ReconstructSpec())
    assert GuidedQuantConfig.from_dict({"preset": "best", "bits": 3}) == GuidedQuantConfig(bits=3, preset="best")
    saved = GuidedQuantConfig(preset="best").to_dict()
    assert "preset" not in saved
    assert GuidedQuantConfig.from_dict(saved) == GuidedQuantConfig(preset="best")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_copied(name):
    GuidedQuantConfig(preset=name).overrides["x"] = {"bits": 2}
    for value in vars(GuidedQuantConfig(preset=name)).values():
        if isinstance(value, dict):
            value.clear()
    assert GuidedQuantConfig(preset=name).overrides == {}
    assert GuidedQuantConfig(preset=name).distill_spec == GuidedQuantConfig(**PRESETS[name]).distill_spec


def test_a_checkpoint_from_before_there_was_training_was_not_trained():
    old = GuidedQuantConfig(modules={"a": {"bits": 2}}).to_dict()
    del old["distill"], old["reconstruct"]
    config = GuidedQuantConfig.from_dict(old)
    assert (config.reconstruct, config.distill) == (False, False)


@pytest.mark.parametrize(
    "overrides", [{"*.x": {"bits": 9}}, {"*.x": {"bit": 2}}, {"*.x": 2}, ["*.x"], {"a": {"method": "x"}}]
)
def test_bad_overrides_are_refused(overrides):
    with pytest.raises(ConfigError, match="overrides"):
        GuidedQuantConfig(overrides=overrides)


def test_a_run_and_statistics_need_folders_of_their_own(tmp_path):
    with pytest.raises(ConfigError, match="another folder than run_dir"):
        GuidedQuantConfig(run_dir=tmp_path, statistics=f"{tmp_path}/a/..")


def test_a_misspelt_field_is_an_error_for_the_user():
    with pytest.raises(TypeError, match="bit"):
        GuidedQuantConfig(bit=2)


def test_what_is_saved_is_the_persisted_part_and_survives_json():
    config = GuidedQuantConfig(
        bits=3,
        dataset=["secret text"],
        tokenizer="/secret/path",
        run_dir="/secret/run",
        statistics="hf://secret/statistics",
        overrides={"*.a": {"bits": 2}},
        distill={"epochs": 3},
    )
    saved = json.loads(json.dumps(config.to_dict()))
    assert set(saved) == {*PERSISTED, "quant_method"}
    assert "secret" not in json.dumps(saved)
    assert GuidedQuantConfig.from_dict(saved).to_dict() == saved


def test_a_checkpoint_cannot_name_data_tokenizers_or_patterns(caplog):
    hostile = {
        "modules": {"a": {"bits": 2}},
        "dataset": "evil/data",
        "tokenizer": "evil/tokenizer",
        "run_dir": "/etc",
        "statistics": "hf://evil/statistics",
        "overrides": {"(a+)+$": {"bits": 2}},
        "brand_new_key": 1,
    }
    logging.getLogger("hf_guidedquant").propagate = True
    with caplog.at_level(logging.WARNING, logger="hf_guidedquant"):
        config = GuidedQuantConfig.from_dict(hostile)
    assert (config.dataset, config.tokenizer, config.overrides) == ("builtin", None, {})
    assert config.run_dir is config.statistics is None
    for key in ("dataset", "tokenizer", "run_dir", "statistics", "overrides", "brand_new_key"):
        assert key in caplog.text


def test_a_newer_major_format_is_refused_and_a_newer_minor_is_not():
    with pytest.raises(CheckpointError, match="Upgrade"):
        GuidedQuantConfig(format_version="2.0")
    assert GuidedQuantConfig(format_version="1.7").format_version == "1.7"


def test_deepcopy_shares_data_and_copies_the_rest():
    texts = (text for text in ["a generator cannot be copied"])
    config = GuidedQuantConfig(dataset=texts, overrides={"*.a": {"bits": 2}})
    twin = copy.deepcopy(config)
    twin.overrides["*.a"]["bits"] = 3
    twin.modules["x"] = {}
    assert twin.dataset is texts
    assert config.overrides["*.a"]["bits"] == 2
    assert config.modules == {}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("model.layers.0.mlp.down_proj", True),
        ("down_proj", True),
        ("mlp.down_proj", True),
        ("*.down_proj", True),
        ("model.layers.0", True),
        ("layers.0", True),
        ("model.layers.?.mlp.*", True),
        ("proj", False),
        ("layers.00", False),
        ("up_proj", False),
        ("own_proj", False),
    ],
)
def test_patterns_mean_names_ends_parents_and_globs(pattern, expected):
    assert matches("model.layers.0.mlp.down_proj", pattern) is expected


def test_a_later_override_wins():
    config = GuidedQuantConfig(bits=3, overrides={"*.down_proj": {"bits": 4}, "layers.0": {"method": "rtn", "bits": 2}})
    assert config.for_module("model.layers.0.mlp.down_proj") == {"bits": 2, "method": "rtn"}
    assert config.for_module("model.layers.1.mlp.down_proj") == {"bits": 4, "method": "lnq"}
