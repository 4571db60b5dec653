"""The time that the stages of a run take on this machine, of which is measured for some seconds what it is able to."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from .calibration import Outline
from .config import DistillSpec, GuidedQuantConfig, ReconstructSpec
from .nn import sums_by_code
from .plan import LayerPlan
from .resources import reproducible
from .solvers import Factors, solve
from .solvers.hessian import condition
from .solving import solver_spec, solver_work
from .training import held_back, stack_size
from .triton_kernels import lut_dequantize, pack_codes

# Of the symmetric products for Hessians, what is computed.
_GRAM_SHARE = 0.63
# Bytes read and written per weight for codes, codewords, gradients and the optimizer in a step of training.
_STEP_BYTES = 100
# Bytes read and written per logit for the divergence, and for its gradient besides: 16 and 10 times a number in fp32.
_DIVERGENCE_BYTES, _GRADIENT_BYTES = 64, 40


class Machine:
    """What a device is able to, measured: operations and bytes per second, and seconds that any operation takes.

    Attributes:
        device: The device.
        dtype: Of the products that were measured.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        on_gpu = device.type == "cuda"
        size, count = (4096, 2**26) if on_gpu else (512, 2**23)
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        # Into memory that is there: what a process gets anew comes page by page, and most of what a run uses is not.
        large, other, small = (torch.ones(length, device=device) for length in (count, count, 8))
        self._flops = 2 * size**3 / _seconds(lambda: a @ b, device)
        self._bytes = 2 * large.nbytes / _seconds(lambda: other.copy_(large), device)
        self._least = _seconds(lambda: [small + 1 for _ in range(200)], device) / 200

    def seconds(self, flops: int, nbytes: int) -> float:
        """Of an operation: at the rate of arithmetic or of memory, whichever is slower."""
        return max(flops / self._flops, nbytes / self._bytes, self._least)

    def forward(self, drawn: Outline, rows: int) -> float:
        """Of a row, forward through the blocks with others."""
        return self._blocks(drawn, rows, False)

    def backward(self, drawn: Outline, rows: int) -> float:
        """Of a row, backward through the blocks with others; gradients of weights left out."""
        return self._blocks(drawn, rows, True)

    def _blocks(self, drawn: Outline, rows: int, backward: bool) -> float:
        work = [op for op in drawn.block_work if op.backward is backward]
        return sum(self.seconds(rows * op.flops, rows * op.nbytes) for op in work) / rows


def calibration_seconds(
    machine: Machine, drawn: Outline, layers: Sequence[LayerPlan], rows: int, segments: int
) -> float:
    """Of rows that are run forward, again but for the last segment, and backward; and of the layers' statistics."""
    passes = 2 - 1 / segments
    total = sum((1.0 if op.backward else passes) * machine.seconds(op.flops, op.nbytes) for op in drawn.work)
    for layer in layers:
        read = drawn.reads.get(layer.name, drawn.tokens)
        activations = read * (5 * layer.in_features + 2 * layer.out_features) * machine.dtype.itemsize
        total += machine.seconds(0, activations + 2 * layer.statistics_bytes)
        if layer.statistics == "hessian":
            total += machine.seconds(int(2 * _GRAM_SHARE * read * layer.num_groups * layer.in_features**2), 0)
        if layer.output_curvature:
            total += machine.seconds(int(2 * _GRAM_SHARE * read * layer.out_features**2), 0)
    return rows * total


def reconstruction_seconds(
    machine: Machine, drawn: Outline, layers: Sequence[LayerPlan], rows: int, spec: ReconstructSpec
) -> float:
    """Of training block by block: rows forward and backward, and every step on the weights."""
    kept = held_back(rows, spec.held_back)
    stack = min(stack_size(drawn.tokens, spec.batch_tokens), rows - kept)
    forward, backward = machine.forward(drawn, stack), machine.backward(drawn, stack)
    trained = (rows - kept) * spec.epochs
    # All rows through the original and the quantized blocks, and those held back through blocks before and after.
    through = 2 * (rows + kept) * forward
    weights = _weight_gradients(machine, drawn, layers, stack)
    if spec.codes:
        steps = trained * drawn.tokens / max(spec.batch_tokens, drawn.tokens)
        expanding = steps * sum(machine.seconds(0, _STEP_BYTES * layer.weights) for layer in layers)
    else:
        once, summed = _codebook_seconds(machine, layers)
        expanding = trained / stack * (2 * once + summed)
    return through + trained * (forward + backward + weights / stack) + expanding


def distillation_seconds(
    machine: Machine, drawn: Outline, layers: Sequence[LayerPlan], head: tuple[int, int], rows: int, spec: DistillSpec
) -> float:
    """Of the original's pass over the rows, and of training codebooks end to end.

    Args:
        machine: Where the model runs as a whole, in the dtype of products.
        drawn: Forward and backward.
        layers: What is trained.
        head: Vocabulary and inputs of the output head.
        rows: All that there are.
        spec: How to train.
    """
    kept = held_back(rows, spec.held_back)
    stack = min(stack_size(drawn.tokens, spec.batch_tokens), rows - kept)
    once, summed = _codebook_seconds(machine, layers)
    weights = _weight_gradients(machine, drawn, layers, stack) + summed
    vocabulary, hidden = head
    product = machine.seconds(2 * drawn.tokens * vocabulary * hidden, 0)
    divergence = 2 * product + machine.seconds(0, _DIVERGENCE_BYTES * drawn.tokens * vocabulary)
    gradient = product + machine.seconds(0, _GRADIENT_BYTES * drawn.tokens * vocabulary)
    # Activations are computed again on the way back.
    row = 2 * machine.forward(drawn, stack) + machine.backward(drawn, stack) + (3 * once + weights) / stack
    trained = spec.epochs * (rows - kept) * (row + divergence + gradient)
    judged = (spec.epochs + 1) * kept * (machine.forward(drawn, 1) + once + divergence)
    return rows * machine.forward(drawn, stack_size(drawn.tokens, rows * drawn.tokens)) + trained + judged


def _weight_gradients(machine: Machine, drawn: Outline, layers: Sequence[LayerPlan], rows: int) -> float:
    """Seconds for products of so many rows' activations and gradients."""
    reads = (rows * drawn.reads.get(layer.name, drawn.tokens) * layer.weights for layer in layers)
    return sum(machine.seconds(2 * read, 0) for read in reads)


def solving_seconds(layers: Sequence[LayerPlan], config: GuidedQuantConfig, device: torch.device) -> float:
    """Of all layers, from a batch of each method and bit width that is no larger than it has to be."""
    alike = Counter(replace(layer, name="") for layer in layers)
    kinds = {(layer.method, layer.bits, layer.output_curvature): layer for layer in alike}
    rates = {kind: _solver_rate(layer, alike[layer], config, device) for kind, layer in kinds.items()}
    return sum(solver_work(layer) / rates[layer.method, layer.bits, layer.output_curvature] for layer in layers)


def _solver_rate(layer: LayerPlan, count: int, config: GuidedQuantConfig, device: torch.device) -> float:
    """Work per second (:func:`solver_work`) on random numbers in the place of so many layers."""
    most = (4096, 4096) if device.type == "cuda" else (1024, 512)
    together = layer.out_features * min(count, layer.batch_size(device))
    rows, inputs = min(most[0], together), min(most[1], layer.in_features)
    outliers = min(layer.outliers, inputs - 1)
    sample = replace(layer, out_features=rows, in_features=inputs, num_groups=1, outliers=outliers)
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(1, rows, inputs, generator=generator, device=device)
    hessian = None
    if layer.statistics != "none":
        x = torch.randn(2 * inputs, inputs, generator=generator, device=device)
        sums = x.mT @ x if layer.statistics == "hessian" else x.square().sum(dim=0)
        hessian, _ = condition(sums.unsqueeze(0), layer.name)
    factors = None
    if hessian is not None and layer.output_curvature:
        gradients = torch.randn(2 * rows, rows, generator=generator, device=device)
        factors = Factors.of(gradients.mT @ gradients, hessian, layer.name)
    spec = solver_spec(sample, config, torch.float16)
    with reproducible():
        return solver_work(sample) / _seconds(lambda: solve(layer.method, weight, hessian, spec, factors), device, 2)


def _codebook_seconds(machine: Machine, layers: Sequence[LayerPlan]) -> tuple[float, float]:
    """To expand the codes of all layers to weights, and to sum gradients of all weights by their codes."""
    rates = {bits: _seconds_per_weight(machine, bits) for bits in {layer.bits for layer in layers}}
    once, summed = (sum(rates[layer.bits][which] * layer.weights for layer in layers) for which in range(2))
    return once, summed


def _seconds_per_weight(machine: Machine, bits: int) -> tuple[float, float]:
    """To expand codes to weights, and to sum gradients of weights by their codes."""
    device = machine.device
    rows, inputs = (4096, 4096) if device.type == "cuda" else (512, 512)
    generator = torch.Generator(device).manual_seed(0)
    codes = torch.randint(2**bits, (rows, inputs), generator=generator, device=device, dtype=torch.uint8)
    planes, values = pack_codes(codes, bits), torch.randn(rows, inputs, generator=generator, device=device)
    lut = values[:, : 2**bits].half().contiguous()
    expanding = _seconds(lambda: lut_dequantize(planes, lut, inputs, machine.dtype), device)
    summing = _seconds(lambda: sums_by_code(values, planes, 2**bits), device)
    return expanding / values.numel(), summing / values.numel()


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


__all__ = [
    "Machine",
    "calibration_seconds",
    "distillation_seconds",
    "reconstruction_seconds",
    "solving_seconds",
]
