"""What is written and printed: nothing of the user's texts, and nothing that a stranger's file smuggles in."""

import json

import pytest
from conftest import tiny_model, token_rows
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tokenizer import texts, word_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from victim import ESCAPE, WEIGHTS, change_settings

import hf_guidedquant
from hf_guidedquant import GuidedQuantConfig, errors
from hf_guidedquant.cli import main

pytest_plugins = ["victim"]  # intact, folder, forbid_weights

MARKUP = "<img src=x> [click](http://x.example) ![x](http://x.example) | `code` www.x.example"


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
    folders = {"run_dir": tmp_path / "CanaryRun", "statistics": tmp_path / "CanaryStatistics"}
    config = GuidedQuantConfig(bits=2, method="squeezellm", dataset=dataset, tokenizer=str(words), **folders)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    result = hf_guidedquant.save(model, tmp_path / "result", AutoTokenizer.from_pretrained(words))
    files = sorted(result.iterdir())
    assert {"config.json", "README.md", "guidedquant_report.json", WEIGHTS} <= {file.name for file in files}
    provenance = model.config.quantization_config.provenance
    assert provenance["calibration"] == kind.removeprefix("list of ")
    assert "base_model" not in provenance
    files += [file for kept in folders.values() for file in kept.rglob("*") if file.is_file()]
    forbidden = ["Canary", str(tmp_path), texts()[0][:30], texts()[-1][-30:]]
    leaks = [(file.name, secret) for file in files for secret in forbidden if secret.encode() in file.read_bytes()]
    assert leaks == []


@pytest.mark.parametrize(
    "base", ["someone/else\nlicense: injected", "a/b](http://x)", "../..|x", "\uff45vil/x", "x" * 200]
)
def test_a_checkpoint_cannot_write_into_the_metadata_of_a_card(base, folder, tmp_path):
    change_settings(folder, provenance={"base_model": base, "source": base})
    again = hf_guidedquant.save(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "again")
    card = ModelCard.load(again / "README.md")
    assert "guidedquant" in card.data.tags
    assert card.data.license is None and card.data.base_model is None
    assert base not in card.text


@pytest.mark.parametrize("text", [MARKUP, "texts\n\n# Run this", "x" * 1000, "a: b\n---\nlicense: mit"])
@pytest.mark.parametrize("key", ["calibration", "sha256"])
def test_a_checkpoint_cannot_write_markup_into_a_card(key, text, folder, tmp_path):
    provenance = {"calibration": "texts", "sha256": "0" * 64, "rows": 1, "tokens": 2, "seed": 3}
    change_settings(folder, provenance=provenance)
    card = hf_guidedquant.save(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "plain") / "README.md"
    assert "texts: 1 rows" in card.read_text()
    change_settings(folder, provenance={**provenance, key: text})
    card = hf_guidedquant.save(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "again") / "README.md"
    assert "1 rows" not in card.read_text() and text[:12] not in card.read_text()


def test_names_in_a_file_cannot_write_on_the_terminal(folder, capsys):
    save_file(load_file(folder / WEIGHTS) | {ESCAPE: token_rows(1)[0]}, folder / WEIGHTS)
    assert main(["inspect", str(folder)]) == 1
    message = capsys.readouterr().err
    assert "gone" in message and message.removesuffix("\n").isprintable()


def test_settings_cannot_write_on_the_terminal(folder, capsys):
    change_settings(folder, provenance={ESCAPE: ESCAPE, "base_model": "\ud800"})
    assert main(["inspect", str(folder)]) == 0
    assert all(line.isprintable() for line in capsys.readouterr().out.splitlines())


def test_every_error_is_one_printable_line():
    for error in (errors.CheckpointError(ESCAPE), errors.TensorMismatchError([ESCAPE], ["\ud800"], [])):
        assert (str(error).isprintable() and "[guidedquant] all is well" in str(error)) or "ud800" in str(error)
    long = errors.ConfigError("bits", json.loads("[" + "9," * 10**5 + "9]"), "an integer")
    assert len(str(long)) < 400 and str(long).endswith("it must be an integer.")
