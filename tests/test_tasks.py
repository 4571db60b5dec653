"""Tasks of lm-evaluation-harness; without that package, an error that says what to install."""

import json
import sys

import pytest
import torch
from conftest import tiny_model
from tokenizer import WORDS, word_tokenizer

import hf_guidedquant
from hf_guidedquant import GuidedQuantConfig
from hf_guidedquant.errors import EvaluationError, PackageMissingError
from hf_guidedquant.evaluate import TASKS, check_tasks, run_tasks

PAIRS = [(f"{WORDS[i]} {WORDS[i + 1]} {WORDS[2 * i]}", f"{WORDS[i]} {WORDS[-i]} {WORDS[5]}") for i in range(24)]


@pytest.fixture
def task(tmp_path):
    """Of two sentences the first one is right."""
    pytest.importorskip("lm_eval")
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(json.dumps({"good": good, "bad": bad}) for good, bad in PAIRS))
    return {
        "task": "pairs",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"train": str(file)}, "cache_dir": str(tmp_path / "cache")},
        "output_type": "multiple_choice",
        "validation_split": "train",
        "doc_to_text": "",
        "doc_to_target": 0,
        "doc_to_choice": "{{[good, bad]}}",
        "metric_list": [{"metric": "acc"}],
    }


@torch.no_grad()
def accuracy_by_definition(model, tokenizer):
    """A sentence is scored by all its tokens, read after the token that begins texts."""

    def score(sentence):
        ids = [tokenizer.bos_token_id, *tokenizer(sentence, add_special_tokens=False)["input_ids"]]
        predicted = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        return sum(float(predicted[t, ids[t + 1]]) for t in range(len(ids) - 1))

    return sum(score(good) > score(bad) for good, bad in PAIRS) / len(PAIRS)


def test_accuracy_is_that_of_the_definition(task, tmp_path):
    model, tokenizer = tiny_model("llama"), word_tokenizer()
    hf_guidedquant.quantize(model, GuidedQuantConfig(bits=3, method="rtn"))
    expected = accuracy_by_definition(model, tokenizer)
    assert 0 < expected < 1
    torch.manual_seed(5)
    state = torch.get_rng_state()
    found = run_tasks(model, tokenizer, [task], batch_size=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.keys() == {"pairs"}
    assert found["pairs"]["acc"] == pytest.approx(expected, abs=1e-12)
    assert found["pairs"].keys() == {"acc", "acc_stderr"}


def test_the_paths_of_yaml_files_are_tasks(task, tmp_path):
    file = tmp_path / "pairs.yaml"
    file.write_text(json.dumps(task))
    found = run_tasks(tiny_model(), word_tokenizer(), [str(file)], limit=6)
    assert set(found) == {"pairs"}
    assert found["pairs"]["acc"] * 6 == pytest.approx(round(found["pairs"]["acc"] * 6), abs=1e-9)


def test_the_default_tasks_exist():
    pytest.importorskip("lm_eval")
    check_tasks(TASKS)


@pytest.mark.parametrize(("tasks", "problem"), [(["arc_easy", "arc_esay"], "'arc_esay'"), ([], "no tasks")])
def test_tasks_that_do_not_exist_are_refused(tasks, problem):
    pytest.importorskip("lm_eval")
    with pytest.raises(EvaluationError, match=problem):
        check_tasks(tasks)


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(PackageMissingError, match=r"pip install 'hf-guidedquant\[lm-eval\]'"):
        run_tasks(tiny_model(), word_tokenizer())
