"""What kind of calibration data a user's value is: texts, chats, token rows, or the name of a set."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sized
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from ..errors import CalibrationError, listed
from .hub import HubDataset
from .local import JSON_SUFFIXES, JsonRecords, read_text
from .named import NAMED_DATASETS

_KINDS = (
    '"builtin", ' + ", ".join(f'"{name}"' for name in NAMED_DATASETS) + ", the path of a text file, or of a "
    ".json or .jsonl file of texts, chats or token ids, a list of texts, "
    "a list of chats, a datasets.Dataset, a dataset of the Hub as a dictionary of name, config, split and column, or a "
    "list of 1-D LongTensors"
)
# Columns that are recognised by their names, the first one first.
_COLUMNS = {"input_ids": "token rows", "messages": "chats", "text": "texts"}


def check_dataset(dataset: Any, assistant_only_loss: bool = False) -> None:
    """Refuse a name that is neither a known set nor a file, and what is no chat, before anything expensive happens.

    Raises:
        CalibrationError: Saying what is allowed.
    """
    HubDataset.of(dataset)
    if isinstance(dataset, str | os.PathLike):
        source, _ = classify(dataset)
        if assistant_only_loss and source != "chats":
            raise no_chats(source)


def builtin_text() -> str:
    """The public-domain English text that ships with the package (sources: BUILTIN_TEXT.md beside it)."""
    return (files(__package__) / "builtin.txt").read_text(encoding="utf-8")


def no_chats(source: str) -> CalibrationError:
    """The error where there is no assistant whose tokens could count."""
    return CalibrationError(
        f"assistant_only_loss needs chats, and the calibration data are {source!r}. Give lists of messages with "
        "role and content as dataset, or leave assistant_only_loss out."
    )


def classify(dataset: Any) -> tuple[str, Any]:
    """The kind of a dataset value, and its items: texts, chats (lists of messages) or token rows.

    Raises:
        CalibrationError: It is of no kind that is understood.
    """
    if isinstance(dataset, str) and dataset == "builtin":
        return "builtin", builtin_text().split("\n\f\n")
    if isinstance(dataset, str) and dataset in NAMED_DATASETS:
        return dataset, None
    if isinstance(dataset, str | os.PathLike):
        if os.path.isfile(dataset):
            name = os.fspath(dataset)
            if name.lower().endswith(JSON_SUFFIXES):
                return classify_columns(JsonRecords(name), called=name)
            return "text file", [read_text(name)]
        raise CalibrationError(f"dataset={os.fspath(dataset)!r} is no known name and no file; it must be {_KINDS}.")
    if hasattr(dataset, "column_names"):
        return classify_columns(dataset)
    if isinstance(dataset, Tensor):
        return "token rows", list(dataset if dataset.dim() == 2 else dataset.unsqueeze(0))
    if isinstance(dataset, Iterable):
        return _classify_items(list(dataset))
    raise CalibrationError(f"dataset of type {type(dataset).__name__} is not understood; it must be {_KINDS}.")


def classify_columns(dataset: Any, column: str | None = None, called: str | None = None) -> tuple[str, Any]:
    """The kind of a dataset's column, and its values; of a stream, as an iterator.

    Args:
        dataset: A ``datasets.Dataset`` or ``IterableDataset``.
        column: Its name. Default: the one with a name that says what it is.
        called: The dataset's name, if it came by one.

    Raises:
        CalibrationError: There is no such column, or its values are not understood.
    """
    columns = dataset.column_names
    subject = "The dataset" + (f" {called}" if called else "")
    if isinstance(columns, Mapping):
        raise CalibrationError(f"{subject} has the splits {list(columns)}; pass one of them, like dataset['train'].")
    if columns is None:  # a stream that does not know before it is read
        columns = list(next(iter(dataset), {}))
    if column is None:
        column = next((name for name in _COLUMNS if name in columns), None)
        if column is None:
            raise CalibrationError(
                f"{subject} has the columns {columns}; one must be called input_ids (token ids), messages (chats) or "
                f"text{', or another be given as column' if called else ''}."
            )
        kind = _COLUMNS[column]
    elif column in columns:
        first = next((row[column] for row in dataset if column in row and not _is_empty(row[column])), "")
        ids = isinstance(first, list) and all(isinstance(entry, int) for entry in first)
        kind = "token rows" if ids else _classify_items([first])[0]
    else:
        raise CalibrationError(f"{subject} has no column {column!r}; it has {', '.join(columns)}.")
    values = _values(dataset, column, kind, subject)
    if kind == "token rows":
        values = (_token_ids(value, f"{subject}: {column!r}") for value in values)
    elif kind == "chats":
        values = (_checked_chat(value, f"{subject}: {column!r}") for value in values)
    return kind, list(values) if isinstance(dataset, Sized) else values


def _values(dataset: Any, column: str, kind: str, subject: str) -> Iterator[Any]:
    for number, row in enumerate(dataset, start=1):
        if column not in row:
            raise CalibrationError(
                f"{subject}, record {number} has no {column!r} as others have; it has {listed(row)}."
            )
        value = row[column]
        if (value is None and kind != "texts") or (kind == "texts" and not isinstance(value, str | None)):
            raise CalibrationError(f"{subject}, record {number}: {column!r} is {value!r:.50}; the data are {kind}.")
        yield value


def _is_empty(value: Any) -> bool:
    """Whether it tells nothing of its kind. Arrays have no truth to ask for."""
    return value is None or (isinstance(value, str | list | tuple) and not value)


def _token_ids(value: Any, where: str) -> Tensor:
    """Lists, arrays and tensors of integers, one row each."""
    try:
        ids = torch.as_tensor(value)
        is_integer = not ids.is_floating_point() and not ids.is_complex() and ids.dtype != torch.bool
        # Of an empty list torch makes floats.
        if ids.dim() == 1 and (is_integer or not len(ids)):
            return ids.to(torch.int64)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass
    raise CalibrationError(f"{where} must be lists of token ids, and one is {value!r:.50}.")


def _checked_chat(value: Any, where: str) -> Any:
    chat = _messages(value)
    if isinstance(chat, list | tuple) and all(isinstance(message, Mapping) for message in chat):
        return chat
    raise CalibrationError(f"{where} must be lists of messages with role and content, and one is {value!r:.50}.")


def _classify_items(items: list[Any]) -> tuple[str, Any]:
    if not items:
        raise CalibrationError("No calibration rows are left: the dataset is an empty list.")
    if all(isinstance(item, str) for item in items):
        return "texts", items
    if all(isinstance(item, Tensor) for item in items):
        return "token rows", items
    chats = [_messages(item) for item in items]
    if all(isinstance(chat, list | tuple) and chat and all(isinstance(m, Mapping) for m in chat) for chat in chats):
        return "chats", chats
    kinds = ", ".join(sorted({type(item).__name__ for item in items}))
    raise CalibrationError(f"A list of {kinds} is not understood as calibration data; it must be {_KINDS}.")


def _messages(chat: Any) -> Any:
    return chat["messages"] if isinstance(chat, Mapping) and "messages" in chat else chat
