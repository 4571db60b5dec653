"""The loop that ``generate`` calls: read the prompt, then take one decode step after the other."""

import inspect
import logging
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
)
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..errors import DecodingError
from .cache import share_column, static_cache
from .processors import settings as processor_settings
from .step import DecodeStep, Report, StepSettings
from .support import check_mode, check_outputs, obstacle

logger = logging.getLogger(__name__)

# Caches are a multiple of this long, so that calls of similar length share a step.
_CACHE_MULTIPLE = 512
# Steps kept per model, each with a cache.
_KEPT = 4


class GraphedDecode:
    """A decode loop for ``model.generate(..., custom_generate=graphed_decode)``.

    Greedy search and sampling as in plain ``generate``, for decoder-only models. On CUDA the whole step (forward pass,
    logits processors, draw, stop tokens) is captured once and replayed for every token. Later calls of the same
    batch size and sampling settings, and of a similar length, reuse it; the first one compiles, which takes a while.
    Short prompts are captured too, once prompts of about that length have come up a few times.

    Greedy tokens are those of plain ``generate`` up to rounding. Samples come from the same distribution and repeat
    under ``torch.manual_seed``, but are not the ones that plain ``generate`` draws under that seed.

    A model or cache that cannot be captured (several devices, offloading, an encoder, a cache of the caller's own)
    decodes with Transformers' own loop, and a warning says so once. ``generate`` hides the argument ``tokenizer``
    from callables, so instead of ``stop_strings`` pass
    ``stopping_criteria=[StopStringCriteria(tokenizer, stop_strings)]``.

    Args:
        compile: Compile the step's forward pass with ``torch.compile``; by default on CUDA only.
        capture: Capture the step as a CUDA graph, if it is on CUDA.
    """

    def __init__(self, compile: bool | None = None, capture: bool = True) -> None:
        self.compile, self.capture = compile, capture
        self._steps: WeakKeyDictionary[nn.Module, dict[tuple[StepSettings, int], DecodeStep]] = WeakKeyDictionary()
        self._warned: set[str] = set()

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> GenerateDecoderOnlyOutput | Tensor:
        """The decoding method: ``generate`` calls it with inputs that it has prepared.

        Returns:
            Token ids ``[batch, length]``, the prompt included; as ``sequences`` with ``return_dict_in_generate``.

        Raises:
            DecodingError: The call asks for beams, an assistant, outputs besides the sequences, or a logits processor
                that cannot be captured.
        """
        # Transformers, at least up to 5.23, hands neither of them to a callable.
        hidden = _arguments_of_generate("streamer", "assistant_model")
        streamer = hidden["streamer"] if streamer is None else streamer
        check_mode(generation_config, hidden["assistant_model"])
        if reason := obstacle(model, model_kwargs.get("past_key_values")):
            self._warn(f"{type(model).__name__} decodes with Transformers' own loop, because {reason}.")
            return model._sample(
                input_ids, logits_processor, stopping_criteria, generation_config, streamer=streamer, **model_kwargs
            )
        check_outputs(generation_config)
        on_cuda = model.device.type == "cuda"
        settings = StepSettings(
            batch_size=len(input_ids),
            device=model.device,
            dtype=model.dtype,
            do_sample=bool(generation_config.do_sample),
            pads=any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria),
            processors=processor_settings(logits_processor),
            compile=(on_cuda if self.compile is None else self.compile) and not generation_config.disable_compile,
            capture=self.capture and on_cuda,
        )
        stops = _Stops.of(stopping_criteria, generation_config, input_ids.shape[1])
        # Buffers outlive the call, and those made in inference mode could not be written outside of it.
        with torch.inference_mode(False), torch.no_grad():
            step = self._take(model, settings, _prompt_length(input_ids, model_kwargs) + stops.limit)
            try:
                with torch.cuda.device_of(step.output):
                    _start(model, step, input_ids, logits_processor, stops, generation_config, model_kwargs)
                    with model._optimize_model_for_decode():
                        sequences = _decode(model, step, input_ids, stops, streamer)
            finally:
                self._put_back(model, step)
        if generation_config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=sequences)  # type: ignore[arg-type]
        return sequences

    def release(self, model: nn.Module | None = None) -> None:
        """Free the graphs, caches and compiled code of one model, or of all."""
        if model is None:
            self._steps.clear()
        else:
            self._steps.pop(model, None)

    def _take(self, model: Any, settings: StepSettings, length: int) -> DecodeStep:
        """A step for ``length`` tokens, out of the kept ones if any fits. No other call can take it meanwhile."""
        cache_length = -(-length // _CACHE_MULTIPLE) * _CACHE_MULTIPLE
        kept = self._steps.setdefault(model, {})
        # In a cache much longer than need be, every step would take longer.
        fitting = [key for key in list(kept) if key[0] == settings and cache_length <= key[1] <= 2 * cache_length]
        for key in sorted(fitting, key=lambda key: key[1]):
            if step := kept.pop(key, None):
                return step
        return DecodeStep(static_cache(model, cache_length), cache_length, settings)

    def _put_back(self, model: Any, step: DecodeStep) -> None:
        kept = self._steps.setdefault(model, {})
        kept[step.settings, step.cache_length] = step
        for key in list(kept)[:-_KEPT]:
            kept.pop(key, None)

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message)


@dataclass(frozen=True)
class _Stops:
    """When rows end: at a token, at a number of new tokens, or when other criteria say so after a token."""

    ids: Tensor
    pad_id: Tensor
    limit: int
    others: StoppingCriteriaList

    @classmethod
    def of(cls, criteria: StoppingCriteriaList, generation_config: Any, prompt_length: int) -> "_Stops":
        ids = [criterion.eos_token_id.cpu() for criterion in criteria if type(criterion) is EosTokenCriteria]
        lengths = [criterion.max_length for criterion in criteria if type(criterion) is MaxLengthCriteria]
        pad_id = generation_config._pad_token_tensor
        return cls(
            ids=torch.cat(ids) if ids else torch.empty(0, dtype=torch.int64),
            # Transformers makes sure that there is one if there are stop tokens.
            pad_id=torch.tensor(0) if pad_id is None else pad_id,
            # As in plain generate, the first token comes before the first question whether to stop.
            limit=max(1, min(lengths, default=generation_config.max_length) - prompt_length),
            others=StoppingCriteriaList(c for c in criteria if type(c) not in (EosTokenCriteria, MaxLengthCriteria)),
        )


def _start(
    model: Any,
    step: DecodeStep,
    input_ids: Tensor,
    processors: LogitsProcessorList,
    stops: _Stops,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
) -> None:
    """Read the prompt, choose the first token, and set the step's inputs for the second."""
    device = step.output.device
    model_kwargs = model_kwargs | {"past_key_values": step.cache}
    outputs = _read(model, step, input_ids, generation_config, model_kwargs)
    model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
    # The token itself is not known yet: a zero holds its place.
    inputs = model.prepare_inputs_for_generation(
        nn.functional.pad(input_ids, (0, 1)), next_sequence_length=1, **model_kwargs
    )
    mask = model_kwargs.get("attention_mask")
    if mask is None:
        mask = torch.ones(len(input_ids), _prompt_length(input_ids, model_kwargs) + 1, dtype=torch.int64)
    # Of two dimensions: the forward pass makes masks out of it, inside of what is compiled.
    inputs["attention_mask"] = mask.to(device)
    for name, value in inputs.items():
        # Anything of another length may be meant to grow.
        if isinstance(value, Tensor) and name not in ("attention_mask", "position_ids") and value.shape[1:2] != (1,):
            raise DecodingError(f"a model input like {name} {tuple(value.shape)}, which one token does not have")
    step.start(outputs.logits[:, -1], inputs, input_ids.to(device), processors, stops.ids, stops.pad_id)


def _read(
    model: Any, step: DecodeStep, input_ids: Tensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any]
) -> Any:
    """The forward pass over the prompt, into the step's cache."""
    if generation_config.prefill_chunk_size is None:
        logits = step.read(model, input_ids, model_kwargs)
        if logits is not None:
            return CausalLMOutputWithPast(logits=logits[:, None], past_key_values=step.cache)
    share_column(step.cache, None)
    step.cache.reset()
    outputs = model._prefill(input_ids, generation_config, model_kwargs)
    # Afterwards, for what runs for the first time may change the model.
    step.refresh(model)
    return outputs


def _decode(model: Any, step: DecodeStep, input_ids: Tensor, stops: _Stops, streamer: Any) -> Tensor:
    """Take steps until all rows end, and return the sequences."""
    length = 0
    for report in _reports(model, step, input_ids, stops):
        tokens, running = report.read()
        length += 1
        if streamer is not None:
            streamer.put(tokens)
        if not running:
            break
    if streamer is not None:
        streamer.end()
    return step.sequences(input_ids, length)


def _reports(model: Any, step: DecodeStep, input_ids: Tensor, stops: _Stops) -> Iterator[Report]:
    """Take steps up to the limit, and report each of them.

    On CUDA a step is reported while the next one runs, so that the device never waits for the host.
    """
    behind = 1 if step.output.is_cuda and not stops.others else 0
    sent: deque[Report] = deque()
    for length in range(1, stops.limit + 1):
        if length > 1:
            step.run(model)
        if stops.others:
            step.finish_rows(stops.others(step.sequences(input_ids, length), None))
        sent.append(step.report())
        if len(sent) > behind:
            yield sent.popleft()
    yield from sent


def _arguments_of_generate(*names: str) -> dict[str, Any]:
    """Arguments of the ``generate`` that is calling; None for what it does not have."""
    code = inspect.unwrap(GenerationMixin.generate).__code__
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return {name: None if frame is None else frame.f_locals.get(name) for name in names}


def _prompt_length(input_ids: Tensor, model_kwargs: dict[str, Any]) -> int:
    """Tokens of the prompt in the cache."""
    embeds = model_kwargs.get("inputs_embeds")
    return (input_ids if embeds is None else embeds).shape[1]


__all__ = ["GraphedDecode"]
