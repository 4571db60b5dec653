"""How good a model is: perplexity."""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils.logging import tqdm

from .calibration.collector import input_device
from .calibration.rows import tokenize
from .errors import CalibrationError


def perplexity(model: Any, tokenizer: Any, text_or_dataset: Any, context: int = 2048) -> float:
    """Perplexity on a text, by the protocol that quantization papers use.

    The whole text is tokenized once, without special tokens, and cut into non-overlapping windows of ``context``
    tokens; each window is read by itself, and the result is ``exp`` of the mean negative log-likelihood over the
    ``context - 1`` predicted tokens of all windows. The rest that does not fill a window is left out, unless the text
    is shorter than one.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer. Not used for token ids.
        text_or_dataset: A text, a list of texts or a Dataset with a ``text`` column (joined by blank lines), or token
            ids as an int64 tensor.
        context: Tokens per window, at least 2.

    Raises:
        CalibrationError: Fewer than two tokens, or a ``context`` below 2 or beyond the model's.
    """
    ids = token_ids(tokenizer, text_or_dataset)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and context > longest:
        raise CalibrationError(f"context={context} is longer than the model's context of {longest} tokens.")
    if context < 2 or ids.numel() < 2:
        raise CalibrationError(
            f"Perplexity needs a context and a text of at least 2 tokens, got {context} and {ids.numel()}."
        )
    count = ids.numel() // context
    windows = ids[: count * context].view(count, context) if count else ids.unsqueeze(0)
    device = input_device(model)
    total = 0.0
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for window in tqdm(windows, desc="Perplexity", unit="window"):
                logits = model(input_ids=window.unsqueeze(0).to(device), use_cache=False).logits[0, :-1]
                total += F.cross_entropy(logits.float(), window[1:].to(logits.device), reduction="sum").item()
    finally:
        model.train(training)
    return math.exp(total / (windows.shape[0] * (windows.shape[1] - 1)))


def token_ids(tokenizer: Any, text_or_dataset: Any) -> Tensor:
    """Token ids, int64 ``[tokens]``, of a text, or of a list of texts or a Dataset with a ``text`` column as one."""
    if isinstance(text_or_dataset, Tensor):
        if text_or_dataset.is_floating_point():
            raise CalibrationError(f"Token ids must be integers, got {text_or_dataset.dtype}.")
        return text_or_dataset.flatten()
    text = text_or_dataset
    if not isinstance(text, str):
        rows: Iterable[str] = text["text"] if hasattr(text, "column_names") else text
        text = "\n\n".join(row for row in rows if row)
    return tokenize(tokenizer, text)
