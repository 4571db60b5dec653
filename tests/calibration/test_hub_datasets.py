"""Datasets of the Hub by name: which records are read, and what is said about those that are not there."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from test_chats import USER, tokenizer_of

from hf_guidedquant.calibration import load_rows
from hf_guidedquant.calibration.kinds import check_dataset
from hf_guidedquant.errors import CalibrationError

TOKENIZER = tokenizer_of()
RECORDS = {
    "messages": [[USER, {"role": "assistant", "content": f"answer {index}"}] for index in range(50)],
    "prose": [f"text number {index:03}" for index in range(50)],
    "numbers": [[index, index + 1, index + 2] for index in range(50)],
}
PROSE = "\n\n".join(RECORDS["prose"])


def load(dataset, num_samples=3, seq_len=24, **options):
    return load_rows(dataset, TOKENIZER, num_samples=num_samples, seq_len=seq_len, seed=0, **options)


class Stream:
    """As much of an IterableDataset as is needed; counts what is read of it."""

    def __init__(self, column_names):
        self.column_names, self.read = column_names, 0

    def __iter__(self):
        for index in range(50):
            self.read = max(self.read, index + 1)
            yield {column: values[index] for column, values in RECORDS.items()}


@pytest.fixture
def hub(monkeypatch):
    """A Hub whose every dataset has the splits train and test; keeps the calls of load_dataset."""
    found = SimpleNamespace(calls=[], splits={"train": Stream(list(RECORDS)), "test": Stream(None)})

    def load_dataset(*args, **kwargs):
        found.calls.append((args, kwargs))
        return {"train": Stream(["prose"])} if args[0] == "me/prose" else found.splits

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return found


@pytest.mark.parametrize(
    ("column", "expected", "read"),
    [
        (None, ["<user>Hi, you</>\n<assist"] * 3, 3),
        ("messages", ["<user>Hi, you</>\n<assist"] * 3, 3),
        # Five texts of 15 characters fill three rows, four do not.
        ("prose", [PROSE[start : start + 24] for start in (0, 24, 48)], 5),
        ("numbers", [chr(i) + chr(i + 1) + chr(i + 2) for i in range(3)], 3),
    ],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_no_more_records_are_read_than_it_takes(hub, split, column, expected, read):
    calibration = load({"name": "me/data", "split": split, "column": column})
    assert [bytes(row.tolist()).decode() for row in calibration.rows] == expected
    assert hub.splits[split].read == read
    assert hub.calls == [(("me/data", None), {"streaming": True})]
    assert calibration.dropped.keys() <= {"chat ends past 24 tokens"}


def test_chats_of_a_column_can_be_weighed_by_the_assistant(hub):
    calibration = load({"name": "me/data", "config": "en", "column": "messages"}, seq_len=200, assistant_only_loss=True)
    assert hub.calls[0][0] == ("me/data", "en")
    said = ["".join(chr(label) for label in labels if label != -100) for labels in calibration.labels]
    assert said == [f"answer {index}</>\n" for index in range(3)]
    assert calibration.source == "me/data, en, train, messages"


def test_a_users_own_stream_is_not_read_to_its_end():
    stream = Stream(["messages"])
    assert len(load(stream).rows) == 3
    assert stream.read == 3


def test_a_stream_with_too_few_records_says_so(hub):
    calibration = load({"name": "me/data"}, num_samples=60)
    assert "50 rows" in calibration.describe() and "60 rows were asked for" in calibration.describe()


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ({"name": "me/data", "split": "valid"}, "me/data has no split 'valid'; it has train, test"),
        (
            {"name": "me/data", "column": "chat"},
            "me/data has no column 'chat'; it has messages, prose, numbers",
        ),
    ],
)
def test_what_is_not_there_is_named_with_what_is(hub, dataset, message):
    with pytest.raises(CalibrationError, match=message):
        load(dataset)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ({"text": "x"}, r"keys \['text'\] is not understood; a dictionary must be of a dataset of the Hub"),
        ({"split": "train"}, r"keys \['split'\] is not understood.*config, split, column"),
        ({"name": "me/data", "colum": "text"}, r"keys \['name', 'colum'\] is not understood"),
        ({"name": ""}, r"dataset\['name'\] = '' is not allowed"),
        ({"name": "json"}, r"dataset\['name'\] = 'json' is no dataset, but a kind of file"),
        ({"name": "me/data", "split": None}, r"dataset\['split'\] = None is not allowed"),
        ({"name": "me/data", "column": 3}, r"dataset\['column'\] = 3 is not allowed"),
    ],
)
def test_a_malformed_dictionary_is_refused_before_anything_is_fetched(hub, dataset, message):
    for refuse in (check_dataset, load):
        with pytest.raises(CalibrationError, match=message):
            refuse(dataset)
    assert not hub.calls


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder that the real `datasets` reads: two configs, of which one has two splits."""
    pytest.importorskip("datasets")
    for name in ("train", "test"):
        lines = [json.dumps({"messages": chat, "id": index}) for index, chat in enumerate(RECORDS["messages"])]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    configs = [
        {"config_name": "both", "data_files": [{"split": n, "path": f"{n}.jsonl"} for n in ("train", "test")]},
        {"config_name": "one", "data_files": [{"split": "train", "path": "train.jsonl"}]},
    ]
    (tmp_path / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n", encoding="utf-8")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return str(tmp_path)


def test_the_real_package_reads_a_folder_whose_path_is_not_told(folder):
    calibration = load({"name": folder, "config": "both", "split": "test", "column": "messages"}, seq_len=200)
    assert [bytes(row.tolist()).decode().partition("<assistant>")[2] for row in calibration.rows] == [
        f"answer {index}</>\n" for index in range(3)
    ]
    assert calibration.source == "chats"
    assert all(row.dtype == torch.int64 for row in calibration.rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": "one", "split": "test"}, "no split 'test'; it has train"),
        ({"config": "one", "column": "chat"}, "no column 'chat'; it has messages, id"),
        ({"config": "two"}, "'two' not found.*both.*one"),
        ({}, "both.*one"),
        ({"name": "nobody/nothing"}, "nobody/nothing cannot be fetched"),
    ],
)
def test_what_the_real_package_does_not_find_is_named_with_what_it_does(folder, changes, message):
    with pytest.raises(CalibrationError, match=message):
        load({"name": folder, **changes})
