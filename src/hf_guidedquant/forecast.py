"""What a run would do, before it does anything: decisions, sizes, memory, and time by a short probe of the machine."""

import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache, cached_property, reduce
from operator import or_
from typing import Any

import torch
from torch import nn

from .auto import auto_class, check_unquantized, read_config
from .budget import diagonal_only, one_pass_serves, undecided, widths_near
from .calibration import Footprint, Outline, divide, fit_at_once, outline, shelved, waiting
from .config import DistillSpec, GuidedQuantConfig, ReconstructSpec
from .experts import unfused
from .linears import linear_shape, size_of, tensors_of, vocabulary_layers
from .nn import WEIGHTS_AT_A_TIME
from .plan import LayerPlan, Plan, called_only, plan_layers
from .probe import Machine, calibration_seconds, distillation_seconds, reconstruction_seconds, solving_seconds
from .report import align, sizes
from .resources import VISIT_SHARE, WEIGHTS_SHARE, compute_device, free_memory, total_memory
from .training import check_blocks, check_rows, held_back, logit_bytes, output_head, stack_size

# Where weights lie -> where they are worked on.
_Place = Callable[[torch.device], torch.device]
_HOST = torch.device("cpu")


@dataclass(frozen=True)
class Forecast(Plan):
    """The plan of a run, and what it will take.

    Attributes:
        segments: Parts of the model that are calibrated and solved one after the other, for lack of memory for more.
        memory: Device -> the most bytes in use at a time, weights and hidden states that wait on the CPU included; what
            Python and its libraries take is not.
        mean_bits: The mean that widths will be chosen for when the data has been read; until then layers count with
            the next integer. None if there is nothing to choose.
        seconds: Stage, as in a report, -> time on this machine, reading and writing files left out. The choice of
            widths for a mean number of bits is part of ``"calibration"``. Empty without a probe.
    """

    segments: int = 1
    memory: dict[str, int] = field(default_factory=dict)
    mean_bits: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def table(self) -> str:
        """A line per kind of layer (same last name, shape and settings), what is left alone, and the totals."""
        sparse = any(layer.outliers for layer in self.layers)
        kinds = Counter(
            (
                layer.name.rpartition(".")[2],
                f"{layer.out_features} x {layer.in_features}",
                str(layer.bits),
                layer.method,
                *([str(layer.outliers)] * sparse),
            )
            for layer in self.layers
        )
        rows = [["layer", "count", "out x in", "bits", "method", *(["outliers a row"] * sparse)]]
        rows += [[name, str(count), *rest] for (name, *rest), count in kinds.items()]
        lines = align(rows)
        if self.mean_bits is not None:
            chosen = f"bits: widths with a mean of {self.mean_bits:g} are chosen when the data has been read; "
            lines.append(chosen + f"until then {math.ceil(self.mean_bits)} counts")
        reasons: dict[str, int] = {}
        for reason in self.skipped.values():
            reasons[reason] = reasons.get(reason, 0) + 1
        lines += [f"{count} left alone: {reason}" for reason, count in reasons.items()]
        lines.append(sizes(self))
        peaks = ", ".join(f"{size / 2**30:.2f} GiB on {device}" for device, size in self.memory.items())
        lines.append(f"memory: {peaks}; {self.segments} segment{'s' if self.segments > 1 else ''}")
        if self.seconds:
            lines.append("time: " + ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in self.seconds.items()))
        return "\n".join(lines)


def plan(
    model: nn.Module | str | os.PathLike,
    config: GuidedQuantConfig | dict[str, Any],
    *,
    probe: bool = True,
    **kwargs: Any,
) -> Forecast:
    """What quantizing a model would do and take. No weights are needed, and nothing is changed.

    Args:
        model: A causal language model on any devices, the meta device included; or the name or folder of one, of which
            only the config is fetched.
        config: What is to be done, as a config or a dictionary of its fields. Of its data only ``num_samples`` and
            ``seq_len`` count.
        probe: Measure this machine for some seconds, to tell the time.
        **kwargs: For a name: what ``AutoConfig.from_pretrained`` takes, as ``revision`` or ``trust_remote_code``.

    Returns:
        The forecast; ``print(plan(...).table())`` shows it.

    Raises:
        ConfigError: An override or exclusion matches no module.
        NoLinearLayersError: Nothing is left to quantize.
        AlreadyQuantizedError: The name is a quantized model's.
        ModelError: The name is no model's, the memory is too small, whatever is done, or the model cannot be trained as
            it is to be.
        CalibrationError: A single row of data is to be trained on.
    """
    config = GuidedQuantConfig(**config) if isinstance(config, dict) else config
    subject: Any = _empty_model(model, **kwargs) if isinstance(model, str | os.PathLike) else model
    with unfused(subject, config, only_inside=True):
        return _plan(subject, config, probe)


def _plan(subject: Any, config: GuidedQuantConfig, probe: bool) -> Forecast:
    decided = plan_layers(subject, config)
    run = _Run(subject, config, decided)
    memory, segments = run.memory()
    return Forecast(
        **{part.name: getattr(run.decided, part.name) for part in fields(Plan)},
        segments=segments,
        memory={str(where): size for where, size in memory.items()},
        mean_bits=config.bits if isinstance(config.bits, float) else None,
        seconds=run.seconds() if probe else {},
    )


class _Run:
    """What a run does with a model, stage by stage."""

    def __init__(self, model: Any, config: GuidedQuantConfig, decided: Plan) -> None:
        self._model, self._config = model, config
        self._rows, self._device = config.num_samples, compute_device(_HOST, config.device)
        self._fits = self._device.type != "cpu" and size_of(model) <= WEIGHTS_SHARE * total_memory(self._device)
        self._block_wise, self._end_to_end = config.reconstruct_spec, config.distill_spec
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", config.seq_len)
        self._tokens = min(config.seq_len, longest)
        training = bool(self._block_wise or self._end_to_end)
        needs_data = decided.needs_data or bool(undecided(model, config, decided)) or training
        self._drawn = outline(model, self._tokens, config.guided, self._place) if needs_data else Outline()
        run_once = self._drawn if needs_data else outline(model, 1, False, self._place)
        self.decided = called_only(model, decided, run_once.reads)
        self._undecided = diagonal_only(undecided(model, config, self.decided))
        if training:
            check_rows(self._rows)
        if self._block_wise:
            check_blocks(model, self._drawn)
        # Training has gradients, whatever calibration does.
        other = training and not config.guided
        self._trained = outline(model, self._tokens, True, self._place) if other else self._drawn

    def memory(self) -> tuple[Counter[torch.device], int]:
        """The most bytes in use on every device, weights included; and the number of segments."""
        weights = self._footprint(self._drawn)
        *first, (_, calibration, segments) = self._passes
        stages = [calibration]
        if self._block_wise:
            stages.append(self._reconstruction(self._block_wise))
        for stage in stages:
            stage[_HOST] += sum(layer.packed_bytes for layer in self.decided.layers)
        if self._end_to_end:
            stages += self._distillation(self._end_to_end)
            hidden = linear_shape(output_head(self._model))[1]
            for stage in stages:
                # The original's last hidden states, from the first stage to the last.
                stage[_HOST] += self._waiting(self._tokens * hidden * self._model.dtype.itemsize)
        stages += [need for _, need, _ in first]
        found = weights.resident + reduce(or_, stages)
        found[_HOST] += sum(
            tensor.nbytes
            for tensor in tensors_of(self._model)
            if self._home(tensor.device) != self._place(tensor.device)
        )
        return found, segments

    def seconds(self) -> dict[str, float]:
        """Time by stage."""
        layers, found, machine = self.decided.layers, {}, cache(Machine)
        calibrated = machine(self._device, self._model.dtype)
        calibration = sum(
            calibration_seconds(calibrated, self._drawn, gathered, self._rows, parts)
            for gathered, _, parts in self._passes
        )
        if self._undecided:
            widths = widths_near(float(self._config.bits))
            tried = [replace(layer, bits=bits) for layer in self._undecided for bits in widths]
            calibration += solving_seconds(tried, self._config, self._device)
        if self.decided.needs_data or self._undecided:
            found["calibration"] = calibration
        found["solving"] = solving_seconds(layers, self._config, self._device)
        if self._block_wise:
            trained = machine(self._device, self._products(self._device))
            found["reconstruction"] = reconstruction_seconds(
                trained, self._trained, layers, self._rows, self._block_wise
            )
        if self._end_to_end:
            device = self._whole(self.decided.dense_bytes)(self._model.device)
            trained = machine(device, self._products(device))
            head = linear_shape(output_head(self._model))
            trainable = [layer for layer in layers if layer.name not in vocabulary_layers(self._model)]
            found["distillation"] = distillation_seconds(
                trained, self._trained, trainable, head, self._rows, self._end_to_end
            )
        return found

    @cached_property
    def _passes(self) -> list[tuple[Sequence[LayerPlan], Counter[torch.device], int]]:
        """Layers, bytes beside the weights and segments of every pass over the data; the last one is the solver's."""
        layers = self.decided.layers
        both = one_pass_serves(layers, self._undecided)
        if both is not None and fit_at_once(self._footprint(self._drawn, both), self._config):
            return [self._calibration(both)]
        return [self._calibration(part) for part in (self._undecided, layers) if part or part is layers]

    def _calibration(self, layers: Sequence[LayerPlan]) -> tuple[Sequence[LayerPlan], Counter[torch.device], int]:
        """A pass over the data."""
        footprint = self._footprint(self._drawn, layers)
        segments = divide(footprint, self._config, self._rows)
        need = reduce(or_, (footprint(segment.start, segment.stop) for segment in segments))
        need[_HOST] += waiting(len(segments), self._config.guided) * self._waiting(self._drawn.border)
        return layers, need, len(segments)

    def _reconstruction(self, spec: ReconstructSpec) -> Counter[torch.device]:
        """Bytes beside the weights."""
        stack = self._stack(spec)
        itemsize = self._products(self._device).itemsize
        need = self._footprint(self._trained).reconstruction(stack, itemsize, WEIGHTS_AT_A_TIME, spec.codes)
        # The original's and the quantized blocks'. What leaves a block takes the place of what entered it, on a GPU.
        need[_HOST] += (2 if self._device.type == "cuda" else 3) * self._waiting(self._drawn.border)
        return need

    def _distillation(self, spec: DistillSpec) -> list[Counter[torch.device]]:
        """Bytes beside the weights, of the original's pass over the rows and of the training."""
        place = self._whole(self.decided.dense_bytes)
        prediction = self._footprint(self._trained, place=place).prediction(
            stack_size(self._tokens, self._rows * self._tokens)
        )
        place, stack = self._whole(self.decided.quantized_bytes), self._stack(spec)
        head = linear_shape(output_head(self._model))
        distillation = self._footprint(self._trained, place=place).distillation(
            stack,
            self._products(place(self._model.device)).itemsize,
            WEIGHTS_AT_A_TIME,
            logit_bytes(stack * self._tokens, head[0]),
            vocabulary_layers(self._model),
        )
        return [prediction, distillation]

    def _footprint(
        self, drawn: Outline, layers: Sequence[LayerPlan] | None = None, place: _Place | None = None
    ) -> Footprint:
        return Footprint(
            self._model, self.decided.layers if layers is None else layers, drawn, place or self._place, self._home
        )

    def _stack(self, spec: ReconstructSpec | DistillSpec) -> int:
        """Rows that are trained on together."""
        trained = self._rows - held_back(self._rows, spec.held_back)
        return min(trained, stack_size(self._tokens, spec.batch_tokens))

    def _waiting(self, nbytes: int) -> int:
        """Bytes of what waits on the CPU of every row."""
        return self._rows * shelved(nbytes, self._device)

    def _products(self, device: torch.device) -> torch.dtype:
        """What products of training are computed in."""
        return torch.bfloat16 if device.type == "cuda" else self._model.dtype

    def _home(self, stored: torch.device) -> torch.device:
        """Where weights that are nowhere yet would lie."""
        return stored if stored.type != "meta" else self._device if self._fits else _HOST

    def _place(self, stored: torch.device) -> torch.device:
        return compute_device(self._home(stored), self._config.device)

    def _whole(self, nbytes: int) -> _Place:
        """Where a model of so many bytes runs that is not run in parts: on a GPU in the CPU's stead, if it fits."""
        on_host = {self._home(tensor.device) for tensor in tensors_of(self._model)} == {_HOST}
        fits = self._device.type == "cpu" or nbytes <= VISIT_SHARE * free_memory(self._device)
        return self._place if on_host and fits else self._home


def _empty_model(name: str | os.PathLike, **kwargs: Any) -> Any:
    """The model on the meta device, in the dtype that it is saved in."""
    config = read_config(name, **kwargs)
    check_unquantized(config)
    trust = {"trust_remote_code": kwargs["trust_remote_code"]} if "trust_remote_code" in kwargs else {}
    with torch.device("meta"):
        return auto_class(config).from_config(config, dtype=config.get_text_config().dtype or torch.float32, **trust)


__all__ = ["Forecast", "plan"]
