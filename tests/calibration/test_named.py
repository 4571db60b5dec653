"""The papers' calibration sets, with `datasets` replaced by a stub: what is asked for, and how it is sampled."""

import sys
from types import SimpleNamespace

import pytest
import torch

from hf_guidedquant.calibration import load_rows
from hf_guidedquant.errors import CalibrationError


def tokenizer(text, **kwargs):
    return {"input_ids": list(text.encode())}


class Stream(list):
    def shuffle(self, seed, buffer_size):
        return Stream(self[seed % len(self) :] + self[: seed % len(self)])


@pytest.fixture
def loaded(monkeypatch):
    """Every call of load_dataset; documents are short, long, short, long ..."""
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        if kwargs.get("streaming"):
            return Stream({"text": chr(97 + i) * (5 if i % 2 else 40)} for i in range(20))
        return {"text": ["0123456789" * 10, "", "abcdefghij" * 10]}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return calls


def load(name, seed=0, seq_len=16):
    return load_rows(name, tokenizer, num_samples=6, seq_len=seq_len, seed=seed)


def test_wikitext2_takes_random_windows_of_the_training_text(loaded):
    calibration = load("wikitext2")
    assert loaded == [(("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "train"})]
    text = ("0123456789" * 10 + "\n\n\n\n" + "abcdefghij" * 10).encode()
    assert len(calibration.rows) == 6
    assert all(bytes(row.tolist()) in text for row in calibration.rows)
    assert load("wikitext2").sha256() == calibration.sha256() != load("wikitext2", seed=1).sha256()


@pytest.mark.parametrize("name", ["c4", "redpajama"])
def test_streamed_sets_take_one_window_of_each_long_document(loaded, name):
    calibration = load(name)
    assert loaded[0][1]["streaming"] is True
    letters = [chr(row[0]) for row in calibration.rows]
    assert letters == ["a", "c", "e", "g", "i", "k"]
    assert all(row.shape == (16,) and row.unique().numel() == 1 for row in calibration.rows)


def test_documents_that_are_all_too_short_leave_no_rows(loaded):
    with pytest.raises(CalibrationError, match="No calibration rows are left"):
        load("c4", seq_len=64)


def test_a_missing_datasets_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError, match=r"pip install .*datasets"):
        load("c4")


def test_the_callers_random_state_is_untouched(loaded):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    load("wikitext2")
    assert torch.equal(torch.rand(1), expected)
