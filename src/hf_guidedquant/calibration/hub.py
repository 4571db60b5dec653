"""A split of a dataset on the Hub, read as a stream."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..errors import CalibrationError
from .local import JSON_SUFFIXES, JsonRecords
from .named import fetch

# Names by which `datasets` would read whatever files lie in the current folder.
_READERS = ("arrow", "csv", "json", "pandas", "parquet", "text", "xml")


@dataclass(frozen=True, kw_only=True)
class HubDataset:
    """Where on the Hub the calibration data are.

    Attributes:
        name: Repository, like ``"HuggingFaceH4/ultrachat_200k"``, a folder of files that `datasets` reads, or a
            ``.json`` or ``.jsonl`` file.
        config: Of a dataset that has several (its subsets), which one.
        split: Which part of it.
        column: Texts, chats or token ids. Default: the one called ``input_ids``, ``messages`` or ``text``.

    Raises:
        CalibrationError: A value is not a name.
    """

    name: str
    config: str | None = None
    split: str = "train"
    column: str | None = None

    def __post_init__(self) -> None:
        for key, value in vars(self).items():
            if not (isinstance(value, str) and value) and (value is not None or key in ("name", "split")):
                raise CalibrationError(f"dataset[{key!r}] = {value!r} is not allowed; it must be a name.")
        if self.name in _READERS and not os.path.exists(self.name):
            raise CalibrationError(
                f"dataset['name'] = {self.name!r} is no dataset, but a kind of file. Give the path of a folder or of a "
                ".jsonl file, or the name of a dataset of the Hub."
            )

    @classmethod
    def of(cls, settings: Any) -> "HubDataset | None":
        """From a user's dictionary; None for anything else, a ``datasets.DatasetDict`` included.

        Raises:
            CalibrationError: It has no name, or keys that mean nothing.
        """
        if not isinstance(settings, Mapping) or hasattr(settings, "column_names"):
            return None
        known = [field.name for field in fields(cls)]
        if "name" not in settings or not set(settings) <= set(known):
            raise CalibrationError(
                f"A dataset with the keys {list(settings)} is not understood; a dictionary must be of a dataset of the "
                f"Hub: its name, and if needed {', '.join(known[1:])}."
            )
        return cls(**settings)

    def open(self) -> Any:
        """The split, as a ``datasets.IterableDataset`` or the like. No record is read yet.

        Raises:
            CalibrationError: The dataset cannot be fetched, or has no such config or split; the message lists those
                that there are.
        """
        if os.path.isfile(self.name) and self.name.endswith(JSON_SUFFIXES):
            return JsonRecords(self.name)
        splits = fetch(self.name, self.config, streaming=True)
        if self.split not in splits:
            raise CalibrationError(f"The dataset {self.name} has no split {self.split!r}; it has {', '.join(splits)}.")
        return splits[self.split]

    def describe(self) -> str | None:
        """Name, config, split and column, as far as they are given; None for a folder: paths are not told."""
        if os.path.exists(self.name):
            return None
        return ", ".join(filter(None, (self.name, self.config, self.split, self.column)))
