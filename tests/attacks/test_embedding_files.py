"""Embeddings and heads in a stranger's checkpoint: one copy that fits both, or a refusal by name."""

import functools
import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_model, token_rows
from hypothesis import given
from hypothesis import strategies as st
from mutation import EXAMPLES, bounded_memory, join, mutate, split
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from victim import WEIGHTS, change_config, change_settings, logits, nothing_but_named_errors

import hf_guidedquant
from hf_guidedquant import GuidedQuantConfig
from hf_guidedquant.errors import CheckpointError, ConfigError, NonFiniteTensorError, TensorMismatchError
from hf_guidedquant.inspection import inspect

pytest_plugins = ["victim"]  # intact, folder, forbid_weights

EMBEDDINGS, HEAD = "model.embed_tokens", "lm_head"


@functools.cache
def tied():
    config = GuidedQuantConfig(bits=3, embedding_bits=4, method="squeezellm", dataset=token_rows(4))
    return hf_guidedquant.quantize(tiny_model("llama-tied"), config)


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> Path:
    return hf_guidedquant.save(tied(), tmp_path_factory.mktemp("tied") / "model")


def change_tensors(folder: Path, **changes) -> None:
    """Replace or add tensors, ``__`` in a name for a dot; None takes one away."""
    tensors = load_file(folder / WEIGHTS) | {key.replace("__", "."): value for key, value in changes.items()}
    save_file({key: value for key, value in tensors.items() if value is not None}, folder / WEIGHTS, {"format": "pt"})


def change_modules(folder: Path, **changes) -> None:
    """Set entries of modules; None takes one away."""
    modules = json.loads((folder / "config.json").read_text())["quantization_config"]["modules"]
    modules |= {key.replace("__", "."): value for key, value in changes.items()}
    change_settings(folder, modules={key: value for key, value in modules.items() if value is not None})


@EXAMPLES
@given(data=st.data())
def test_any_header_loads_the_same_model_or_is_refused_by_name(data, folder, intact):
    header, content = split(intact / WEIGHTS)
    mutate(data, header, spared={name for name in header if "layers" in name})
    (folder / WEIGHTS).write_bytes(join(header, content))
    with bounded_memory(), nothing_but_named_errors(WEIGHTS, "The checkpoint does not hold"):
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(tied()))


@EXAMPLES
@given(data=st.data())
def test_any_entry_of_the_config_loads_or_is_refused_by_name(data, folder, intact):
    modules = json.loads((intact / "config.json").read_text())["quantization_config"]["modules"]
    entries = {name: modules[name] for name in (EMBEDDINGS, HEAD)}
    mutate(data, entries)
    rest = {name: value for name, value in modules.items() if name not in (EMBEDDINGS, HEAD)}
    change_settings(folder, modules=rest | entries)
    with bounded_memory(), nothing_but_named_errors():
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(tied()))


@pytest.mark.parametrize(
    "changes",
    [
        {"lm_head": None},
        {"model__embed_tokens": None},
        {"lm_head": {"bits": 3}},
        {"lm_head": {"bits": 4, "lut_dtype": "float32"}},
    ],
)
def test_one_copy_must_fit_both(changes, folder):
    change_modules(folder, **changes)
    for read in (AutoModelForCausalLM.from_pretrained, inspect):
        with pytest.raises(CheckpointError, match="lm_head are tied"):
            read(folder)


@pytest.mark.parametrize("key", ["weight", "lut", "scale"])
def test_missing_tensors_are_named(key, folder):
    change_tensors(folder, **{f"model__embed_tokens__{key}": None})
    with pytest.raises(TensorMismatchError, match=f"embed_tokens.{key}"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("key", "tensor"),
    [
        ("weight", torch.zeros(4, 127, 2, dtype=torch.int32)),
        ("weight", torch.zeros(4, 128, 2, dtype=torch.float32)),
        ("lut", torch.zeros(128, 8, dtype=torch.float16)),
        ("lut", torch.zeros(128, 16)),
        ("scale", torch.ones(1)),
        ("scale", torch.ones((), dtype=torch.int64)),
    ],
)
def test_wrong_shapes_and_dtypes_are_named(key, tensor, folder):
    change_tensors(folder, **{f"model__embed_tokens__{key}": tensor})
    for read in (AutoModelForCausalLM.from_pretrained, inspect):
        with pytest.raises(TensorMismatchError, match=f"embed_tokens.{key}"):
            read(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["lut", "scale"])
def test_nan_and_infinity_are_refused(key, value, folder):
    tensor = load_file(folder / WEIGHTS)[f"{EMBEDDINGS}.{key}"].clone()
    tensor.view(-1)[0] = value
    change_tensors(folder, **{f"model__embed_tokens__{key}": tensor})
    with pytest.raises(NonFiniteTensorError, match=EMBEDDINGS):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("keys", [["weight", "lut"], ["weight"], ["lut"]])
def test_a_head_of_its_own_beside_tied_embeddings(keys, folder):
    """Transformers then believes the file and unties what differs; nothing reads another module's tensors."""
    tensors = load_file(folder / WEIGHTS)
    ours = {"weight": tensors[f"{EMBEDDINGS}.weight"].flip(1), "lut": tensors[f"{EMBEDDINGS}.lut"].flip(0)}
    change_tensors(folder, **{f"lm_head__{key}": ours[key].clone() for key in keys})
    with nothing_but_named_errors():
        model = AutoModelForCausalLM.from_pretrained(folder)
        head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
        for key in ("weight", "lut"):
            assert torch.equal(getattr(embeddings, key), tensors[f"{EMBEDDINGS}.{key}"])
            assert torch.equal(getattr(head, key), ours[key] if key in keys else tensors[f"{EMBEDDINGS}.{key}"])


def test_only_the_input_embeddings_can_be_quantized_ones(tmp_path):
    model = hf_guidedquant.quantize(tiny_model("gpt2"), GuidedQuantConfig(bits=3, method="rtn", guided=False))
    folder = hf_guidedquant.save(model, tmp_path / "model")
    change_modules(folder, transformer__wpe={"bits": 3})
    with pytest.raises(CheckpointError, match="wpe is quantized in the checkpoint, but a Embedding here"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("sizes", [{"vocab_size": 129}, {"hidden_size": 96}, {"tie_word_embeddings": False}])
def test_another_shape_than_the_config_promises(sizes, folder):
    change_config(folder, lambda config: config.update(sizes))
    with pytest.raises((CheckpointError, ConfigError, ValueError)):
        inspect(folder)
