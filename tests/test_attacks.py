"""What a stranger's checkpoint, or a careless line of ours, could do: none of it may happen."""

import ast
import json
import resource
import shutil
import struct
import traceback
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from conftest import tiny_model, token_rows
from huggingface_hub import ModelCard
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizer import texts, word_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import hf_guidedquant
from hf_guidedquant import GuidedQuantConfig
from hf_guidedquant.errors import CheckpointError, GuidedQuantError

ROOT = Path(__file__).parents[1]
PACKAGE_FILES = sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "triton_kernels").rglob("*.py")])
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# No shrinking: it takes minutes, and the examples are small as they are.
EXAMPLES = settings(
    max_examples=150,
    deadline=10_000,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
MORE_MEMORY = 300  # MiB that all examples of a test together may take beyond the usual


@pytest.fixture(scope="module")
def model():
    return hf_guidedquant.quantize(tiny_model(), GuidedQuantConfig(bits=3, method="squeezellm", dataset=token_rows(4)))


@pytest.fixture(scope="module")
def intact(model, tmp_path_factory) -> Path:
    return hf_guidedquant.save(model, tmp_path_factory.mktemp("intact") / "model")


@pytest.fixture
def folder(intact, tmp_path) -> Path:
    return Path(shutil.copytree(intact, tmp_path / "model"))


@pytest.fixture
def forbid_weights(monkeypatch):
    def reached(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", reached)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.stack(token_rows(1))).logits


def passes_through_us(error: BaseException) -> bool:
    files = [Path(frame.filename).resolve() for frame in traceback.extract_tb(error.__traceback__)]
    return any(file in PACKAGE_FILES for file in files)


def load_or_refuse(folder: Path, expected: torch.Tensor) -> None:
    """The checkpoint loads as the model that was saved, and saves again; or it is refused by a named error.

    What transformers and safetensors refuse before us may be any of their usual errors.
    """
    try:
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        with TemporaryDirectory() as again:
            loaded.save_pretrained(again)
    except GuidedQuantError as error:
        assert len(str(error)) > 20
    except (ValueError, RuntimeError, OSError, SafetensorError) as error:
        if passes_through_us(error):
            raise
    else:
        assert torch.equal(logits(loaded), expected)


def peak_memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(2**31 - 1, 2**80)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["float32", "lnq", "1.9", "F16", "I32", "../..", "²", "9" * 5000]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def _branches(tree, path=()):
    """Paths of all values in a tree of dictionaries and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from _branches(value, (*path, key))


def mutate(data: st.DataObject, tree, spared=()) -> None:
    """One to three values anywhere in the tree become something else, go away, or get a neighbour."""
    for _ in range(data.draw(st.integers(1, 3))):
        *parents, key = data.draw(st.sampled_from([path for path in _branches(tree) if path[0] not in spared]))
        place = tree
        for parent in parents:
            place = place[parent]
        action = data.draw(st.sampled_from(["replace", "delete", "add"]))
        if action == "replace":
            place[key] = data.draw(json_values)
        elif action == "delete":
            del place[key]
        elif isinstance(place, list):
            place.append(data.draw(json_values))
        else:
            place[data.draw(st.text(max_size=8))] = data.draw(json_values)


def split(file: Path) -> tuple[dict, bytes]:
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


@EXAMPLES
@given(data=st.data())
def test_any_config_loads_the_same_model_or_is_refused_by_name(data, folder, intact, model):
    before = peak_memory()
    config = json.loads((intact / "config.json").read_text())
    # Another method's name would test the plugin that owns it.
    mutate(data, config["quantization_config"], spared=["quant_method"])
    (folder / "config.json").write_text(json.dumps(config))
    load_or_refuse(folder, logits(model))
    assert peak_memory() < before + MORE_MEMORY


@EXAMPLES
@given(data=st.data())
def test_any_header_loads_the_same_model_or_is_refused_by_name(data, folder, intact, model):
    before = peak_memory()
    header, content = split(intact / WEIGHTS)
    mutate(data, header)
    encoded = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(encoded)) + encoded + content)
    load_or_refuse(folder, logits(model))
    assert peak_memory() < before + MORE_MEMORY


@EXAMPLES
@given(data=st.data())
def test_flipped_header_bytes_and_cut_files_load_the_same_model_or_are_refused_by_name(data, folder, intact, model):
    before = peak_memory()
    content = bytearray((intact / WEIGHTS).read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    # The length itself is hit in half of the cases.
    position = st.integers(0, 7) | st.integers(8, 7 + length)
    for place in data.draw(st.lists(position, max_size=4)):
        content[place] ^= data.draw(st.integers(1, 255))
    end = data.draw(st.just(len(content)) | st.integers(0, len(content)))
    (folder / WEIGHTS).write_bytes(content[:end])
    load_or_refuse(folder, logits(model))
    assert peak_memory() < before + MORE_MEMORY


# files of a stranger's checkpoint can point anywhere on the disk.
@pytest.mark.parametrize("absolute", [False, True])
def test_an_index_that_points_outside_the_folder_is_refused(absolute, model, tmp_path, forbid_weights):
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    shard = sorted((tmp_path / "shards").glob("*.safetensors"))[0]
    outside = Path(shutil.move(shard, tmp_path / "evil.safetensors"))
    index = json.loads((tmp_path / "shards" / INDEX).read_text())
    name = str(outside) if absolute else "../evil.safetensors"
    index["weight_map"] |= dict.fromkeys(load_file(outside), name)
    (tmp_path / "shards" / INDEX).write_text(json.dumps(index))
    with pytest.raises((CheckpointError, OSError), match="evil"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "shards")


def test_pickled_weights_are_refused(folder, forbid_weights):
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_checkpoint_cannot_name_data_tokenizers_or_patterns(folder, model, monkeypatch):
    def fetched(*args, **kwargs):
        raise AssertionError("loading a checkpoint must not fetch what it names")

    monkeypatch.setattr("hf_guidedquant.pipeline.load_rows", fetched)
    monkeypatch.setattr("hf_guidedquant.pipeline.AutoTokenizer.from_pretrained", fetched)
    config = json.loads((folder / "config.json").read_text())
    run_only = {"dataset": "c4", "tokenizer": "someone/else", "overrides": {"(a+)+$": {"bits": 2}}, "seed": 7}
    config["quantization_config"] |= run_only
    (folder / "config.json").write_text(json.dumps(config))
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    default = GuidedQuantConfig()
    for name in run_only:
        assert getattr(loaded.config.quantization_config, name) == getattr(default, name)
    assert torch.equal(logits(loaded), logits(model))


def test_a_checkpoint_cannot_write_into_the_card_of_a_model_saved_from_it(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["provenance"]["base_model"] = "someone/else\nlicense: injected"
    (folder / "config.json").write_text(json.dumps(config))
    again = hf_guidedquant.save(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "again")
    card = ModelCard.load(again / "README.md")
    assert "guidedquant" in card.data.tags
    assert card.data.license is None


@pytest.mark.parametrize("kind", ["list of texts", "text file", "chats"])
def test_no_saved_file_holds_calibration_texts_or_paths(kind, tmp_path):
    source, words = tmp_path / "CanaryOfTheModel", tmp_path / "CanaryOfTheTokenizer"
    tiny_model().save_pretrained(source)
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    tokenizer.save_pretrained(words)
    secrets = ["CanaryOfTheTexts", *texts()]
    (tmp_path / "CanaryOfTheFile.txt").write_text("\n".join(secrets))
    dataset = {
        "list of texts": secrets,
        "text file": str(tmp_path / "CanaryOfTheFile.txt"),
        "chats": [[{"role": "user", "content": " ".join(secrets)}]],
    }[kind]
    config = GuidedQuantConfig(bits=2, method="squeezellm", dataset=dataset, tokenizer=str(words))
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    result = hf_guidedquant.save(model, tmp_path / "result", AutoTokenizer.from_pretrained(words))
    files = sorted(result.iterdir())
    assert {"config.json", "README.md", "guidedquant_report.json", WEIGHTS} <= {file.name for file in files}
    provenance = model.config.quantization_config.provenance
    assert provenance["calibration"] == kind.removeprefix("list of ")
    assert "base_model" not in provenance
    forbidden = ["Canary", str(tmp_path), texts()[0][:30], texts()[-1][-30:]]
    leaks = [(file.name, secret) for file in files for secret in forbidden if secret.encode() in file.read_bytes()]
    assert leaks == []


BANNED_CALLS = {"eval", "exec", "exit", "quit", "input", "print", "torch.load", "sys.exit", "os._exit"}
BANNED_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def banned(source: str) -> list[str]:
    """What a source file does that a library must not: run data as code, end the process, talk on the terminal."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Name | ast.Attribute):
            names = [ast.unparse(node)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.ExceptHandler) and node.type is None:
            names = ["bare except"]
        what = {*BANNED_CALLS, *BANNED_MODULES, "bare except"}
        found += [f"line {node.lineno}: {n}" for n in names if n in what or n.partition(".")[0] in BANNED_MODULES]
    return found


# Published checkpoints may be pickles, which are read as tensors and nothing else.
READER = ROOT / "src" / "hf_guidedquant" / "weights.py"
READS_PICKLES = {"torch.load", "pickle", "pickle.UnpicklingError"}


@pytest.mark.parametrize("file", PACKAGE_FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_the_package_neither_runs_data_nor_exits_nor_prints(file):
    found = banned(file.read_text(encoding="utf-8"))
    allowed = READS_PICKLES if file == READER else set()
    assert [what for what in found if what.partition(": ")[2] not in allowed] == []


def test_pickles_are_read_in_one_place_and_as_tensors_only():
    calls = [node for node in ast.walk(ast.parse(READER.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    (load,) = [call for call in calls if ast.unparse(call.func) == "torch.load"]
    assert {keyword.arg: ast.unparse(keyword.value) for keyword in load.keywords}["weights_only"] == "True"


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)",
        "from torch import load",
        "import pickle",
        "from pickle import loads",
        "import joblib.memory",
        "eval(text)",
        "run = exec",
        "exit(1)",
        "sys.exit()",
        "input()",
        "print(1)",
        "try:\n    f()\nexcept:\n    pass",
    ],
)
def test_the_ban_finds(source):
    assert banned(source)


def test_the_ban_lets_harmless_code_pass():
    assert banned("model.eval()\nload(path)\n'print(1)'\ntry:\n    f()\nexcept OSError:\n    pass") == []
