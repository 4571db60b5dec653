"""Published any-precision checkpoints, written here by a small writer of its own, and what is read from them."""

import json
import os
import re
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_model, token_rows
from hub_server import HubServer
from safetensors.torch import load_file, save_file
from tokenizer import word_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
)

import hf_guidedquant
from hf_guidedquant import errors
from hf_guidedquant.cli import main
from hf_guidedquant.formats.any_precision import bit_planes
from hf_guidedquant.inspection import inspect
from hf_guidedquant.nn import quantized_modules
from hf_guidedquant.triton_kernels import unpack_codes

WIDTHS = (2, 3, 4)
MODULES = [
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
]
LAYER = "model.layers.1.mlp.up_proj"
LOADED = torch.stack(token_rows(2))


def words_of(codes: np.ndarray, planes: int) -> torch.Tensor:
    """Codes ``[N, K]`` as the published format has them, weight by weight: int32 ``[planes, N, K / 32]``."""
    rows, inputs = codes.shape
    words = np.zeros((planes, rows, inputs // 32), dtype=np.uint32)
    whole = inputs // 1024
    for k in range(inputs):
        block = k // 1024
        per_block, rest = (32, k % 1024) if block < whole else ((inputs % 1024) // 32, k - 1024 * whole)
        byte, word, bit = rest // (8 * per_block), rest % (8 * per_block) // 8, rest % 8
        for plane in range(planes):
            value = (codes[:, k] >> (planes - 1 - plane)) & 1
            words[plane, :, 32 * block + word] |= value.astype(np.uint32) << np.uint32(31 - 8 * byte - bit)
    return torch.from_numpy(words.view(np.int32))


class Published:
    """A dense model as a published checkpoint of random codes and codebooks, and what it stands for at every width."""

    def __init__(self, model, blocks="model.layers", names=lambda name: name, widths=WIDTHS, dtype=None):
        random = np.random.default_rng(0)
        self.model, self.widths = model if dtype is None else model.to(dtype), widths
        self.tensors = {names(name): tensor for name, tensor in self.model.state_dict().items()}
        if self.model.config.get_text_config().tie_word_embeddings:
            del self.tensors[names("lm_head.weight")]
        self.codes, self.codebooks = {}, {}
        for block in range(2):
            for module in MODULES:
                layer = f"{blocks}.{block}.{module}"
                rows, inputs = self.tensors.pop(f"{layer}.weight").shape
                codes = random.integers(0, 2 ** widths[-1], (rows, inputs), dtype=np.uint8)
                self.codes[layer] = codes
                self.tensors[f"{layer}.qweight"] = words_of(codes, widths[-1])
                for bits in widths:
                    lut = random.normal(0, 0.1, (rows, 2**bits)).astype(np.float16)
                    self.codebooks[layer, bits] = lut
                    self.tensors[f"{layer}.lut{bits}"] = torch.from_numpy(lut)
        model_name, _, layers_name = blocks.rpartition(".")
        self.settings = {
            "seed_precision": widths[0],
            "parent_precision": widths[-1],
            "group_count": 1,
            "arch_config": {"module_names": MODULES, "model_name": model_name, "layers_name": layers_name},
        }

    def dense(self, layer: str, bits: int) -> torch.Tensor:
        """The weight of a layer, entry by entry."""
        codes, lut = self.codes[layer] >> (self.widths[-1] - bits), self.codebooks[layer, bits]
        return torch.tensor([[lut[row, code] for code in codes[row]] for row in range(len(codes))])

    def reference(self, bits: int, names=lambda name: name):
        """The dense model with exactly those weights."""
        with torch.no_grad():
            for layer in self.codes:
                self.model.get_submodule(names(layer)).weight.copy_(self.dense(layer, bits))
        return self.model

    def write(self, folder: Path, kind: str = "safetensors") -> Path:
        folder.mkdir()
        self.model.config.architectures = [type(self.model).__name__]
        self.model.config.dtype = self.model.dtype
        config = {**self.model.config.to_dict(), "anyprec": self.settings, "_name_or_path": "/home/someone/model"}
        (folder / "config.json").write_text(json.dumps(config))
        self.model.generation_config.save_pretrained(folder)
        word_tokenizer().save_pretrained(folder)
        (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
        (folder / "LICENSE.txt").write_text("terms")
        (folder / "modeling_custom.py").write_text("raise AssertionError")
        write_tensors(self.tensors, folder, kind)
        return folder


def write_tensors(tensors: dict, folder: Path, kind: str) -> None:
    suffix = "safetensors" if "safetensors" in kind else "bin"
    stem = {"safetensors": "model", "bin": "pytorch_model"}[suffix]

    def write(part, file):
        part = {name: tensor.contiguous() for name, tensor in part.items()}
        if suffix == "bin":
            torch.save(part, file, _use_new_zipfile_serialization="legacy" not in kind)
        else:
            save_file(part, file)

    if "shards" not in kind:
        write(tensors, folder / f"{stem}.{suffix}")
        return
    names = {f"{stem}-0000{part}-of-00003.{suffix}": list(tensors)[part - 1 :: 3] for part in (1, 2, 3)}
    for file, part in names.items():
        write({name: tensors[name] for name in part}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in names.items() for name in part}}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(LOADED).logits


@pytest.fixture(scope="module")
def published():
    return Published(tiny_model("llama"))


@pytest.fixture(scope="module")
def intact(published, tmp_path_factory):
    return published.write(tmp_path_factory.mktemp("published") / "model")


@pytest.fixture
def folder(intact, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(intact, tmp_path / "model"))


def test_the_worked_example_of_the_format():
    codes = torch.zeros(1, 64, dtype=torch.uint8)
    codes[0, :8] = torch.tensor([0, 1, 2, 3, 3, 2, 1, 0])
    codes[0, 8:16], codes[0, 16], codes[0, 63] = 3, 1, 2
    words = np.array([[[0x3C000000, 0xFF000001]], [[0x5A800000, 0xFF000000]]], dtype=np.uint32)
    qweight = torch.from_numpy(words.view(np.int32))
    assert torch.equal(words_of(codes.numpy(), 2), qweight)
    assert torch.equal(unpack_codes(bit_planes(qweight, 2), 64), codes)


@pytest.mark.parametrize("inputs", [32, 96, 992, 1024, 1056, 2048, 3008])
@pytest.mark.parametrize("planes", [1, 3, 8])
def test_codes_are_read_at_any_size_and_width(inputs, planes):
    codes = np.random.default_rng(inputs).integers(0, 2**planes, (3, inputs), dtype=np.uint8)
    qweight = words_of(codes, planes)
    for bits in range(1, planes + 1):
        found = unpack_codes(bit_planes(qweight, bits), inputs)
        assert np.array_equal(found.numpy(), codes >> (planes - bits))


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "qwen3", "gemma3"])
@pytest.mark.parametrize("bits", [*WIDTHS, None])
def test_the_model_is_the_dense_one_with_these_weights(architecture, bits, tmp_path):
    published = Published(tiny_model(architecture))
    source = published.write(tmp_path / "published")
    out = hf_guidedquant.convert(source, tmp_path / "out", bits)
    bits = bits or WIDTHS[-1]
    model, layers = AutoModelForCausalLM.from_pretrained(out), inspect(out, verify=True).layers
    assert [(layer.name, layer.bits) for layer in layers] == [(name, bits) for name in published.codes]
    for name, module in quantized_modules(model).items():
        assert torch.equal(module.lut, torch.from_numpy(published.codebooks[name, bits]))
        assert torch.equal(module.dequantize(), published.dense(name, bits))
    # Products of the same fp32 weights, in the same order.
    assert torch.equal(logits(model), logits(published.reference(bits)))
    generated = model.generate(LOADED, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert torch.equal(generated, published.model.generate(LOADED, max_new_tokens=4, min_new_tokens=4, do_sample=False))


def on_disk(name: str) -> str:
    """The historical names of a Gemma 3 that also sees."""
    text = {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head."}
    for new, old in text.items():
        if name.startswith(new):
            return old + name.removeprefix(new)
    return name.removeprefix("model.")


def in_memory(name: str) -> str:
    return name.replace("language_model.model.", "model.language_model.")


def test_names_that_differ_on_disk(tmp_path):
    text = tiny_model("gemma3").config
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision)).eval()
    published = Published(model, "language_model.model.layers", on_disk)
    out = hf_guidedquant.convert(published.write(tmp_path / "published"), tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert list(quantized_modules(loaded)) == [in_memory(name) for name in published.codes]
    assert torch.equal(logits(loaded), logits(published.reference(4, in_memory)))


@pytest.mark.parametrize("kind", ["safetensors", "safetensors shards", "bin", "bin shards", "bin legacy"])
def test_every_kind_of_file_gives_the_same_bytes(kind, published, intact, tmp_path):
    expected = hf_guidedquant.convert(intact, tmp_path / "expected")
    out = hf_guidedquant.convert(published.write(tmp_path / "published", kind), tmp_path / "out")
    wanted, found = load_file(expected / "model.safetensors"), load_file(out / "model.safetensors")
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert (out / "config.json").read_bytes() == (expected / "config.json").read_bytes()
    assert not list(out.glob("*.bin*"))


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_tensors_that_are_not_quantized_stay_bit_for_bit(kind, tmp_path):
    published = Published(tiny_model("llama"), dtype=torch.bfloat16)
    out = hf_guidedquant.convert(published.write(tmp_path / "published", kind), tmp_path / "out", max_shard_size="40KB")
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 1
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    others = {name: tensor for name, tensor in published.tensors.items() if "qweight" not in name and "lut" not in name}
    assert {name for name in others if name.endswith("bias")}
    for name, tensor in others.items():
        assert found[name].dtype == torch.bfloat16 and torch.equal(found[name], tensor), name
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.get_submodule(LAYER).lut, torch.from_numpy(published.codebooks[LAYER, 4]))


@pytest.mark.parametrize("kind", ["safetensors", "bin shards"])
def test_memory_holds_one_file_of_the_result(kind, published, tmp_path, monkeypatch):
    alive, files = [], []

    def save(tensors, file, metadata):
        assert all(tensor() is None for tensor in alive)
        alive.extend(map(weakref.ref, tensors.values()))
        files.append(sum(tensor.nbytes for tensor in tensors.values()))
        save_file(tensors, file, metadata)

    monkeypatch.setattr("hf_guidedquant.weights.save_file", save)
    hf_guidedquant.convert(published.write(tmp_path / "published", kind), tmp_path / "out", max_shard_size=40_000)
    assert len(files) > 2 and max(files) <= 40_000


def test_what_goes_along_and_what_does_not(intact, tmp_path):
    out = hf_guidedquant.convert(intact, tmp_path / "out")
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja", "LICENSE.txt"):
        assert (out / name).read_bytes() == (intact / name).read_bytes()
    assert not list(out.rglob("*.py"))
    assert AutoTokenizer.from_pretrained(out).chat_template == "{{ messages[0]['content'] }}"
    config = json.loads((out / "config.json").read_text())
    assert "anyprec" not in config and "_name_or_path" not in config
    settings = config["quantization_config"]
    assert (settings["bits"], settings["method"], settings["guided"]) == (4, "converted", False)
    assert settings["provenance"]["format"] == "any-precision" and settings["provenance"]["widths"] == [2, 3, 4]
    assert "import hf_guidedquant" in (out / "README.md").read_text()
    forbidden = [str(tmp_path).encode(), str(intact).encode(), b"/home/someone"]
    assert not [file.name for file in out.iterdir() for path in forbidden if path in file.read_bytes()]


def test_a_converted_model_saves_and_loads_again(intact, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(hf_guidedquant.convert(intact, tmp_path / "out", 2))
    again = hf_guidedquant.save(model, tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(again)), logits(model))
    assert "converted from the any-precision format" in (again / "README.md").read_text()


def test_two_names_of_one_tensor_in_a_pickle(tmp_path):
    published = Published(tiny_model("llama-tied"))
    published.tensors["lm_head.weight"] = published.tensors["model.embed_tokens.weight"]
    out = hf_guidedquant.convert(published.write(tmp_path / "published", "bin"), tmp_path / "out")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out)), logits(published.reference(4)))


def test_what_older_versions_saved_is_left_out(folder, tmp_path):
    edit_tensors(
        folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    )
    out = hf_guidedquant.convert(folder, tmp_path / "out")
    assert not [name for name in load_file(out / "model.safetensors") if "inv_freq" in name]


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder: Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def refused(folder: Path, out: Path, error, *told: str, bits=None):
    """The error of a conversion that must fail, leave nothing behind, and tell this."""
    with pytest.raises(error) as caught:
        hf_guidedquant.convert(folder, out, bits)
    assert type(caught.value) is error
    assert all(text in str(caught.value) for text in told), str(caught.value)
    assert not out.exists() and not list(out.parent.glob(".*"))
    return caught.value


QWEIGHT, LUT = f"{LAYER}.qweight", f"{LAYER}.lut4"


@pytest.mark.parametrize("name", [QWEIGHT, LUT, f"{LAYER}.bias", "model.norm.weight", "lm_head.weight"])
def test_a_missing_tensor_is_named(name, folder, tmp_path):
    edit_tensors(folder, lambda tensors: tensors.pop(name))
    error = refused(folder, tmp_path / "out", errors.TensorMismatchError, f"missing: {name}", "Download")
    assert error.missing == [name]


@pytest.mark.parametrize("name", [f"{LAYER}.weight", "model.layers.2.mlp.up_proj.qweight", f"{LAYER}.lut5", "surplus"])
def test_a_tensor_too_many_is_named(name, folder, tmp_path):
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(2)}))
    refused(folder, tmp_path / "out", errors.TensorMismatchError, f"not expected: {name}")


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        (QWEIGHT, lambda tensor: tensor[:3], "expected int32 [4, 96, 2], got int32 [3, 96, 2]"),
        (QWEIGHT, lambda tensor: tensor[:, :, :1], "got int32 [4, 96, 1]"),
        (QWEIGHT, lambda tensor: tensor.long(), "got int64"),
        # Codes beyond the codebook: there are fewer entries than the planes can count.
        (LUT, lambda tensor: tensor[:, :15], "expected float16 [96, 16], got float16 [96, 15]"),
        (LUT, lambda tensor: tensor.float(), "got float32"),
        (LUT, lambda tensor: tensor[None], "got float16 [1, 96, 16]"),
        ("model.norm.weight", lambda tensor: tensor[:-1], "expected float32 [64], got float32 [63]"),
        ("model.norm.weight", lambda tensor: tensor.int(), "got int32"),
    ],
)
def test_a_wrong_shape_or_dtype_is_told_with_the_right_one(name, change, told, folder, tmp_path):
    edit_tensors(folder, lambda tensors: tensors.update({name: change(tensors[name]).contiguous()}))
    refused(folder, tmp_path / "out", errors.TensorMismatchError, name, told)


@pytest.mark.parametrize("name", [LUT, f"{LAYER}.bias", "model.embed_tokens.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(name, value, folder, tmp_path):
    edit_tensors(folder, lambda tensors: tensors[name][3].fill_(value))
    refused(folder, tmp_path / "out", errors.NonFiniteTensorError, name)


def test_codebooks_of_other_widths_do_not_matter(folder, tmp_path):
    edit_tensors(folder, lambda tensors: tensors.pop(LUT))
    hf_guidedquant.convert(folder, tmp_path / "out", 2)


@pytest.mark.parametrize("bits", [1, 5, 0, -1, 2**31, True, "3", 3.0])
def test_bits_that_it_does_not_hold(bits, intact, tmp_path):
    refused(intact, tmp_path / "out", errors.UnavailableBitsError, repr(bits), "2, 3, 4", bits=bits)


@pytest.mark.parametrize(
    "key", ["anyprec", *(f"anyprec.{key}" for key in ("seed_precision", "parent_precision", "arch_config"))]
)
@pytest.mark.parametrize("value", [None, "x", [1], True, -1, 9])
def test_a_config_key_that_is_missing_or_wrong(key, value, folder, tmp_path):
    def change(config):
        *parents, last = key.split(".")
        for parent in parents:
            config = config[parent]
        config[last] = value
        if value is None:
            del config[last]

    edit_config(folder, change)
    error = refused(folder, tmp_path / "out", errors.AnyPrecisionConfigError, key, "must be")
    assert error.key == key and error.value == value


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        (lambda c: c["anyprec"].update(group_count=2), errors.AnyPrecisionConfigError, "group_count is 2"),
        (lambda c: c["anyprec"]["arch_config"].pop("model_name"), errors.AnyPrecisionConfigError, "model_name is miss"),
        (
            lambda c: c["anyprec"]["arch_config"].update(module_names=[3]),
            errors.AnyPrecisionConfigError,
            "module_names",
        ),
        (
            lambda c: c["anyprec"]["arch_config"].update(layers_name="blocks"),
            errors.AnyPrecisionConfigError,
            "LlamaForCausalLM has no model.blocks.0.self_attn.q_proj",
        ),
        (lambda c: c["anyprec"].update(seed_precision=5), errors.AnyPrecisionConfigError, "from seed_precision = 5"),
        (lambda c: c.update(quantization_config={"bits": 4}), errors.AnyPrecisionConfigError, "must be absent"),
        (lambda c: c.update(architectures=["Strange"]), errors.UnknownArchitectureError, "no model class 'Strange'"),
        (lambda c: c.update(model_type="strange"), errors.CheckpointError, "strange"),
        (lambda c: c.update(hidden_size=40, head_dim=8), errors.CheckpointError, "40 inputs"),
        (lambda c: c.update(num_hidden_layers=3), errors.TensorMismatchError, "missing: model.layers.2"),
    ],
)
def test_a_config_that_does_not_fit(change, error, told, folder, tmp_path):
    edit_config(folder, change)
    refused(folder, tmp_path / "out", error, told)


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000])
def test_a_config_that_is_none(content, folder, tmp_path):
    (folder / "config.json").write_text(content)
    refused(folder, tmp_path / "out", errors.CheckpointError, "config.json")


class Code:
    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return os.mkdir, (self.file,)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_with_code_is_refused_and_not_run(legacy, folder, tmp_path):
    (folder / "model.safetensors").unlink()
    contents = {"x": Code(tmp_path / "ran")}
    torch.save(contents, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    refused(folder, tmp_path / "out", errors.UnsafeFileError, "pytorch_model.bin", "posix.mkdir", "safetensors")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("contents", "told"),
    [
        ([torch.zeros(2)], "holds a list"),
        ({"x": 3}, "'x' is no dense tensor"),
        ({3: torch.zeros(2)}, "3 is no dense tensor"),
        ({"x": torch.zeros(2).to_sparse()}, "'x' is no dense tensor"),
        ({"x": torch.zeros(1).expand(2**40)}, "'x' is no dense tensor"),
    ],
)
def test_a_pickle_that_holds_something_else(contents, told, folder, tmp_path):
    (folder / "model.safetensors").unlink()
    torch.save(contents, folder / "pytorch_model.bin")
    refused(folder, tmp_path / "out", errors.CheckpointError, told)


@pytest.mark.parametrize("kind", ["safetensors", "bin", "bin legacy", "bin shards", "safetensors shards"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_a_truncated_file_is_named(kind, share, published, tmp_path):
    folder = published.write(tmp_path / "published", kind)
    file = sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin"))[-1]
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
    with pytest.raises((errors.DamagedFileError, errors.UnsafeFileError), match=re.escape(file.name)):
        hf_guidedquant.convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["bin", "bin legacy"])
def test_a_damaged_pickle_is_converted_or_refused_by_name(kind, published, tmp_path):
    folder, random = published.write(tmp_path / "published", kind), np.random.default_rng(0)
    file = folder / "pytorch_model.bin"
    intact, refusals = file.read_bytes(), 0
    for attempt in range(60):
        content = bytearray(intact)
        # Headers and pickles stand at the ends.
        for place in random.integers(-5000, 5000, 3):
            content[place] ^= random.integers(1, 256)
        file.write_bytes(content)
        try:
            hf_guidedquant.convert(folder, tmp_path / str(attempt))
        except errors.CheckpointError as error:
            assert "ownload" in str(error) or "pytorch_model.bin" in str(error)
            refusals += 1
    assert refusals > 20


@pytest.mark.parametrize("kind", ["safetensors shards", "bin shards"])
@pytest.mark.parametrize("absolute", [False, True])
def test_an_index_that_points_outside_is_refused(kind, absolute, published, tmp_path):
    folder = published.write(tmp_path / "published", kind)
    shard = sorted(folder.glob("*-00001-of-*"))[0]
    outside = shutil.move(shard, tmp_path / shard.name)
    (index,) = folder.glob("*.index.json")
    name = str(outside) if absolute else f"../{shard.name}"
    index.write_text(index.read_text().replace(shard.name, name))
    refused(folder, tmp_path / "out", errors.UnsafeFileError, shard.name, "outside the model's folder")


def test_a_missing_shard_is_named(published, tmp_path):
    folder = published.write(tmp_path / "published", "bin shards")
    shard = sorted(folder.glob("*.bin"))[1]
    shard.unlink()
    refused(folder, tmp_path / "out", errors.CheckpointError, shard.name, "missing")


def test_a_folder_without_a_model_and_a_name_that_is_none(intact, tmp_path):
    refused(tmp_path, tmp_path / "out", errors.CheckpointError, "no config.json")
    (tmp_path / "config.json").write_text((intact / "config.json").read_text())
    refused(tmp_path, tmp_path / "out", errors.CheckpointError, "neither model.safetensors nor", "pytorch_model.bin")
    refused("no such/folder/here", tmp_path / "out", errors.CheckpointError, "no folder", "Hub")


def test_a_filled_output_folder_is_refused(intact, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(errors.OutputFolderError):
        hf_guidedquant.convert(intact, tmp_path)


def test_the_command(capsys, intact, tmp_path):
    assert main(["convert", str(intact), str(tmp_path / "out"), "--bits", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(inspect(tmp_path / "out").to_dict()))
    assert main(["convert", str(intact), str(tmp_path / "other"), "--bits", "3"]) == 0
    assert capsys.readouterr().out == f"{inspect(tmp_path / 'out').table()}\nSaved in {tmp_path / 'other'}.\n"
    assert main(["convert", str(intact), str(tmp_path / "third"), "--bits", "7"]) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("UnavailableBitsError: ")


@pytest.mark.parametrize("kind", ["safetensors shards", "bin"])
def test_a_repository_of_the_hub(kind, published, tmp_path):
    folder = published.write(tmp_path / "published", kind)
    (folder / "other.txt").write_text("not needed")
    with HubServer() as hub:
        hub.add_folder("someone/published", folder)
        command = [
            sys.executable,
            "-m",
            "hf_guidedquant",
            "convert",
            "someone/published",
            str(tmp_path / "out"),
            "--json",
        ]
        environment = hub.environment(tmp_path / "home")
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
        assert done.returncode == 0, done.stderr
        fetched = {path.rpartition("/")[2] for method, path in hub.log if "/resolve/" in path}
        commit = hub.find("someone/published").resolve("main")
    assert not fetched & {"other.txt", "modeling_custom.py"}
    provenance = json.loads(done.stdout)["settings"]["provenance"]
    assert (provenance["source"], provenance["commit"]) == ("someone/published", commit)
    assert (
        "converted from [someone/published](https://huggingface.co/someone/published) with hf-guidedquant"
        in (tmp_path / "out" / "README.md").read_text()
    )
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(published.reference(4)))


def test_no_weights_are_fetched_of_another_kind_of_model(folder, tmp_path):
    edit_config(folder, lambda config: config.pop("anyprec"))
    with HubServer() as hub:
        hub.add_folder("someone/other", folder)
        command = [sys.executable, "-m", "hf_guidedquant", "convert", "someone/other", str(tmp_path / "out")]
        done = subprocess.run(
            command, capture_output=True, text=True, env=hub.environment(tmp_path / "home"), timeout=120
        )
        asked = [path for _, path in hub.log]
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("AnyPrecisionConfigError: ")
    assert any("config.json" in path for path in asked) and not any("model.safetensors" in path for path in asked)
