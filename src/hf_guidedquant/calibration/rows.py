"""Calibration data as token rows, from whatever a user has: a name, texts, chats, a Dataset, or token tensors."""

import hashlib
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from ..errors import CalibrationError, TokenizerMissingError
from .named import NAMED_DATASETS

logger = logging.getLogger(__name__)

_KINDS = (
    '"builtin", ' + ", ".join(f'"{name}"' for name in NAMED_DATASETS) + ", the path of a text file, a list of texts, "
    "a list of chats, a datasets.Dataset, or a list of 1-D LongTensors"
)


@dataclass(frozen=True)
class Calibration:
    """Token rows and where they came from.

    Attributes:
        rows: int64 ``[seq]`` each, on the CPU; lengths may differ.
        source: What kind of data it was: a named set, ``"texts"``, ``"chats"``, ``"text file"`` or ``"token rows"``.
        requested: Rows that were asked for.
        dropped: Reason -> number of rows or texts that were left out.
        tokenizer: What read the texts; None for token rows.
    """

    rows: list[Tensor]
    source: str
    requested: int
    dropped: dict[str, int] = field(default_factory=dict)
    tokenizer: Any = field(default=None, repr=False)

    @property
    def tokens(self) -> int:
        return sum(row.numel() for row in self.rows)

    def sha256(self) -> str:
        """Hash of the token ids of all rows, in order."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(row.numel().to_bytes(8, "little"))
            digest.update(row.numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    def summary(self) -> dict[str, Any]:
        """What may be told about the data: no texts, no paths."""
        return {
            "calibration": self.source,
            "sha256": self.sha256(),
            "rows": len(self.rows),
            "tokens": self.tokens,
            "seq_len": max(row.numel() for row in self.rows),
        }

    def describe(self) -> str:
        """One line for the log: what was kept, what was dropped, and why."""
        text = f"Calibration data ({self.source}): {len(self.rows)} rows, {self.tokens:,} tokens"
        if len(self.rows) < self.requested:
            text += f"; {self.requested} rows were asked for, the data has no more"
        if self.dropped:
            text += "; dropped: " + ", ".join(f"{count} {reason}" for reason, count in self.dropped.items())
        return text + "."


def load_rows(
    dataset: Any,
    tokenizer: Any,
    *,
    num_samples: int,
    seq_len: int,
    seed: int,
    vocab_size: int | None = None,
    context: int | None = None,
) -> Calibration:
    """Turn calibration data of any supported kind into token rows.

    Texts are read as one stream (joined by blank lines) and cut into rows of ``seq_len`` tokens; if there are more rows
    than ``num_samples``, a seeded choice of them is taken. A chat is one row, cut off at ``seq_len``. Token rows are
    used as they are.

    Args:
        dataset: See :class:`GuidedQuantConfig`.
        tokenizer: A tokenizer object; may be None for token rows.
        num_samples: Rows to keep at most.
        seq_len: Tokens per row.
        seed: Seed of the choice of rows.
        vocab_size: If given, token ids at or above it are refused.
        context: If given, rows of text are at most so long, and longer token rows are refused.

    Raises:
        CalibrationError: Unknown kind of data, no usable rows, or rows that the model cannot read.
        TokenizerMissingError: Texts or chats without a tokenizer.
    """
    generator = torch.Generator().manual_seed(seed)
    source, items = _classify(dataset)
    if context is not None and context < seq_len and source != "token rows":
        logger.info("Rows are cut to the model's context of %d tokens (seq_len=%d).", context, seq_len)
        seq_len = context
    if source == "token rows":
        calibration = _from_token_rows(items, num_samples)
    elif not callable(tokenizer):
        raise TokenizerMissingError(
            f"Calibration data of kind {source!r} needs a tokenizer, and none was found beside the model. "
            "Pass GuidedQuantConfig(tokenizer=...), or a list of 1-D LongTensors of token ids as dataset."
        )
    elif source == "chats":
        calibration = _from_chats(items, tokenizer, num_samples, seq_len)
    elif source in NAMED_DATASETS:
        rows = NAMED_DATASETS[source](partial(tokenize, tokenizer), num_samples, seq_len, generator)
        calibration = Calibration(rows, source, num_samples)
    else:
        calibration = _from_texts(items, tokenizer, source, num_samples, seq_len, generator)
    if source != "token rows":
        calibration = replace(calibration, tokenizer=tokenizer)
    if not calibration.rows:
        raise CalibrationError(f"No calibration rows are left. {calibration.describe()} Use more or longer texts.")
    longest = max(row.numel() for row in calibration.rows)
    if context is not None and longest > context:
        raise CalibrationError(f"A calibration row has {longest} tokens, but the model's context is {context}. Cut it.")
    if vocab_size is not None:
        largest = max(int(row.max()) for row in calibration.rows)
        if largest >= vocab_size:
            raise CalibrationError(
                f"Token id {largest} is outside the model's vocabulary of {vocab_size}; "
                "the tokenizer does not belong to this model."
            )
    return calibration


def check_dataset(dataset: Any) -> None:
    """Refuse a name that is neither a known set nor a file, before anything expensive happens.

    Raises:
        CalibrationError: Saying what is allowed.
    """
    if isinstance(dataset, str | os.PathLike) and dataset not in ("builtin", *NAMED_DATASETS):
        _classify(dataset)


def builtin_text() -> str:
    """The public-domain English text that ships with the package (sources: BUILTIN_TEXT.md beside it)."""
    return (files(__package__) / "builtin.txt").read_text(encoding="utf-8")


def _classify(dataset: Any) -> tuple[str, Any]:
    """The kind of a dataset value, and its items: texts, chats (lists of messages) or token rows."""
    if isinstance(dataset, str) and dataset == "builtin":
        return "builtin", builtin_text().split("\n\f\n")
    if isinstance(dataset, str) and dataset in NAMED_DATASETS:
        return dataset, None
    if isinstance(dataset, str | os.PathLike):
        if os.path.isfile(dataset):
            with open(dataset, encoding="utf-8", errors="replace") as file:
                return "text file", [file.read()]
        raise CalibrationError(f"dataset={os.fspath(dataset)!r} is no known name and no file; it must be {_KINDS}.")
    if hasattr(dataset, "column_names"):
        return _classify_columns(dataset)
    if isinstance(dataset, Tensor):
        return "token rows", list(dataset if dataset.dim() == 2 else dataset.unsqueeze(0))
    if isinstance(dataset, Iterable) and not isinstance(dataset, Mapping):
        return _classify_items(list(dataset))
    raise CalibrationError(f"dataset of type {type(dataset).__name__} is not understood; it must be {_KINDS}.")


def _classify_columns(dataset: Any) -> tuple[str, Any]:
    columns = dataset.column_names
    if isinstance(columns, Mapping):
        raise CalibrationError(f"The dataset has the splits {list(columns)}; pass one of them, like dataset['train'].")
    if columns is None:  # a stream that does not know before it is read
        columns = list(next(iter(dataset), {}))
    if "input_ids" in columns:
        return "token rows", [torch.as_tensor(row["input_ids"], dtype=torch.int64) for row in dataset]
    if "messages" in columns:
        return "chats", [row["messages"] for row in dataset]
    if "text" in columns:
        return "texts", [row["text"] for row in dataset]
    raise CalibrationError(
        f"The dataset has the columns {columns}; one must be called input_ids (token ids), messages (chats) or text."
    )


def _classify_items(items: list[Any]) -> tuple[str, Any]:
    if not items:
        raise CalibrationError("No calibration rows are left: the dataset is an empty list.")
    if all(isinstance(item, str) for item in items):
        return "texts", items
    if all(isinstance(item, Tensor) for item in items):
        return "token rows", items
    chats = [item["messages"] if isinstance(item, Mapping) and "messages" in item else item for item in items]
    if all(isinstance(chat, list | tuple) and chat and all(isinstance(m, Mapping) for m in chat) for chat in chats):
        return "chats", chats
    kinds = ", ".join(sorted({type(item).__name__ for item in items}))
    raise CalibrationError(f"A list of {kinds} is not understood as calibration data; it must be {_KINDS}.")


def _from_token_rows(items: Sequence[Tensor], num_samples: int) -> Calibration:
    for index, row in enumerate(items):
        if row.dim() != 1 or row.is_floating_point() or row.dtype == torch.bool:
            raise CalibrationError(
                f"Calibration row {index} is {row.dtype} {list(row.shape)}; token rows must be 1-D LongTensors."
            )
        if row.numel() and int(row.min()) < 0:
            raise CalibrationError(f"Calibration row {index} has a negative token id.")
    usable = [row.detach().to("cpu", torch.int64) for row in items if row.numel() >= 2]
    dropped = _counts({"rows shorter than 2 tokens": len(items) - len(usable)})
    dropped |= _counts({"rows beyond num_samples": len(usable) - num_samples})
    return Calibration(usable[:num_samples], "token rows", min(num_samples, len(items)), dropped)


def _from_texts(
    texts: Sequence[str], tokenizer: Any, source: str, num_samples: int, seq_len: int, generator: torch.Generator
) -> Calibration:
    filled = [text for text in texts if text and text.strip()]
    stream = tokenize(tokenizer, "\n\n".join(filled))
    count = stream.numel() // seq_len
    dropped = _counts({"empty texts": len(texts) - len(filled)})
    if count == 0 and stream.numel() >= 2:
        return Calibration([stream], source, num_samples, dropped)
    rows = stream[: count * seq_len].view(count, seq_len)
    if count > num_samples:
        chosen = torch.randperm(count, generator=generator)[:num_samples].sort().values
        rows = rows[chosen]
        dropped |= {"rows beyond num_samples": count - num_samples}
    return Calibration([row.clone() for row in rows], source, num_samples, dropped)


def _from_chats(chats: Sequence[Any], tokenizer: Any, num_samples: int, seq_len: int) -> Calibration:
    if getattr(tokenizer, "chat_template", None) is None:
        raise CalibrationError("The calibration data are chats, but the tokenizer has no chat template.")
    rows: list[Tensor] = []
    short = cut = 0
    for chat in chats:
        if len(rows) == num_samples:
            break
        text = tokenizer.apply_chat_template(list(chat), tokenize=False)
        ids = tokenize(tokenizer, text)
        if ids.numel() < 2:
            short += 1
            continue
        cut += ids.numel() > seq_len
        rows.append(ids[:seq_len].clone())
    dropped = _counts(
        {
            "chats shorter than 2 tokens": short,
            "chats beyond num_samples": len(chats) - len(rows) - short,
            f"chat ends past {seq_len} tokens": cut,
        }
    )
    return Calibration(rows, "chats", min(num_samples, len(chats)), dropped)


def tokenize(tokenizer: Any, text: str) -> Tensor:
    """Token ids of a text, int64 ``[tokens]``, without special tokens and without the tokenizer's length warning."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False, return_attention_mask=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def _counts(dropped: dict[str, int]) -> dict[str, int]:
    return {reason: count for reason, count in dropped.items() if count > 0}
