"""Calibration data of every kind becomes token rows; what cannot be used is named."""

import json

import numpy
import pytest
import torch

from hf_guidedquant.calibration import load_rows
from hf_guidedquant.calibration.kinds import builtin_text, check_dataset, classify_columns
from hf_guidedquant.errors import CalibrationError, TokenizerMissingError

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


class ByteTokenizer:
    """Tokens are bytes; as much of a tokenizer as calibration needs."""

    chat_template = TEMPLATE

    def __call__(self, text, **kwargs):
        return {"input_ids": list(text.encode())}

    def apply_chat_template(self, messages, tokenize):
        return "".join(f"<{m['role']}>{m['content']}" for m in messages)


def load(dataset, tokenizer=None, num_samples=4, seq_len=8, seed=0, **kwargs):
    return load_rows(dataset, tokenizer, num_samples=num_samples, seq_len=seq_len, seed=seed, **kwargs)


def test_builtin_text_is_there_and_large_enough():
    calibration = load("builtin", ByteTokenizer(), num_samples=128, seq_len=2048)
    assert len(calibration.rows) == 128
    assert all(row.shape == (2048,) and row.dtype == torch.int64 for row in calibration.rows)
    assert 300_000 < len(builtin_text()) < 900_000


def test_texts_are_joined_by_blank_lines_and_cut_into_rows():
    calibration = load(["abcd", "  ", "efgh"], ByteTokenizer(), seq_len=5)
    assert [bytes(row.tolist()) for row in calibration.rows] == [b"abcd\n", b"\nefgh"]
    assert calibration.dropped == {"empty texts": 1}
    assert (
        "2 rows, 10 tokens; 4 rows were asked for, the data has no more; dropped: 1 empty texts"
        in calibration.describe()
    )


def test_more_rows_than_asked_for_are_a_seeded_choice():
    text = "".join(chr(97 + i % 26) for i in range(400))
    first, again, other = (load([text], ByteTokenizer(), seed=seed) for seed in (0, 0, 1))
    assert first.sha256() == again.sha256() != other.sha256()
    assert first.dropped == {"rows beyond num_samples": 46}


def test_text_shorter_than_a_row_is_one_short_row():
    assert [row.numel() for row in load(["abc"], ByteTokenizer()).rows] == [3]


def test_text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abcdefgh" * 3, encoding="utf-8")
    calibration = load(str(path), ByteTokenizer())
    assert calibration.source == "text file"
    assert len(calibration.rows) == 3


CHAT = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    ("records", "column", "expected"),
    [
        (["abcdef", "gh"], None, [b"abcdef\n\n"]),
        ([{"text": "abcdef"}, {"text": None}, {"text": "gh"}], None, [b"abcdef\n\n"]),
        ([{"prose": "abcdef"}, {"prose": "gh"}], "prose", [b"abcdef\n\n"]),
        ([CHAT, CHAT], None, [b"<user>he"] * 2),
        ([{"messages": CHAT}], None, [b"<user>he"]),
        ([{"said": CHAT, "id": 3}], "said", [b"<user>he"]),
        ([{"input_ids": [1, 2, 3]}], None, [b"\1\2\3"]),
    ],
)
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_json_files_of_texts_chats_and_token_ids(tmp_path, suffix, records, column, expected):
    file = tmp_path / f"data.{suffix}"
    lines = json.dumps(records, indent=1) if suffix == "json" else "\n\n".join(map(json.dumps, records))
    file.write_text(lines, encoding="utf-8")
    dataset = str(file) if column is None else {"name": str(file), "column": column}
    check_dataset(dataset)
    calibration = load(dataset, ByteTokenizer())
    assert [bytes(row.tolist()) for row in calibration.rows] == expected
    assert calibration.source in ("texts", "chats", "token rows")


def test_of_json_lines_no_more_is_read_than_it_takes(tmp_path):
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join([json.dumps(CHAT)] * 3 + ["no JSON"]), encoding="utf-8")
    check_dataset(str(file))
    assert len(load(str(file), ByteTokenizer(), num_samples=3).rows) == 3
    with pytest.raises(CalibrationError, match=r"chats\.jsonl, line 4, is no JSON"):
        load(str(file), ByteTokenizer(), num_samples=4)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("x.txt", b"caf\xe9 \xff\xfe", r"x\.txt is no text in UTF-8: .* at byte 3\. .*iconv"),
        ("x.json", b"\xff", "no text in UTF-8"),
        ("x.jsonl", b"\xff", "line 1, is no JSON"),
        ("x.jsonl", b"[[[", "line 1, is no JSON"),
        ("x.json", b'{"text": "a"}', r"must hold a list.*name it x\.jsonl"),
        ("x.jsonl", b"5", "holds 5, which is no text"),
        ("x.jsonl", b'{"prose": "a"}', r"has the columns \['prose'\].*given as column"),
        ("x.jsonl", b'{"text": "a"}\n{"text": 5}', "record 2: 'text' is 5; the data are texts"),
        ("x.jsonl", b'{"messages": []}\n{"messages": null}', "record 2: 'messages' is None; the data are chats"),
        ("x.jsonl", b'{"text": "a"}\n{"messages": []}', "record 2 has no 'text' as others have; it has messages"),
        ("x.jsonl", b'{"input_ids": [3.7, 4.2]}', "must be lists of token ids"),
        ("x.jsonl", b'{"input_ids": [1, "a"]}', "must be lists of token ids"),
        ("x.jsonl", b'{"messages": "hello"}', "must be lists of messages"),
        ("X.JSONL", b"5", "holds 5, which is no text"),
        ("x.jsonl", b"", "has the columns"),
    ],
)
def test_files_that_are_no_data_say_where_and_why(tmp_path, name, content, problem):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=problem):
        load(str(tmp_path / name), ByteTokenizer())


@pytest.mark.parametrize(
    ("name", "made"),
    [("input_ids", torch.tensor), ("input_ids", numpy.array), ("input_ids", list), ("other", torch.tensor)],
)
def test_token_ids_of_a_dataset_may_be_arrays(made, name):
    """As `with_format` of a datasets.Dataset gives them, which truth cannot be asked of."""

    class Rows(list):
        column_names = (name,)

    asked = None if name == "input_ids" else name
    kind, rows = classify_columns(Rows({name: made(ids)} for ids in ([1, 2, 3], [4, 5])), asked)
    assert kind == "token rows"
    assert [row.tolist() for row in rows] == [[1, 2, 3], [4, 5]]
    assert all(row.dtype == torch.int64 for row in rows)


def test_token_rows_are_used_as_they_are():
    rows = [torch.tensor([1, 2, 3]), torch.tensor([4, 5]), torch.tensor([6])]
    calibration = load(rows)
    assert [row.tolist() for row in calibration.rows] == [[1, 2, 3], [4, 5]]
    assert calibration.dropped == {"rows shorter than 2 tokens": 1}
    assert [row.tolist() for row in load(torch.tensor([[1, 2], [3, 4]])).rows] == [[1, 2], [3, 4]]


def test_chats_go_through_the_template_and_are_cut():
    chats = [[{"role": "user", "content": "hello there"}], {"messages": [{"role": "u", "content": "x"}]}]
    calibration = load(chats, ByteTokenizer())
    assert [bytes(row.tolist()) for row in calibration.rows] == [b"<user>he", b"<u>x"]
    assert calibration.dropped == {"chat ends past 8 tokens": 1}


def test_chats_without_a_template_are_refused():
    tokenizer = ByteTokenizer()
    tokenizer.chat_template = None
    with pytest.raises(CalibrationError, match="no chat template"):
        load([[{"role": "user", "content": "hi"}]], tokenizer)


@pytest.mark.parametrize("column", ["text", "messages", "input_ids"])
def test_dataset_columns(column):
    datasets = pytest.importorskip("datasets")
    values = {
        "text": ["abcdefgh"],
        "messages": [[{"role": "user", "content": "hi"}]],
        "input_ids": [[1, 2, 3]],
    }
    dataset = datasets.Dataset.from_dict({column: values[column], "other": [0]})
    calibration = load(dataset, ByteTokenizer())
    assert len(calibration.rows) == 1
    with pytest.raises(CalibrationError, match=r"columns .*other"):
        load(dataset.remove_columns(column), ByteTokenizer())


def test_a_dataset_of_all_splits_says_to_pick_one():
    datasets = pytest.importorskip("datasets")
    splits = datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": ["abcdefgh"]}))
    with pytest.raises(CalibrationError, match=r"has the splits \['train'\]; pass one of them"):
        load(splits, ByteTokenizer())


@pytest.mark.parametrize("dataset", ["no-such-set", 3, [1, 2], [], ["", " "], [["a"]]])
def test_what_is_not_understood_or_empty_says_what_is_allowed(dataset):
    with pytest.raises(CalibrationError, match=r"must be \"builtin\"|No calibration rows are left"):
        load(dataset, ByteTokenizer())


@pytest.mark.parametrize("row", [torch.tensor([1.0, 2.0]), torch.tensor([[1, 2]]), torch.tensor([-1, 2])])
def test_malformed_token_rows_are_refused_by_index(row):
    with pytest.raises(CalibrationError, match="Calibration row 0"):
        load([row])


def test_texts_without_a_tokenizer_say_what_to_pass():
    with pytest.raises(TokenizerMissingError, match=r"tokenizer=\.\.\."):
        load(["some text"])


def test_foreign_token_ids_are_refused():
    with pytest.raises(CalibrationError, match="Token id 9 is outside the model's vocabulary of 9"):
        load([torch.tensor([1, 9])], vocab_size=9)
