"""How fast a model generates."""

import statistics
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from ..calibration.collector import input_device
from ..errors import EvaluationError
from ..running import evaluating
from .text import context_length


@dataclass(frozen=True)
class DecodeSpeed:
    """How fast a model generates. ``tokens_per_second`` counts the new tokens of the whole batch."""

    tokens_per_second: float
    new_tokens: int
    prompt_tokens: int
    batch: int
    runs: int
    dtype: str
    device: str

    def describe(self) -> str:
        """What was measured, in a line."""
        return (
            f"{self.new_tokens} tokens after a prompt of {self.prompt_tokens}, batch {self.batch}, greedy, "
            f"{self.dtype} on {self.device}, median of {self.runs} runs"
        )


def decode_speed(model: Any, prompt: Tensor, new_tokens: int = 64, runs: int = 3, **options: Any) -> DecodeSpeed:
    """Tokens per second of ``generate``, greedy and of a fixed length: the median of some runs after one that warms up.

    The time is that of whole calls: reading the prompt is part of it.

    Args:
        model: A causal language model.
        prompt: Token ids, int64 ``[tokens]`` or ``[batch, tokens]``.
        new_tokens: Tokens to generate per row, at least 1.
        runs: Calls that are timed, at least 1.
        options: More for ``generate``, e.g. ``custom_generate=hf_guidedquant.graphed_decode``.

    Raises:
        EvaluationError: There is nothing to generate or to time, or prompt and new tokens exceed the model's context.
    """
    ids = torch.atleast_2d(prompt).to(input_device(model))
    batch, length = ids.shape
    if min(batch, length, new_tokens, runs) < 1:
        raise EvaluationError(
            f"The speed of decoding needs a prompt, new tokens and runs, at least 1 of each; got {batch} x {length}, "
            f"{new_tokens} and {runs}."
        )
    longest = context_length(model)
    if longest is not None and length + new_tokens > longest:
        raise EvaluationError(
            f"{length} tokens of the prompt and {new_tokens} new ones exceed the model's context of {longest}."
        )
    settings = {
        "attention_mask": torch.ones_like(ids),
        "do_sample": False,
        "return_dict_in_generate": False,
        "min_new_tokens": new_tokens,
        "max_new_tokens": new_tokens,
        "pad_token_id": 0,
        **options,
    }
    seconds = []
    with evaluating(model):
        for _ in range(1 + runs):
            start = perf_counter()
            # Fetching them waits for the device.
            model.generate(ids, **settings).cpu()
            seconds.append(perf_counter() - start)
    on_gpu = ids.device.type == "cuda"
    return DecodeSpeed(
        batch * new_tokens / statistics.median(seconds[1:]),
        new_tokens,
        length,
        batch,
        runs,
        dtype=str(model.dtype).removeprefix("torch."),
        device=torch.cuda.get_device_name(ids.device) if on_gpu else f"{torch.get_num_threads()} CPU threads",
    )
