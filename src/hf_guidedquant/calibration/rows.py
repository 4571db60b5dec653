"""Calibration data as token rows, from whatever a user has: a name, texts, chats, a Dataset, or token tensors."""

import hashlib
import logging
from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..errors import CalibrationError, TokenizerMissingError
from .chats import IGNORED, assistant_labels, chat_text
from .hub import HubDataset
from .kinds import classify, classify_columns, no_chats
from .named import NAMED_DATASETS

logger = logging.getLogger(__name__)

# Chats that are read from a stream without being of use, until there is no hope.
_PATIENCE = 20_000


@dataclass(frozen=True)
class Calibration:
    """Token rows and where they came from.

    Attributes:
        rows: int64 ``[seq]`` each, on the CPU; lengths may differ.
        source: What kind of data it was: a named set, ``"texts"``, ``"chats"``, ``"text file"`` or ``"token rows"``,
            or where on the Hub it was.
        requested: Rows that were asked for.
        dropped: Reason -> number of rows or texts that were left out.
        tokenizer: What read the texts; None for token rows.
        labels: The rows once more, with -100 in place of tokens that the end loss does not count. None if it counts
            all.
    """

    rows: list[Tensor]
    source: str
    requested: int
    dropped: dict[str, int] = field(default_factory=dict)
    tokenizer: Any = field(default=None, repr=False)
    labels: list[Tensor] | None = None

    @property
    def tokens(self) -> int:
        return sum(row.numel() for row in self.rows)

    @property
    def loss_tokens(self) -> int:
        """Tokens that the end loss counts. A row's first one is never among them, as nothing foretells it."""
        return sum(int((row[1:] != IGNORED).sum()) for row in self.labels or self.rows)

    def sha256(self) -> str:
        """Hash of the token ids of all rows, in order, and of the labels if there are any."""
        digest = hashlib.sha256()
        for row in (*self.rows, *(self.labels or ())):
            digest.update(row.numel().to_bytes(8, "little"))
            digest.update(row.numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    def summary(self) -> dict[str, Any]:
        """What may be told about the data: no texts, no paths."""
        told = {
            "calibration": self.source,
            "sha256": self.sha256(),
            "rows": len(self.rows),
            "tokens": self.tokens,
            "seq_len": max(row.numel() for row in self.rows),
        }
        return told if self.labels is None else told | {"assistant_only_loss": True, "loss_tokens": self.loss_tokens}

    def describe(self) -> str:
        """One line for the log: what was kept, what was dropped, and why."""
        text = f"Calibration data ({self.source}): {len(self.rows)} rows, {self.tokens:,} tokens"
        if self.labels is not None:
            text += f", {self.loss_tokens:,} of them the assistant's"
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
    assistant_only_loss: bool = False,
    vocab_size: int | None = None,
    context: int | None = None,
) -> Calibration:
    """Turn calibration data of any supported kind into token rows.

    Texts are read as one stream (joined by blank lines) and cut into rows of ``seq_len`` tokens; if there are more rows
    than ``num_samples``, a seeded choice of them is taken. A chat is one row, cut off at ``seq_len``. Token rows are
    used as they are. Of streams, only the first records are read, as many as it takes.

    Args:
        dataset: See :class:`GuidedQuantConfig`.
        tokenizer: A tokenizer object; may be None for token rows.
        num_samples: Rows to keep at most.
        seq_len: Tokens per row.
        seed: Seed of the choice of rows.
        assistant_only_loss: Of chats, the end loss counts only what the assistant says. Chats where it says nothing
            are dropped.
        vocab_size: If given, token ids at or above it are refused.
        context: If given, rows of text are at most so long, and longer token rows are refused.

    Raises:
        CalibrationError: Unknown kind of data, no usable rows, or rows that the model cannot read; or what the
            assistant says is asked for and cannot be told.
        TokenizerMissingError: Texts or chats without a tokenizer.
    """
    generator = torch.Generator().manual_seed(seed)
    hub = HubDataset.of(dataset)
    source, items = classify(dataset) if hub is None else classify_columns(hub.open(), hub.column, hub.name)
    if assistant_only_loss and source != "chats":
        raise no_chats(source)
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
        calibration = _from_chats(items, tokenizer, num_samples, seq_len, assistant_only_loss)
    elif source in NAMED_DATASETS:
        rows = NAMED_DATASETS[source](partial(tokenize, tokenizer), num_samples, seq_len, generator)
        calibration = Calibration(rows, source, num_samples)
    else:
        calibration = _from_texts(items, tokenizer, source, num_samples, seq_len, generator)
    if source != "token rows":
        calibration = replace(calibration, tokenizer=tokenizer)
    if hub is not None:
        calibration = replace(calibration, source=hub.describe() or source)
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


def _from_token_rows(items: Iterable[Tensor], num_samples: int) -> Calibration:
    items = items if isinstance(items, Sequence) else list(islice(items, num_samples))
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
    texts: Iterable[str], tokenizer: Any, source: str, num_samples: int, seq_len: int, generator: torch.Generator
) -> Calibration:
    if not isinstance(texts, Sequence):
        texts = _enough(texts, tokenizer, num_samples * seq_len)
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


def _enough(texts: Iterable[str], tokenizer: Any, tokens: int) -> list[str]:
    """The first texts of a stream, with so many tokens in all."""
    found: list[str] = []
    for text in texts:
        found.append(text)
        tokens -= tokenize(tokenizer, text or "").numel()
        if tokens <= 0:
            break
    return found


def _from_chats(
    chats: Iterable[Any], tokenizer: Any, num_samples: int, seq_len: int, assistant_only_loss: bool
) -> Calibration:
    if getattr(tokenizer, "chat_template", None) is None:
        raise CalibrationError("The calibration data are chats, but the tokenizer has no chat template.")
    known = len(chats) if isinstance(chats, Sized) else None
    rows: list[Tensor] = []
    labels: list[Tensor] = []
    short = silent = cut = 0
    for chat in islice(chats, known or num_samples + _PATIENCE):
        if assistant_only_loss:
            ids, said = assistant_labels(tokenizer, chat)
        else:
            ids = said = tokenize(tokenizer, chat_text(tokenizer, chat))
        if ids.numel() < 2:
            short += 1
            continue
        if (said[1:seq_len] == IGNORED).all():
            silent += 1
            continue
        cut += ids.numel() > seq_len
        rows.append(ids[:seq_len].clone())
        labels.append(said[:seq_len].clone())
        if len(rows) == num_samples:
            break
    dropped = _counts(
        {
            "chats shorter than 2 tokens": short,
            f"chats whose first {seq_len} tokens have nothing that the assistant says": silent,
            "chats beyond num_samples": 0 if known is None else known - len(rows) - short - silent,
            f"chat ends past {seq_len} tokens": cut,
        }
    )
    requested = num_samples if known is None else min(num_samples, known)
    return Calibration(rows, "chats", requested, dropped, labels=labels if assistant_only_loss else None)


def tokenize(tokenizer: Any, text: str) -> Tensor:
    """Token ids of a text, int64 ``[tokens]``, without special tokens and without the tokenizer's length warning."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False, return_attention_mask=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def _counts(dropped: dict[str, int]) -> dict[str, int]:
    return {reason: count for reason, count in dropped.items() if count > 0}
