"""The decode step: one token for every row, on buffers that stay where they are."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, LogitsProcessor
from transformers.utils import output_capturing

from ..errors import NonFiniteScoresError
from ..replay import Replay
from ..running import hooked
from .attention import attention_for_decoding
from .cache import share_column
from .capture import Compiled, facts, model_facts
from .processors import ScoresOnly, captured, token_mask
from .prompt import PromptReader

_ARGMAX_WIDTH = 128
# Where torch keeps the hooks of all modules.
_GLOBAL = nn.modules.module


@dataclass(frozen=True)
class StepSettings:
    """What a step depends on besides the model and the length of its cache."""

    batch_size: int
    device: torch.device
    dtype: torch.dtype
    do_sample: bool
    # Rows that have met a stop token go on with padding.
    pads: bool
    processors: tuple[Hashable, ...]
    compile: bool
    capture: bool


@dataclass(frozen=True)
class Report:
    """What the host learns of a step, once its copy has arrived."""

    values: Tensor
    copied: torch.cuda.Event | None

    def read(self) -> tuple[Tensor, bool]:
        """The tokens ``[batch]``, and whether any row goes on.

        Raises:
            NonFiniteScoresError: A token was drawn from scores that are NaN or infinite.
        """
        if self.copied is not None:
            self.copied.synchronize()
        if self.values[-1]:
            raise NonFiniteScoresError
        return self.values[:-2], bool(self.values[-2])


class DecodeStep:
    """Forward pass, logits processors, choice, stop tokens and bookkeeping of one token per row.

    Attributes:
        cache: Static key-value cache that the step fills, ``cache_length`` tokens long.
        output: New tokens, int64 ``[batch, cache_length]``; columns beyond the tokens generated are undefined.
    """

    def __init__(self, cache: Cache, cache_length: int, settings: StepSettings) -> None:
        self.cache, self.cache_length, self.settings = cache, cache_length, settings
        batch_size, device = settings.batch_size, settings.device
        self.output = torch.zeros(batch_size, cache_length, dtype=torch.int64, device=device)
        # New tokens so far, and the column of the cache that the next forward pass fills.
        self._generated = torch.zeros(1, dtype=torch.int64, device=device)
        self._column = torch.zeros(1, dtype=torch.int64, device=device)
        self._pad = torch.zeros(1, dtype=torch.int64, device=device)
        self._unfinished = torch.ones(batch_size, dtype=torch.bool, device=device)
        self._report = torch.zeros(batch_size + 2, dtype=torch.int64, device=device)
        self._forward: Callable[..., Tensor] = Compiled(_scores) if settings.compile else _scores
        self._replay = Replay(device, "The decode step") if settings.capture else None
        self._prompts = PromptReader(cache, cache_length, device) if settings.capture else None
        self._layout: Hashable = None
        self._model_facts: Hashable = None
        self._heard = False

    def refresh(self, model: nn.Module) -> None:
        """Drop the graphs if the model is not what it was: weights replaced, hooks added, settings changed."""
        current = model_facts(model)
        if self._model_facts == current:
            return
        self._model_facts = current
        self._heard = _heard(model)
        if self._replay is not None:
            self._replay.reset()
        if self._prompts is not None:
            self._prompts.reset()

    def read(self, model: nn.Module, input_ids: Tensor, model_kwargs: dict[str, Any]) -> Tensor | None:
        """Fill the cache with a short prompt ``[batch, length]``.

        Returns:
            Scores of the first token, ``[batch, vocabulary]``, or None if it is not one to capture; the cache is
            to be filled in another way then.
        """
        if self._prompts is None:
            return None
        inputs = self._prompts.inputs(model, input_ids, model_kwargs)
        if inputs is None:
            return None
        self.refresh(model)
        if self._heard or _GLOBAL._global_forward_hooks or _GLOBAL._global_forward_pre_hooks:
            return None
        logits, replayed = self._prompts.read(model, inputs)
        if not replayed:
            self.refresh(model)
        share_column(self.cache, self._column.fill_(input_ids.shape[1]))
        return logits

    def start(
        self,
        logits: Tensor,
        inputs: dict[str, Any],
        prompt: Tensor,
        processors: Sequence[LogitsProcessor],
        stop_ids: Tensor,
        pad_id: Tensor,
    ) -> None:
        """Choose the first token, and set the buffers for the second.

        Args:
            logits: What the model, whose cache holds the prompt, says of the first token, ``[batch, vocabulary]``.
            inputs: Its inputs for the second token, but for the token itself. ``attention_mask`` is
                ``[batch, prompt + 1]``.
            prompt: Token ids ``[batch, length]``.
            processors: The call's logits processors.
            stop_ids: Tokens that end a row.
            pad_id: The token that follows them.
        """
        mask = inputs["attention_mask"]
        self._column.fill_(mask.shape[1] - 1)
        inputs = inputs | {"attention_mask": nn.functional.pad(mask, (0, self.output.shape[1] - mask.shape[1]))}
        layout = (facts(inputs, lambda tensor: (tensor.shape, tensor.dtype)), logits.shape)
        if self._layout != layout:
            self._allocate(logits, inputs, processors)
            self._layout = layout
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                self._inputs[name].copy_(value)
        for ours, theirs in zip(self._processors, processors, strict=True):
            ours.start(theirs, prompt)
        self._stops.copy_(token_mask(stop_ids, self._stops))
        self._pad.copy_(pad_id)
        share_column(self.cache, self._column)
        self._generated.zero_()
        self._unfinished.fill_(True)
        self._choose(logits.float())

    def run(self, model: nn.Module) -> None:
        """Generate one more token for every row."""
        if self._replay is None:
            self._advance(model)
        else:
            self._replay(lambda: self._advance(model))

    def finish_rows(self, done: Tensor) -> None:
        """End the rows that ``done`` (bool ``[batch]``) marks."""
        self._unfinished &= ~done.to(self._unfinished.device)
        self._report[-2:-1] = self._unfinished.any()

    def sequences(self, input_ids: Tensor, length: int) -> Tensor:
        """The prompt ``[batch, prompt]`` and the first ``length`` new tokens."""
        return torch.cat([input_ids, self.output[:, :length].to(input_ids.device)], dim=1)

    def report(self) -> Report:
        """Start to copy the last tokens to the host."""
        if self._report.device.type != "cuda":
            return Report(self._report.clone(), None)
        values = torch.empty(self._report.shape, dtype=self._report.dtype, pin_memory=True)
        values.copy_(self._report, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        return Report(values, copied)

    def _allocate(self, logits: Tensor, inputs: dict[str, Any], processors: Sequence[LogitsProcessor]) -> None:
        """New buffers for inputs like these; a graph on the old ones is dropped."""
        if self._replay is not None:
            self._replay.reset()
        self._inputs = {k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()}
        self._stops = torch.zeros_like(logits[0], dtype=torch.bool)
        self._processors: list[ScoresOnly] = captured(processors, logits)

    def _advance(self, model: nn.Module) -> None:
        """The step itself."""
        with attention_for_decoding(model):
            scores = self._forward(model, self._inputs)
        if "position_ids" in self._inputs:
            self._inputs["position_ids"].add_(1)
        self._inputs["attention_mask"].index_fill_(1, self._column.add_(1), 1)
        self._choose(scores)

    def _choose(self, scores: Tensor) -> None:
        """Pick a token per row from scores ``[batch, vocabulary]``, and write it down."""
        for process in self._processors:
            scores = process(scores, self._generated)
        if self.settings.do_sample:
            probabilities = scores.softmax(dim=-1)
            # The largest p / e with e ~ Exp(1) is a draw from p. torch.multinomial would make the host wait.
            scores = probabilities / torch.empty_like(probabilities).exponential_()
        tokens = _argmax(scores)
        if self.settings.do_sample:
            # NaN counts as the largest.
            self._report[-1:] = scores.gather(1, tokens[:, None]).isnan().any()
        for process in self._processors:
            process.observe(tokens)
        stopped = self._stops[tokens]
        if self.settings.pads:
            tokens = torch.where(self._unfinished, tokens, self._pad)
        self._unfinished.logical_and_(~stopped)
        self._inputs["input_ids"].copy_(tokens[:, None])
        self.output.index_copy_(1, self._generated, tokens[:, None])
        self._generated.add_(1)
        self._report[:-2] = tokens
        self._report[-2:-1] = self._unfinished.any()


def _heard(model: nn.Module) -> bool:
    """Whether somebody listens to modules of the model, who will want to hear of prompts."""
    hooks = [
        hook for m in model.modules() for each in (m._forward_hooks, m._forward_pre_hooks) for hook in each.values()
    ]
    # Transformers leaves its own in place; they do nothing unless a call asks for hidden states.
    own = output_capturing.__name__
    return hooked(model) or any(getattr(hook, "__module__", None) != own for hook in hooks)


def _scores(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Scores of the next token in fp32, ``[batch, vocabulary]``."""
    return model(**inputs, return_dict=True).logits[:, -1].float()


def _argmax(scores: Tensor) -> Tensor:
    """``scores.argmax(dim=-1)``, faster: torch gives a long row to one program."""
    batch_size, size = scores.shape
    if size % _ARGMAX_WIDTH:
        return scores.argmax(dim=-1)
    largest, columns = scores.view(batch_size, -1, _ARGMAX_WIDTH).max(dim=-1)
    part = largest.argmax(dim=-1, keepdim=True)
    return (part * _ARGMAX_WIDTH + columns.gather(1, part)).squeeze(1)


__all__ = ["DecodeStep", "Report", "StepSettings"]
