"""The calibration sets that papers use, fetched through `datasets`, sampled the way the papers sample them."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import CalibrationError

Tokenize = Callable[[str], Tensor]
Sampler = Callable[[Tokenize, int, int, torch.Generator], list[Tensor]]

# Documents shorter than a row are skipped; give up when this many in a row were too short.
_PATIENCE = 20_000
_SHUFFLE_BUFFER = 10_000


def fetch(*args: Any, **kwargs: Any) -> Any:
    """``datasets.load_dataset``.

    Raises:
        CalibrationError: The package is not there, or the dataset is not; the message has what `datasets` says.
    """
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError(
            "Calibration sets from the Hub need the `datasets` package: pip install 'hf-guidedquant[datasets]', "
            'or use dataset="builtin", which needs nothing.'
        ) from error
    try:
        return datasets.load_dataset(*args, **kwargs)
    except (OSError, RuntimeError, ValueError) as error:
        raise CalibrationError(
            f'The calibration set {args[0]} cannot be fetched: {error}. dataset="builtin" needs no network.'
        ) from error


def _window(ids: Tensor, seq_len: int, generator: torch.Generator) -> Tensor:
    start = int(torch.randint(ids.numel() - seq_len + 1, (1,), generator=generator))
    return ids[start : start + seq_len].clone()


def _wikitext2(tokenize: Tokenize, num_samples: int, seq_len: int, generator: torch.Generator) -> list[Tensor]:
    """Random windows of the whole training text (GPTQ's sampling)."""
    lines = fetch("Salesforce/wikitext", "wikitext-2-raw-v1", split="train")["text"]
    ids = tokenize("\n\n".join(lines))
    if ids.numel() < seq_len:
        return []
    return [_window(ids, seq_len, generator) for _ in range(num_samples)]


def _from_long_documents(documents: Iterator[str]) -> Sampler:
    """A random window of each of the first documents that are longer than a row."""

    def sample(tokenize: Tokenize, num_samples: int, seq_len: int, generator: torch.Generator) -> list[Tensor]:
        rows: list[Tensor] = []
        skipped = 0
        for text in documents:
            if len(rows) == num_samples or skipped == _PATIENCE:
                break
            # A token is at least one byte, so a text with fewer bytes cannot fill a row.
            ids = tokenize(text) if len(text.encode()) > seq_len else None
            if ids is None or ids.numel() <= seq_len:
                skipped += 1
                continue
            skipped = 0
            rows.append(_window(ids, seq_len, generator))
        return rows

    return sample


def _streamed(*path: str, **kwargs: Any) -> Sampler:
    def sample(tokenize: Tokenize, num_samples: int, seq_len: int, generator: torch.Generator) -> list[Tensor]:
        stream = fetch(*path, split="train", streaming=True, **kwargs)
        stream = stream.shuffle(seed=generator.initial_seed(), buffer_size=_SHUFFLE_BUFFER)
        return _from_long_documents(row["text"] for row in stream)(tokenize, num_samples, seq_len, generator)

    return sample


NAMED_DATASETS: dict[str, Sampler] = {
    "wikitext2": _wikitext2,
    "c4": _streamed("allenai/c4", data_files={"train": "en/c4-train.00000-of-01024.json.gz"}),
    "redpajama": _streamed("togethercomputer/RedPajama-Data-1T-Sample"),
}
