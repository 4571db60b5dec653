"""The job, in order: plan, calibration rows, one pass for the Hessians, solve, pack, swap, report."""

import logging
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers.utils.logging import tqdm

from .calibration import Calibration, LayerStatistics, collect, load_rows, window_memory
from .calibration.collector import activation_bytes, effective_groups
from .codes import Codes
from .config import GuidedQuantConfig
from .errors import AlreadyQuantizedError, ModelError, NonFiniteWeightError, TokenizerMissingError
from .formats import lut as lut_format
from .linears import dense_weight
from .nn import GuidedLinear, quantized_modules, replace_module
from .plan import LayerPlan, Plan, plan
from .report import LayerReport, Report
from .resources import free_memory, reproducible
from .solvers import SOLVERS, SolverSpec
from .solvers.hessian import Conditioning, condition

logger = logging.getLogger(__name__)

# Shares of the free memory that Hessians, one row's activations and a batch of solver work may take by default. On a
# CPU larger batches only miss its caches.
_HESSIAN_SHARE, _ACTIVATION_SHARE, _BATCH_SHARE = 0.4, 0.25, 0.1
_BATCH_BYTES_CPU = 1 << 30


def run(model: nn.Module, config: GuidedQuantConfig) -> Report:
    """Quantize ``model`` in place and fill in ``config.modules`` and ``config.provenance``.

    Nothing of the model changes before every layer is solved.

    Raises:
        ModelError: The model cannot be quantized (quantized before, NaN weights, offloaded weights, no linears).
        CalibrationError: The data cannot be used.
        HessianError: A layer's statistics are NaN or infinite.
    """
    check_model(model)
    layers_plan = plan(model, config)
    _check_weights(model, layers_plan.layers)
    seconds: dict[str, float] = {}
    packed: dict[str, dict[str, Tensor]] = {}
    reports: dict[str, LayerReport] = {}
    with reproducible():
        calibration = _calibration(model, config, layers_plan, seconds)
        for window in _windows(model, layers_plan, config):
            statistics = _collect(model, window, calibration, config, seconds)
            _solve(model, window, statistics, config, packed, reports, seconds)
    for layer in layers_plan.layers:
        old = model.get_submodule(layer.name)
        bias: Any = old.bias
        replace_module(model, layer.name, GuidedLinear.from_tensors(packed.pop(layer.name), layer.in_features, bias))
    config.modules = {layer.name: _persisted(layer, reports[layer.name]) for layer in layers_plan.layers}
    config.provenance = _provenance(model, config, calibration)
    report = Report(
        model=type(model).__name__,
        settings=config.to_dict(),
        layers=[reports[layer.name] for layer in layers_plan.layers],
        skipped=layers_plan.skipped,
        dense_bytes=layers_plan.dense_bytes,
        quantized_bytes=layers_plan.quantized_bytes,
        bits_per_weight=layers_plan.bits_per_weight,
        seconds=seconds,
    )
    logger.info("Quantized %s\n%s", report.model, report.table())
    return report


def check_model(model: nn.Module) -> None:
    """Refuse what cannot be quantized, before any work: quantized, offloaded or inference-mode models."""
    other = getattr(getattr(model, "config", None), "quantization_config", None)
    method = getattr(other, "quant_method", None) or (other.get("quant_method") if isinstance(other, dict) else None)
    if quantized_modules(model) or (getattr(model, "hf_quantizer", None) is not None and model.hf_quantizer.pre_quantized):  # type: ignore[union-attr]
        raise AlreadyQuantizedError(
            f"This model is quantized already ({method or 'guidedquant'}). Load the full-precision original instead."
        )
    if method not in (None, "guidedquant"):
        raise AlreadyQuantizedError(
            f"This model is quantized already ({method}). Load the full-precision original instead."
        )
    offloaded = [name for name, parameter in model.named_parameters() if parameter.device.type == "meta"]
    if offloaded:
        raise ModelError(
            f"{len(offloaded)} weights (first: {offloaded[0]}) are offloaded to CPU or disk, so they cannot be quantized. "
            'Load the model whole: device_map="cpu", or a device map of GPUs only.'
        )
    if torch.is_inference_mode_enabled() or any(parameter.is_inference() for parameter in model.parameters()):
        raise ModelError(
            "Quantization needs gradients of activations, which torch.inference_mode() forbids. "
            "Load and quantize the model outside of it (torch.no_grad() is fine)."
        )


def _check_weights(model: nn.Module, layers: Iterable[LayerPlan]) -> None:
    bad = [x.name for x in layers if not torch.isfinite(model.get_submodule(x.name).weight).all()]  # type: ignore[arg-type]
    if bad:
        raise NonFiniteWeightError(bad)


def _statistics_of(layer: LayerPlan) -> str:
    return SOLVERS[layer.method].statistics


def _calibration(
    model: nn.Module, config: GuidedQuantConfig, layers_plan: Plan, seconds: dict[str, float]
) -> Calibration | None:
    """Token rows, if any layer's method needs data."""
    if all(_statistics_of(layer) == "none" for layer in layers_plan.layers):
        return None
    start = time.perf_counter()
    text_config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    longest = getattr(text_config, "max_position_embeddings", None) or config.seq_len
    if longest < config.seq_len:
        logger.info("Rows are cut to the model's context of %d tokens (seq_len=%d).", longest, config.seq_len)
    calibration = load_rows(
        config.dataset,
        _tokenizer(model, config),
        num_samples=config.num_samples,
        seq_len=min(config.seq_len, longest),
        seed=config.seed,
        vocab_size=model.get_input_embeddings().weight.shape[0],  # type: ignore[operator, union-attr]
    )
    logger.info(calibration.describe())
    seconds["data"] = time.perf_counter() - start
    return calibration


def _tokenizer(model: nn.Module, config: GuidedQuantConfig) -> Any:
    """The tokenizer object of the config, or the one beside the model; None if there is none."""
    name = config.tokenizer
    if name is not None and not isinstance(name, str | os.PathLike):
        return name
    origin = name or getattr(model, "name_or_path", "")
    if not origin:
        return None
    try:
        return AutoTokenizer.from_pretrained(origin)
    except (OSError, ValueError, ImportError) as error:
        if name is not None:
            raise TokenizerMissingError(f"tokenizer={name!r} cannot be loaded: {error}") from error
        logger.debug("No tokenizer beside the model: %s", error)
        return None


def _windows(model: nn.Module, layers_plan: Plan, config: GuidedQuantConfig) -> Iterator[list[LayerPlan]]:
    """Layers whose statistics fit in memory together, in model order; the budget is per device."""
    window: list[LayerPlan] = []
    used: dict[torch.device, int] = {}
    budgets: dict[torch.device, int] = {}
    for layer in layers_plan.layers:
        device = model.get_submodule(layer.name).weight.device
        assert isinstance(device, torch.device)
        if device not in budgets:
            share = int(_HESSIAN_SHARE * free_memory(device))
            budgets[device] = int(config.hessian_memory * 2**30) if config.hessian_memory else share
        kind = _statistics_of(layer)
        groups = effective_groups(layer.out_features, layer.num_groups)
        need = 0 if kind == "none" else window_memory(layer.in_features, groups, kind == "diagonal")
        if window and used.get(device, 0) + need > budgets[device]:
            yield window
            window, used = [], {}
        window.append(layer)
        used[device] = used.get(device, 0) + need
    yield window


def _collect(
    model: nn.Module,
    window: list[LayerPlan],
    calibration: Calibration | None,
    config: GuidedQuantConfig,
    seconds: dict[str, float],
) -> dict[str, LayerStatistics]:
    watched = [layer for layer in window if _statistics_of(layer) != "none"]
    if calibration is None or not watched:
        return {}
    start = time.perf_counter()
    modules = {layer.name: model.get_submodule(layer.name) for layer in watched}
    statistics = {
        layer.name: LayerStatistics.empty(
            layer.in_features,
            effective_groups(layer.out_features, layer.num_groups),
            _statistics_of(layer) == "diagonal",
            modules[layer.name].weight.device,  # type: ignore[arg-type]
        )
        for layer in watched
    }
    checkpointing = config.gradient_checkpointing
    if checkpointing is None:
        first = next(iter(modules.values())).weight
        row = max(ids.numel() for ids in calibration.rows)
        needed = activation_bytes(list(modules.values()), row, first.dtype)  # type: ignore[arg-type]
        checkpointing = needed > _ACTIVATION_SHARE * free_memory(first.device)  # type: ignore[arg-type]
    with tqdm(total=calibration.tokens, desc="Calibrating", unit="token", unit_scale=True) as bar:
        rows = iter(calibration.rows)
        collect(
            model,
            modules,
            statistics,
            calibration.rows,
            guided=config.guided,
            checkpointing=checkpointing,
            on_row=lambda: bar.update(next(rows).numel()),
        )
    seconds["calibration"] = seconds.get("calibration", 0.0) + time.perf_counter() - start
    return statistics


def _solve(
    model: nn.Module,
    window: list[LayerPlan],
    statistics: dict[str, LayerStatistics],
    config: GuidedQuantConfig,
    packed: dict[str, dict[str, Tensor]],
    reports: dict[str, LayerReport],
    seconds: dict[str, float],
) -> None:
    """Solve and pack the layers of a window; equal layers go to the solver together."""
    start = time.perf_counter()
    with tqdm(total=sum(x.weights for x in window), desc="Solving", unit="weight", unit_scale=True) as bar, torch.no_grad():
        for batch in _batches(model, window):
            solved = _solve_batch(model, batch, [statistics.pop(x.name, None) for x in batch], config)
            for layer, (codes, report) in zip(batch, solved, strict=True):
                packed[layer.name] = lut_format.encode(codes)
                reports[layer.name] = report
                logger.debug("%s: %d bits, relative objective %s", layer.name, layer.bits, report.objectives)
                bar.update(layer.weights)
    seconds["solving"] = seconds.get("solving", 0.0) + time.perf_counter() - start


def _batches(model: nn.Module, window: list[LayerPlan]) -> Iterator[list[LayerPlan]]:
    """Layers of one shape, setting and device, in batches of bounded memory.

    Coordinate descent walks over the inputs one by one, so many small layers at once cost hardly more steps than one.
    """
    alike: dict[tuple, list[LayerPlan]] = {}
    for layer in window:
        weight = model.get_submodule(layer.name).weight
        dtype = lut_format.codebook_dtype(weight)  # type: ignore[arg-type]
        key = (replace(layer, name=""), weight.device, dtype)
        alike.setdefault(key, []).append(layer)
    for layers in alike.values():
        one = layers[0]
        work = 4 * (6 * one.weights + 3 * one.num_groups * one.in_features**2)
        device = model.get_submodule(one.name).weight.device
        free = _BATCH_SHARE * free_memory(device)  # type: ignore[arg-type]
        size = max(1, int(min(free, _BATCH_BYTES_CPU) if device.type == "cpu" else free) // work)  # type: ignore[union-attr]
        yield from (layers[i : i + size] for i in range(0, len(layers), size))


def _solve_batch(
    model: nn.Module, batch: list[LayerPlan], statistics: list[LayerStatistics | None], config: GuidedQuantConfig
) -> list[tuple[Codes, LayerReport]]:
    """Codes and reports of layers that share shape, method, bits, groups and device."""
    one = batch[0]
    groups = effective_groups(one.out_features, one.num_groups)
    weights = [dense_weight(model.get_submodule(layer.name)).float() for layer in batch]
    grouped = torch.cat([_group_rows(weight, groups) for weight in weights])  # [layers * g, R, K]
    conditioned = [
        (None, Conditioning(weight.new_zeros(groups))) if found is None else condition(found.hessian, layer.name)
        for layer, weight, found in zip(batch, weights, statistics, strict=True)
    ]
    parts = [part for part, _ in conditioned if part is not None]
    stacked = torch.cat(parts) if parts else None
    spec = SolverSpec(
        one.bits,
        lut_format.codebook_dtype(weights[0]),
        config.lnq_iterations,
        config.lnq_cycles,
        config.kmeans_iterations,
    )
    solution = SOLVERS[one.method].solve(grouped, stacked, spec)
    size = _weighted_square(grouped, stacked)
    results = []
    for index, (layer, found) in enumerate(zip(batch, statistics, strict=True)):
        own = slice(index * groups, (index + 1) * groups)
        note = conditioned[index][1]
        codes = Codes(
            solution.codes[own].flatten(0, 1)[: layer.out_features],
            solution.codebook[own].flatten(0, 1)[: layer.out_features],
        )
        report = LayerReport(
            plan=layer,
            objectives={
                stage: float(value[own].sum() / size[own].sum().clamp_min(1e-300))
                for stage, value in solution.objectives.items()
            },
            scale=float(note.scale.mean()),
            damping=note.damping,
            dead_inputs=note.dead_inputs,
            fallback=note.fallback,
            bad_rows=0 if found is None else int(found.bad_rows),
            lut_dtype=str(spec.codebook_dtype).removeprefix("torch."),
        )
        if note.fallback:
            logger.warning("%s: %s; its weights alone guide the solver.", layer.name, note.fallback)
        results.append((codes, report))
    return results


def _group_rows(weight: Tensor, groups: int) -> Tensor:
    """``[N, K] -> [g, ceil(N / g), K]``, a shorter last group padded with zero rows."""
    size = -(-weight.shape[0] // groups)
    padded = nn.functional.pad(weight, (0, 0, 0, groups * size - weight.shape[0]))
    return padded.view(groups, size, -1)


def _weighted_square(weight: Tensor, statistics: Tensor | None) -> Tensor:
    """``wᵀ H w`` of every row: fp64 ``[G, R]``, the unit of relative objectives."""
    if statistics is None:
        return weight.double().square().sum(dim=-1)
    weighted = weight * statistics.unsqueeze(1) if statistics.dim() == 2 else weight @ statistics
    return (weight * weighted).sum(dim=-1, dtype=torch.float64)


def _persisted(layer: LayerPlan, report: LayerReport) -> dict[str, Any]:
    entry: dict[str, Any] = {"bits": layer.bits}
    return entry if report.lut_dtype == "float16" else {**entry, "lut_dtype": report.lut_dtype}


def _provenance(model: nn.Module, config: GuidedQuantConfig, calibration: Calibration | None) -> dict[str, Any]:
    """Where the model came from, without texts, paths or tokens."""
    packages = ("hf-guidedquant", "torch", "transformers")
    found: dict[str, Any] = {"versions": {package: version(package) for package in packages}}
    origin = str(getattr(model, "name_or_path", ""))
    # Only names of the form owner/model or model can be Hub repositories; anything on disk is a path.
    if origin and origin.count("/") <= 1 and not os.path.exists(origin) and not os.path.isabs(origin):
        found["base_model"] = origin
    if calibration is not None:
        found |= {
            "calibration": calibration.source,
            "sha256": calibration.sha256(),
            "rows": len(calibration.rows),
            "tokens": calibration.tokens,
            "seq_len": config.seq_len,
            "seed": config.seed,
        }
    return found
