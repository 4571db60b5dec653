"""What a run would do, before it does anything: decisions, sizes, memory, and time by a short probe of the machine."""

import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from .auto import auto_class
from .calibration import Footprint, Outline, divide, outline
from .config import GuidedQuantConfig, ReconstructSpec
from .errors import ModelError
from .experts import unfused
from .linears import size_of, tensors_of
from .plan import LayerPlan, Plan, plan_layers
from .report import align, sizes
from .resources import WEIGHTS_SHARE, compute_device, reproducible, total_memory
from .solvers import SolverSpec, solve
from .solvers.hessian import condition
from .solving import solver_work
from .training import check_blocks, held_back, stack_size

# Of the symmetric products for Hessians, what is computed.
_GRAM_SHARE = 0.63
# Bytes read and written per weight for codes, codewords, gradients and the optimizer in a step of training.
_STEP_BYTES = 100


@dataclass(frozen=True)
class Forecast(Plan):
    """The plan of a run, and what it will take.

    Attributes:
        segments: Parts of the model that are calibrated and solved one after the other, for lack of memory for more.
        memory: Device -> the most bytes in use at a time, weights included; what Python and its libraries take is not.
        seconds: Stage -> time on this machine, reading and writing files left out. Empty without a probe.
    """

    segments: int = 1
    memory: dict[str, int] = field(default_factory=dict)
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
    model: nn.Module | str | os.PathLike, config: GuidedQuantConfig, *, probe: bool = True, **kwargs: Any
) -> Forecast:
    """What quantizing a model would do and take. No weights are needed, and nothing is changed.

    Args:
        model: A causal language model on any devices, the meta device included; or the name or folder of one, of which
            only the config is fetched.
        config: What is to be done. Of its data only ``num_samples`` and ``seq_len`` count.
        probe: Measure this machine for some seconds, to tell the time.
        **kwargs: For a name: what ``AutoConfig.from_pretrained`` takes, as ``revision`` or ``trust_remote_code``.

    Returns:
        The forecast; ``print(plan(...).table())`` shows it.

    Raises:
        ConfigError: An override or exclusion matches no module.
        NoLinearLayersError: Nothing is left to quantize.
        ModelError: The name is no model's, or the memory is too small, whatever is done.
    """
    subject: Any = _empty_model(model, **kwargs) if isinstance(model, str | os.PathLike) else model
    with unfused(subject, config, only_inside=True):
        return _plan(subject, config, probe)


def _plan(subject: Any, config: GuidedQuantConfig, probe: bool) -> Forecast:
    decided = plan_layers(subject, config)
    device = compute_device(torch.device("cpu"), config.device)
    fits = device.type != "cpu" and size_of(subject) <= WEIGHTS_SHARE * total_memory(device)

    def home(stored: torch.device) -> torch.device:
        """Where weights that are nowhere yet would lie."""
        return stored if stored.type != "meta" else device if fits else torch.device("cpu")

    def place(stored: torch.device) -> torch.device:
        return compute_device(home(stored), config.device)

    tokens = min(config.seq_len, getattr(subject.config.get_text_config(), "max_position_embeddings", config.seq_len))
    needs_data = decided.needs_data or bool(config.reconstruct)
    drawn = outline(subject, tokens, config.guided, place) if needs_data else Outline()
    if config.reconstruct:
        check_blocks(subject, drawn)
    footprint = Footprint(subject, decided.layers, drawn, place, home)
    borders = [(segment.start, segment.stop) for segment in divide(footprint, config, config.num_samples)]
    memory: Counter[torch.device] = Counter(footprint.resident)
    for start, stop in borders:
        for where, need in footprint(start, stop).items():
            memory[where] = max(memory[where], footprint.resident[where] + need)
    waiting = len(borders) - 1
    if (spec := config.reconstruct_spec) is not None:
        trained = config.num_samples - held_back(config.num_samples, spec.held_back)
        stack = min(trained, stack_size(tokens, spec.batch_tokens))
        itemsize = 2 if device.type == "cuda" else subject.dtype.itemsize
        for where, need in footprint.reconstruction(stack, itemsize).items():
            memory[where] = max(memory[where], footprint.resident[where] + need)
        # The original's and the quantized blocks'. What leaves a block takes the place of what entered it, on a GPU.
        waiting = max(waiting, 2 if device.type == "cuda" else 3)
    # Outside wait weights, hidden states between segments, and what is finished.
    memory[torch.device("cpu")] += (
        sum(tensor.nbytes for tensor in tensors_of(subject) if home(tensor.device) != place(tensor.device))
        + waiting * config.num_samples * drawn.border
        + sum(layer.packed_bytes for layer in decided.layers)
    )
    seconds = {}
    if probe and decided.needs_data:
        passes = 2 - 1 / len(borders)
        seconds["calibration"] = config.num_samples * _row_seconds(
            drawn, decided.layers, tokens, passes, subject.dtype, device
        )
    if probe:
        seconds["solving"] = _solving_seconds(decided.layers, config, device)
    if probe and spec is not None:
        seconds["reconstruction"] = _training_seconds(drawn, decided.layers, config.num_samples, spec, device, subject)
    return Forecast(
        **{part.name: getattr(decided, part.name) for part in fields(Plan)},
        segments=len(borders),
        memory={str(where): size for where, size in memory.items()},
        seconds=seconds,
    )


def _empty_model(name: str | os.PathLike, **kwargs: Any) -> Any:
    """The model on the meta device, in the dtype that it is saved in."""
    try:
        config = AutoConfig.from_pretrained(name, **kwargs)
    except ValueError as error:
        raise ModelError(f"{name} is no model that Transformers knows: {error}") from error
    trust = {"trust_remote_code": kwargs["trust_remote_code"]} if "trust_remote_code" in kwargs else {}
    with torch.device("meta"):
        return auto_class(config).from_config(config, dtype=config.get_text_config().dtype or torch.float32, **trust)


def _row_seconds(
    drawn: Outline, layers: Sequence[LayerPlan], tokens: int, passes: float, dtype: torch.dtype, device: torch.device
) -> float:
    """Seconds that a row takes: every operation at the machine's rate of arithmetic or of memory, whichever is slower.

    ``passes`` is how often the row is run forward.
    """
    machine = _Machine(device, dtype)
    total = sum((1.0 if op.backward else passes) * machine.seconds(op.flops, op.nbytes) for op in drawn.work)
    for layer in layers:
        read = drawn.reads.get(layer.name, tokens)
        activations = read * (5 * layer.in_features + 2 * layer.out_features) * dtype.itemsize
        total += machine.seconds(0, activations + 2 * layer.statistics_bytes)
        if layer.statistics == "hessian":
            total += machine.seconds(int(2 * _GRAM_SHARE * read * layer.num_groups * layer.in_features**2), 0)
    return total


def _training_seconds(
    drawn: Outline, layers: Sequence[LayerPlan], rows: int, spec: ReconstructSpec, device: torch.device, model: Any
) -> float:
    """Seconds that training block by block takes: rows forward and backward, and every step on the weights."""
    machine = _Machine(device, torch.bfloat16 if device.type == "cuda" else model.dtype)
    stack = stack_size(drawn.tokens, spec.batch_tokens)
    forward, backward = (
        sum(machine.seconds(stack * op.flops, stack * op.nbytes) for op in drawn.block_work if op.backward is which)
        / stack
        for which in (False, True)
    )
    # Without a guided pass its backward half is not known; either way the weights' gradients come on top of it.
    trained = (1 - spec.held_back) * rows * spec.epochs
    steps = trained * drawn.tokens / max(spec.batch_tokens, drawn.tokens)
    each = sum(machine.seconds(0, _STEP_BYTES * layer.weights) for layer in layers)
    return 3 * rows * forward + trained * (2 * forward + (backward or forward)) + steps * each


class _Machine:
    """What a device is able to, measured: operations and bytes per second, and seconds that any operation takes."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        size = 4096 if device.type == "cuda" else 512
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        large, small = (
            torch.randn(2**26 if device.type == "cuda" else 2**23, device=device),
            torch.ones(8, device=device),
        )
        self._flops = 2 * size**3 / _seconds(lambda: a @ b, device)
        self._bytes = 2 * large.nbytes / _seconds(large.clone, device)
        self._least = _seconds(lambda: [small + 1 for _ in range(200)], device) / 200

    def seconds(self, flops: int, nbytes: int) -> float:
        return max(flops / self._flops, nbytes / self._bytes, self._least)


def _solving_seconds(layers: Sequence[LayerPlan], config: GuidedQuantConfig, device: torch.device) -> float:
    """Time of all layers, from one of each method and bit width that is no larger than it has to be."""
    kinds = {(layer.method, layer.bits): layer for layer in layers}
    rates = {kind: _solver_rate(layer, config, device) for kind, layer in kinds.items()}
    return sum(solver_work(layer) / rates[layer.method, layer.bits] for layer in layers)


def _solver_rate(layer: LayerPlan, config: GuidedQuantConfig, device: torch.device) -> float:
    """Work per second (:func:`solver_work`) on a layer of random numbers."""
    most = (4096, 4096) if device.type == "cuda" else (256, 512)
    rows, inputs = min(most[0], layer.out_features), min(most[1], layer.in_features)
    sample = replace(layer, out_features=rows, in_features=inputs, num_groups=1)
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(1, rows, inputs, generator=generator, device=device)
    hessian = None
    if layer.statistics != "none":
        x = torch.randn(2 * inputs, inputs, generator=generator, device=device)
        sums = x.mT @ x if layer.statistics == "hessian" else x.square().sum(dim=0)
        hessian, _ = condition(sums.unsqueeze(0), layer.name)
    spec = SolverSpec(
        layer.bits,
        torch.float16,
        config.lnq_sweeps,
        config.lnq_iterations,
        config.lnq_cycles,
        config.kmeans_iterations,
        min(layer.outliers, inputs - 1),
    )
    with reproducible():
        return solver_work(sample) / _seconds(lambda: solve(layer.method, weight, hessian, spec), device, 2)


def _seconds(call: Callable[[], Any], device: torch.device, repeats: int = 5) -> float:
    """The least of several calls, after one that does not count: others may be at work too."""
    times = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


__all__ = ["Forecast", "plan"]
