"""The model card: metadata that the Hub reads, facts, and a snippet that runs."""

import re
import subprocess
import sys

import pytest
from conftest import tiny_model, token_rows
from huggingface_hub import ModelCard
from tokenizer import word_tokenizer
from transformers import AutoModelForCausalLM

import hf_guidedquant
from hf_guidedquant import GuidedQuantConfig, card


def quantized(**settings):
    return hf_guidedquant.quantize(tiny_model(), GuidedQuantConfig(**{"bits": 3, "dataset": token_rows(), **settings}))


def with_base(model, base):
    model.config.quantization_config.provenance["base_model"] = base
    return model


def model_card(model, name, tags=()):
    return card.model_card(model.config.quantization_config.to_dict(), name, tags, model)


def facts(made):
    return dict(re.findall(r"^\| ([^|]+) \| (.*) \|$", made.text, re.MULTILINE))


def test_the_hub_reads_the_metadata():
    made = model_card(with_base(quantized(), "me/base"), "me/base-3bit", ["mine", "3-bit"])
    assert made.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "me/base",
        "base_model_relation": "quantized",
        "tags": ["guidedquant", "3-bit", "mine"],
    }
    assert "# base-3bit\n" in made.text and "from [me/base](https://huggingface.co/me/base)" in made.text


@pytest.mark.parametrize("base", ["1e5", "null", "yes", "2024-01-01"])
def test_names_that_yaml_would_misread_stay_names(base):
    made = ModelCard(str(model_card(with_base(quantized(), base), "x", ["no", "a: b", "- c"])))
    assert made.data.base_model == base
    assert made.data.tags[-3:] == ["no", "a: b", "- c"]


@pytest.mark.parametrize("base", [None, 7, "someone/else\nlicense: mit", "../up/there", ""])
def test_without_a_base_nothing_is_said_of_one(base):
    assert "base_model" not in model_card(with_base(quantized(), base), "x").data.to_dict()


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({}, "LNQ, guided by the end loss"),
        ({"guided": False}, "LNQ"),
        ({"method": "squeezellm"}, "SqueezeLLM (weighted k-means), guided by the end loss"),
        ({"method": "rtn"}, "round to nearest"),
        ({"method": "gptq", "guided": False, "distill": True}, "GPTQ, codebooks distilled"),
        ({"guided": False, "reconstruct": True, "distill": True}, "LNQ, blocks reconstructed, codebooks distilled"),
        ({"guided": False, "reconstruct": {"codes": False}}, "LNQ, codebooks reconstructed block by block"),
    ],
)
def test_the_table_tells_how_the_model_was_made(settings, method):
    model = quantized(**settings)
    told = facts(model_card(model, "x"))
    report = model.quantization_report
    assert told["method"].partition(" ([")[0] == method
    assert told["bits per weight"] == f"{report.bits_per_weight:.3f} in 14 linear layers, codebooks included"
    before, after = (f"{size / 1e6:,.1f} MB" for size in (report.dense_bytes, report.quantized_bytes))
    assert told["size"] == f"{after} (before: {before})"
    assert ("calibration" in told) == (settings.get("method") != "rtn")
    if "calibration" in told:
        sha256 = model.config.quantization_config.provenance["sha256"]
        assert told["calibration"] == f"token rows: 8 rows, 264 tokens (sha256 `{sha256[:16]}…`), seed 0"


def test_what_was_measured_is_told(tmp_path):
    model = quantized()
    model.quantization_report.measured |= {"perplexity on held-out text": 23.123456, "note": "two\nlines | here"}
    told = (hf_guidedquant.save(model, tmp_path / "m") / "README.md").read_text(encoding="utf-8")
    assert "| perplexity on held-out text | 23.123 |\n" in told
    assert "| note | two lines \\| here |\n" in told


def test_a_loaded_model_tells_its_size_too(tmp_path):
    model = quantized()
    again = AutoModelForCausalLM.from_pretrained(hf_guidedquant.save(model, tmp_path / "m"))
    first, second = (facts(model_card(m, "x")) for m in (model, again))
    assert second == first | {"size": first["size"].partition(" (")[0]}


def test_a_checkpoint_cannot_add_lines_to_the_card():
    model = quantized()
    model.config.quantization_config.provenance["calibration"] = "texts\n\n# Run this"
    assert "\n# Run this" not in str(model_card(model, "x"))


def test_the_snippet_of_the_card_runs_beside_the_saved_folder(tmp_path):
    folder = hf_guidedquant.save(quantized(), tmp_path / "tiny-3bit", word_tokenizer())
    card = ModelCard.load(folder / "README.md")
    (snippet,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Once upon a time")
