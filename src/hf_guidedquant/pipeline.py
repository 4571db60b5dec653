"""The job, in order: plan, calibration rows, then by segments of the model Hessians, solve, pack; swap, report."""

import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from .budget import one_pass_serves, undecided, within_budget
from .calibration import (
    Calibration,
    Footprint,
    LayerStatistics,
    Outline,
    Relay,
    Segment,
    StatisticsStore,
    divide,
    fit_at_once,
    gather,
    lend,
    load_rows,
    open_statistics,
    outline,
    outline_for,
    place_for,
    relay_for,
    with_fellows,
)
from .calibration.store import statistics_identity
from .config import QUANT_METHOD, GuidedQuantConfig, matches
from .distillation_folder import DistillationFolder
from .errors import AlreadyQuantizedError, ModelError, NonFiniteWeightError, TokenizerMissingError, listed
from .experts import unfused
from .fingerprint import environment, model_fingerprint, versions
from .linears import linear_shape, size_of, stored_weight, tensors_of
from .nn import GuidedEmbedding, GuidedLinear, quantized_modules, replace_module, scale_of, tie_codes
from .page import PAGE_FILE, leave_page
from .plan import LayerPlan, Plan, called_only, plan_layers, quantized_embeddings
from .report import Report
from .resources import VISIT_SHARE, free_memory, reproducible
from .run_folder import Finished, RunFolder, open_run_folder, run_identity
from .solving import batches, solve_together
from .training import DistillReport, ReconstructReport, check_blocks, check_rows, distill, reconstruct, teacher_states
from .workers import Workers

logger = logging.getLogger(__name__)


def run(model: PreTrainedModel, config: GuidedQuantConfig, freshly_loaded: bool = False) -> Report:
    """Quantize ``model`` in place and fill in ``config.modules`` and ``config.provenance``.

    Nothing of the model changes before every layer is solved and, if wanted, trained block by block. Codebooks are
    distilled afterwards, if at all.

    Args:
        model: A causal language model.
        config: What to do.
        freshly_loaded: The weights were just read by ``from_pretrained``, which leaves a mark on each that it found.

    Raises:
        ModelError: The model cannot be quantized (quantized before, NaN weights, offloaded weights, no linears).
        CalibrationError: The data cannot be used.
        HessianError: A layer's statistics are NaN or infinite.
        SolverError: A layer's solution is.
        FolderMismatchError: ``run_dir`` or ``statistics`` was filled under other conditions.
        FolderUnusableError: Another process uses the folder, or it cannot be written to.
    """
    check_model(model)
    with unfused(model, config):
        return _run(model, config, freshly_loaded)


def _run(model: PreTrainedModel, config: GuidedQuantConfig, freshly_loaded: bool) -> Report:
    workers = Workers()
    if not workers.first:
        disable_progress_bar()
        logging.getLogger(__package__).setLevel(logging.WARNING)
    layers_plan = plan_layers(model, config)
    _check_weights(model, config, freshly_loaded)
    if (embeddings := quantized_embeddings(model, layers_plan.layers)) is not None:
        scale_of(model.get_submodule(embeddings[0]))  # Raises what must not be noticed after hours of work.
    seconds: dict[str, float] = {}
    with open_run_folder(config.run_dir if workers.first else None) as run_folder:
        with reproducible(), open_statistics(config.statistics if workers.first else None) as store:
            with _timed("data", seconds):
                calibration = _calibration(model, config, layers_plan)
                drawn = outline_for(model, config, calibration)
                run_once = outline(model, 1, False, place_for(config)) if calibration is None else drawn
                layers_plan = called_only(model, layers_plan, run_once.reads)
                if config.reconstruct or config.distill:
                    check_rows(len(calibration.rows) if calibration else 0)
                if config.reconstruct:
                    check_blocks(model, drawn)
                known = run_folder is not None or store is not None
                fingerprint = model_fingerprint(model) if known else {}
                at_once = workers.tell(_one_pass(model, config, layers_plan, drawn), 0)
                if at_once and store is not None:
                    _begin_statistics(model, config, calibration, fingerprint, layers_plan.layers, store)
            statistics: dict[str, LayerStatistics] = {}
            originals: list[Tensor] = []
            if at_once:
                # Before statistics take the memory.
                originals = _originals(model, config, calibration, seconds)
            if calibration is not None and isinstance(config.bits, float):
                with _timed("calibration", seconds):
                    layers_plan, statistics = within_budget(
                        model, config, layers_plan, calibration, drawn, at_once, store, workers
                    )
            with _timed("data", seconds):
                workers.check_agreement(_common(model, config, layers_plan, calibration))
                work = _begin(model, config, layers_plan, drawn, calibration, fingerprint, run_folder, store, at_once)
                segments, batches_of, finished = workers.tell(work, 0)
                relay = relay_for(model, config, drawn, segments, calibration, workers)
            if not at_once:
                originals = _originals(model, config, calibration, seconds)
            job = _Job(model, config, workers, run_folder, calibration, drawn, seconds)
            job.solve(relay, segments, batches_of, finished, store, statistics)
            reconstruction = job.reconstruct(finished, embeddings)
        summary = _summary(model, layers_plan, finished, seconds)
        summary.reconstruction = reconstruction
        config.modules = {layer.plan.name: layer.settings(config) for layer in summary.layers}
        config.provenance = _provenance(model, config, calibration)
        distillation_folder = job.distillation_folder(finished)
        head: Any = getattr(model, "get_output_embeddings", lambda: None)()
        _swap(model, layers_plan, finished, embeddings, config)
        summary.settings = config.to_dict()
        summary.distillation = job.distill(originals, head, distillation_folder)
    if workers.first:
        logger.info("Quantized %s\n%s", summary.model, summary.table())
        if config.run_dir is not None:
            leave_page(summary, Path(config.run_dir) / PAGE_FILE)
    return summary


@dataclass(frozen=True)
class _Job:
    """What the stages of a run have in common. ``run_folder`` is the first process' own."""

    model: PreTrainedModel
    config: GuidedQuantConfig
    workers: Workers
    run_folder: RunFolder | None
    calibration: Calibration | None
    drawn: Outline
    seconds: dict[str, float]

    def solve(
        self,
        relay: Relay,
        segments: Sequence[Segment],
        batches_of: Sequence[Sequence[list[LayerPlan]]],
        finished: dict[str, Finished],
        store: StatisticsStore | None,
        gathered: dict[str, LayerStatistics],
    ) -> None:
        """Hessians and solutions, segment after segment; they are added to ``finished``.

        ``gathered`` has the statistics of all layers, if there is one segment and they are known; it is emptied.
        """
        order = [number for number in relay.order if batches_of[number]]
        for step, number in enumerate(order, start=1):
            todo = batches_of[number]
            with _timed("calibration", self.seconds):
                needed = with_fellows(self.model, list(chain(*todo)), segments[number].layers)
                if gathered:
                    statistics = {layer.name: gathered[layer.name] for layer in needed if layer.name in gathered}
                    gathered.clear()
                else:
                    statistics = gather(self.model, relay, number, needed, self.config, store, self.workers)
                lend(self.model, statistics)
            with _timed("solving", self.seconds):
                title = f"Solving {step}/{len(order)}" if len(order) > 1 else "Solving"
                solved = solve_together(self.model, todo, statistics, self.config, title, self.workers)
                for tensors, report in solved:
                    name = report.plan.name
                    if name in finished:
                        continue
                    finished[name] = tensors, report
                    if self.run_folder is not None:
                        self.run_folder.commit(tensors, report)
        gathered.clear()

    def reconstruct(
        self, finished: dict[str, Finished], embeddings: tuple[str, str] | None
    ) -> ReconstructReport | None:
        """Train the solved layers block by block, if that is wanted; they take the place of those in ``finished``."""
        spec = self.config.reconstruct_spec
        if spec is None or self.calibration is None:
            return None
        with _timed("reconstruction", self.seconds):
            layers = _tensors(finished)
            folder = self.run_folder and self.run_folder.trained_blocks(spec, self.calibration, self.drawn, layers)
            trained, report = reconstruct(
                self.model,
                self.drawn,
                self.calibration.rows,
                layers,
                spec,
                embeddings=None if embeddings is None else _quantized(self.model, *embeddings, layers),
                seed=self.config.seed,
                place=place_for(self.config),
                workers=self.workers,
                done=self.workers.tell(folder.finished() if folder else [], 0),
                keep=folder.commit if folder else None,
            )
            finished |= {name: (trained[name], solved) for name, (_, solved) in finished.items()}
        return report

    def distillation_folder(self, finished: Mapping[str, Finished]) -> DistillationFolder | None:
        """Where the epochs of a distillation that begins with these layers are kept."""
        spec = self.config.distill_spec
        if spec is None or self.calibration is None or self.run_folder is None:
            return None
        return self.run_folder.distillation(spec, self.calibration, _tensors(finished))

    def distill(
        self, originals: Sequence[Tensor], head: nn.Module | None, folder: DistillationFolder | None
    ) -> DistillReport | None:
        """Train the codebooks of the quantized model end to end, if that is wanted."""
        spec = self.config.distill_spec
        if spec is None or self.calibration is None:
            return None
        with _timed("distillation", self.seconds), reproducible(), _where_work_is_done(self.model, self.config):
            return distill(
                self.model,
                self.calibration.rows,
                originals,
                spec,
                self.config.seed,
                self.workers,
                head,
                done=self.workers.tell(folder.finished() if folder else None, 0),
                keep=folder.commit if folder else None,
            )


def _tensors(finished: Mapping[str, Finished]) -> dict[str, dict[str, Tensor]]:
    return {name: tensors for name, (tensors, _) in finished.items()}


def _quantized(model: nn.Module, name: str, source: str, layers: Mapping[str, dict[str, Tensor]]) -> GuidedLinear:
    """What takes the place of a module: its quantized form around the tensors of the layer ``source``."""
    module: Any = model.get_submodule(name)
    tensors = {key: tensor.to(module.weight.device) for key, tensor in layers[source].items()}
    if isinstance(module, nn.Embedding):
        return GuidedEmbedding.replacing(module, tensors)
    return GuidedLinear.from_tensors(tensors, linear_shape(module)[1], module.bias)


def _swap(
    model: PreTrainedModel,
    layers_plan: Plan,
    finished: dict[str, Finished],
    embeddings: tuple[str, str] | None,
    config: GuidedQuantConfig,
) -> None:
    """Put the quantized layers where the dense ones are. Empties ``finished``."""
    if embeddings is not None and embeddings[0] != embeddings[1]:
        name, head = embeddings
        config.modules[name] = dict(config.modules[head])
        replace_module(model, name, _quantized(model, name, head, {head: finished[head][0]}))
    for layer in layers_plan.layers:
        tensors, _ = finished.pop(layer.name)
        replace_module(model, layer.name, _quantized(model, layer.name, layer.name, {layer.name: tensors}))
    tie_codes(model)


@contextmanager
def _where_work_is_done(model: Any, config: GuidedQuantConfig) -> Iterator[None]:
    """The whole model is on the GPU that works for the CPU, if it fits; afterwards it is where it was."""
    place, size = place_for(config)(model.device), size_of(model)
    visit = {tensor.device.type for tensor in tensors_of(model)} == {"cpu"} != {place.type}
    if visit and size > VISIT_SHARE * free_memory(place):
        logger.warning("The model does not fit on %s as a whole, so the CPU runs it, which takes long.", place)
        visit = False
    try:
        if visit:
            model.to(place)
        yield
    finally:
        if visit:
            model.to("cpu")


def _common(
    model: PreTrainedModel, config: GuidedQuantConfig, layers_plan: Plan, calibration: Calibration | None
) -> dict[str, Any]:
    """What processes that work together must have in common."""
    return {
        "model": type(model).__name__,
        "layers": sha256(repr(layers_plan.layers).encode()).hexdigest()[:12],
        "data": None if calibration is None else calibration.sha256()[:12],
        "seed": config.seed,
        "settings": {**config.to_dict(), "modules": None, "provenance": None},
        "versions": versions(),
    }


def _one_pass(model: PreTrainedModel, config: GuidedQuantConfig, layers_plan: Plan, drawn: Outline) -> bool:
    """Whether widths are left open, and one pass serves both their choice and the solver."""
    layers = one_pass_serves(layers_plan.layers, undecided(model, config, layers_plan))
    return layers is not None and fit_at_once(Footprint(model, layers, drawn, place_for(config)), config)


def _begin(
    model: PreTrainedModel,
    config: GuidedQuantConfig,
    layers_plan: Plan,
    drawn: Outline,
    calibration: Calibration | None,
    fingerprint: Mapping[str, str],
    run_folder: RunFolder | None,
    store: StatisticsStore | None,
    at_once: bool,
) -> tuple[list[Segment], list[list[list[LayerPlan]]], dict[str, Finished]]:
    """Segments, what is still to be solved of each, in batches, and what an interrupted run has finished.

    There is one segment if the statistics have been gathered ``at_once``, with the folder of statistics ready.
    """
    footprint = Footprint(model, layers_plan.layers, drawn, place_for(config))
    started = None
    if run_folder is not None:
        identity = run_identity(model, fingerprint, config, layers_plan, calibration)
        started = run_folder.batches(identity, layers_plan)
    if at_once:
        segments = [Segment(0, footprint.count, tuple(chain(*footprint.layers)))]
    else:
        rows = 0 if calibration is None else len(calibration.rows)
        segments = divide(footprint, config, rows, started or ())
    work = [list(batches(model, segment.layers, config.device)) for segment in segments]
    finished: dict[str, Finished] = {}
    if run_folder is not None:
        if started is None:
            run_folder.begin(identity, chain(*work))
        else:
            work = [[batch for batch in started if batch[0] in segment.layers] for segment in segments]
        finished = run_folder.finished(layers_plan)
        # A batch is solved whole or not at all: in parts, its products could round differently.
        work = [[batch for batch in part if any(layer.name not in finished for layer in batch)] for part in work]
    if store is not None and not at_once and layers_plan.needs_data and any(work):
        _begin_statistics(model, config, calibration, fingerprint, chain(*chain(*work)), store)
    return segments, work, finished


def _begin_statistics(
    model: PreTrainedModel,
    config: GuidedQuantConfig,
    calibration: Calibration | None,
    fingerprint: Mapping[str, str],
    layers: Iterable[LayerPlan],
    store: StatisticsStore,
) -> None:
    """Get the folder of statistics ready for these layers."""
    if calibration is not None:
        identity = statistics_identity(fingerprint, config, calibration)
        store.begin(identity, environment(model, config.device), calibration.summary(), layers)


def _originals(
    model: PreTrainedModel, config: GuidedQuantConfig, calibration: Calibration | None, seconds: dict[str, float]
) -> list[Tensor]:
    """The original's last hidden states, if something will be distilled."""
    if calibration is None or not config.distill:
        return []
    with _timed("distillation", seconds), _where_work_is_done(model, config):
        return teacher_states(model, calibration.rows)


def _summary(
    model: PreTrainedModel, layers_plan: Plan, finished: dict[str, Finished], seconds: dict[str, float]
) -> Report:
    """The report of a model whose layers are solved, but not replaced yet."""
    packed_bytes = sum(tensor.nbytes for tensors, _ in finished.values() for tensor in tensors.values())
    weights = [stored_weight(model.get_submodule(layer.name)) for layer in layers_plan.layers]
    return Report(
        model=type(model).__name__,
        layers=[finished[layer.name][1] for layer in layers_plan.layers],
        skipped=layers_plan.skipped,
        dense_bytes=layers_plan.dense_bytes,
        quantized_bytes=layers_plan.quantized_bytes - sum(x.packed_bytes for x in layers_plan.layers) + packed_bytes,
        bits_per_weight=8 * packed_bytes / sum(weight.numel() for weight in weights),
        seconds=seconds,
    )


@contextmanager
def _timed(stage: str, seconds: dict[str, float]) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start


def check_model(model: nn.Module) -> None:
    """Refuse what cannot be quantized, before any work: quantized, offloaded or inference-mode models."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    saved: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    method = saved.get("quant_method") if isinstance(saved, dict) else getattr(saved, "quant_method", None)
    foreign = method not in (None, QUANT_METHOD)
    if foreign or quantized_modules(model) or (quantizer is not None and quantizer.pre_quantized):
        raise AlreadyQuantizedError(method)
    offloaded = [name for name, parameter in model.named_parameters() if parameter.device.type == "meta"]
    if offloaded:
        raise ModelError(
            f"{len(offloaded)} weights (first: {offloaded[0]}) are offloaded to CPU or disk, so they cannot be "
            'quantized. Load the model whole: device_map="cpu", or a device map of GPUs only.'
        )
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ModelError(
            f"{type(model).__name__} is an encoder-decoder model; only causal language models are supported."
        )
    check_grad_mode(model.parameters())


def check_grad_mode(parameters: Iterable[Tensor] = ()) -> None:
    """Refuse inference mode, now or when the parameters were made: it forbids gradients for good.

    Raises:
        ModelError: Saying what to do instead.
    """
    if torch.is_inference_mode_enabled() or any(parameter.is_inference() for parameter in parameters):
        raise ModelError(
            "Quantization needs gradients of activations, which torch.inference_mode() forbids. "
            "Load and quantize the model outside of it (torch.no_grad() is fine)."
        )


def _check_weights(model: nn.Module, config: GuidedQuantConfig, freshly_loaded: bool) -> None:
    """Refuse NaN anywhere, and parameters that no file filled: transformers has given those random values.

    A new head may be left out where no end loss depends on it.
    """
    bad = [name for name, p in model.named_parameters() if p.is_floating_point() and not torch.isfinite(p).all()]
    if bad:
        raise NonFiniteWeightError(bad)
    new = () if config.guided else config.modules_to_not_convert or ()
    absent = [
        name
        for name, p in model.named_parameters()
        if not getattr(p, "_is_hf_initialized", False)
        and not any(matches(name.rpartition(".")[0], pattern) for pattern in new)
    ]
    if freshly_loaded and absent:
        raise ModelError(
            f"The checkpoint holds no {listed(absent)}. Load the full-precision original, a causal language model with "
            "its output head."
        )


def _calibration(model: PreTrainedModel, config: GuidedQuantConfig, layers_plan: Plan) -> Calibration | None:
    """Token rows, if anything needs data."""
    if not (layers_plan.needs_data or config.reconstruct or config.distill or isinstance(config.bits, float)):
        return None
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    calibration = load_rows(
        config.dataset,
        _tokenizer(model, config),
        num_samples=config.num_samples,
        seq_len=config.seq_len,
        seed=config.seed,
        assistant_only_loss=config.assistant_only_loss,
        context=longest,
        vocab_size=stored_weight(model.get_input_embeddings()).shape[0],
    )
    logger.info(calibration.describe())
    return calibration


def _tokenizer(model: PreTrainedModel, config: GuidedQuantConfig) -> Any:
    """The tokenizer object of the config, or the one beside the model; None if there is none."""
    name = config.tokenizer
    if name is not None and not isinstance(name, str | os.PathLike):
        return name
    origin = name or getattr(model, "name_or_path", "")
    if not origin:
        return None
    try:
        return AutoTokenizer.from_pretrained(origin)
    except Exception as error:
        # Any, because that is what tokenizers raises for files of later versions.
        if name is not None:
            raise TokenizerMissingError(f"tokenizer={name!r} cannot be loaded: {error}") from error
        logger.debug("No tokenizer beside the model: %s", error)
        return None


def _is_hub_name(origin: str) -> bool:
    """Whether the model came from the Hub: its config then lies in the Hub's cache. Anything else may be a path."""
    try:
        return not os.path.exists(origin) and isinstance(try_to_load_from_cache(origin, "config.json"), str)
    except HFValidationError:
        return False


def _provenance(model: PreTrainedModel, config: GuidedQuantConfig, calibration: Calibration | None) -> dict[str, Any]:
    """Where the model came from, without texts, paths or tokens."""
    found: dict[str, Any] = {"versions": versions()}
    origin = str(getattr(model, "name_or_path", ""))
    if _is_hub_name(origin):
        found["base_model"] = origin
    if calibration is not None:
        found |= calibration.summary() | {"seed": config.seed}
    return found
