"""Local files of texts, chats or token ids: plain text, and JSON."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import CalibrationError

_JSON_LINES, _JSON = ".jsonl", ".json"
JSON_SUFFIXES = (_JSON_LINES, _JSON)


def read_text(file: str | os.PathLike, error: type[Exception] = CalibrationError) -> str:
    """The text in a file.

    Raises:
        CalibrationError: It is no text in UTF-8, or cannot be read; or what else is given as ``error``.
    """
    try:
        return Path(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as problem:
        raise error(
            f"{os.fspath(file)} is no text in UTF-8: {problem.reason} at byte {problem.start:,}. If it is text in "
            "another encoding, convert it first, e.g. iconv -f LATIN1 -t UTF-8."
        ) from problem
    except OSError as problem:
        raise error(f"{os.fspath(file)} cannot be read: {problem.strerror or problem}.") from problem


class JsonRecords:
    """Records of a local JSON file, one after the other; of ``.jsonl`` a line is read at a time.

    A record that is no object counts as one: a text as its column ``text``, a list as its column ``messages``.
    """

    def __init__(self, file: str | os.PathLike) -> None:
        self._file = Path(file)

    @property
    def column_names(self) -> list[str]:
        """The first record's columns."""
        return list(next(iter(self), {}))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The records.

        Raises:
            CalibrationError: The file is no JSON; the message says where.
        """
        for value in self._list() if self._file.suffix.lower() == _JSON else self._lines():
            columns: dict[type, str] = {str: "text", list: "messages"}
            record = {columns[type(value)]: value} if type(value) in columns else value
            if not isinstance(record, dict):
                raise CalibrationError(f"{self._file} holds {value!r:.50}, which is no text, no chat and no object.")
            yield record

    def _list(self) -> Any:
        values = self._parsed(read_text(self._file))
        if not isinstance(values, list):
            raise CalibrationError(
                f"{self._file} must hold a list, of texts, chats or objects. If it has one of them in every line, name "
                f"it {self._file.stem}{_JSON_LINES}."
            )
        return values

    def _lines(self) -> Iterator[Any]:
        with self._file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield self._parsed(line, f", line {number},")

    def _parsed(self, text: str | bytes, where: str = "") -> Any:
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CalibrationError(f"{self._file}{where} is no JSON: {error}") from error
