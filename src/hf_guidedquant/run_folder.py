"""The folder of a run (``run_dir``): what is finished is kept there, so that a killed run goes on.

run_dir/run.json   what the run depends on, and which layers are solved together
run_dir/layers/*   one file per finished layer: its packed tensors and its entry of the report; one per block that is
                   trained (see trained_blocks.py), and one for the epochs of distillation (distillation_folder.py)
run_dir/lock       held by the process that is at work
"""

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .calibration import Calibration, Outline
from .config import PERSISTED, DistillSpec, GuidedQuantConfig, ReconstructSpec
from .distillation_folder import DistillationFolder, distillation_identity
from .fingerprint import environment, tokenizer_fingerprint
from .formats import lut as lut_format
from .formats.lut import TensorSpec
from .layer_folder import LayerFolder
from .plan import LayerPlan, Plan
from .report import LayerReport
from .trained_blocks import TrainedBlocks, training_identity
from .training import layers_by_block

logger = logging.getLogger(__name__)

_FOLDER_FORMAT = 1
_ABOUT = (
    "A run of hf-guidedquant. The same call with the same run_dir goes on where it was interrupted. "
    "Delete this folder when the model is saved."
)
# Modules and provenance are results of the run. Solved layers do not depend on the training, which starts from them;
# trained blocks know their settings themselves.
_NOT_OF_LAYERS = ("modules", "provenance", "reconstruct", "distill")
_OF_DATA = ("num_samples", "seq_len", "seed", "assistant_only_loss")
_SETTINGS = (*(name for name in PERSISTED if name not in _NOT_OF_LAYERS), *_OF_DATA)

# Types of what is kept of a layer's report.
_FACTS: dict[str, Any] = {
    "objectives": dict,
    "scale": int | float,
    "damping": int | float,
    "dead_inputs": int,
    "fallback": str | None,
    "bad_rows": int,
    "tokens": int,
    "borrowed_tokens": int,
    "lut_dtype": str,
    "joint_left": int | float | None,
}

# A layer's packed tensors, and its entry of the report.
Finished = tuple[dict[str, Tensor], LayerReport]


class RunFolder:
    """What earlier processes of a run have finished, and the place for what this one finishes."""

    def __init__(self, folder: LayerFolder) -> None:
        self._folder = folder

    def batches(self, identity: Mapping[str, Any], plan: Plan) -> list[list[LayerPlan]] | None:
        """The layers that are solved together, if a run has started here; None if not.

        Products of another batch size can round differently, so a run keeps its batches, whatever memory is free later.

        Args:
            identity: What the layers depend on (:func:`run_identity`).
            plan: The layers of the run.

        Raises:
            FolderMismatchError: The folder belongs to a run with another result. The message names the differences.
        """
        record = self._folder.record()
        if record is None:
            return None
        self._folder.check_identity(record["identity"], identity)
        found = _batches(record.get("batches"), plan)
        if found is None:
            logger.warning("The batches in %s are not those of this run; it starts anew.", self._folder.path)
        return found

    def begin(self, identity: Mapping[str, Any], batches: Iterable[Sequence[LayerPlan]]) -> None:
        """Start a run."""
        names = [[layer.name for layer in batch] for batch in batches]
        self._folder.write_record({"about": _ABOUT, "identity": identity, "batches": names})

    def finished(self, plan: Plan) -> dict[str, Finished]:
        """The layers that are finished, by name, in any order and with any gaps; tensors on the CPU."""
        found = {}
        for layer in plan.layers:
            kept = self._folder.load(layer.name)
            if kept is None:
                continue
            if _is_of(layer, *kept):
                found[layer.name] = kept[0], LayerReport(plan=layer, **kept[1])
            else:
                logger.warning("%s does not hold this layer; it is done again.", self._folder.file(layer.name))
        if found:
            logger.info("%d of %d layers are finished in %s.", len(found), len(plan.layers), self._folder.path)
        return found

    def commit(self, tensors: dict[str, Tensor], report: LayerReport) -> None:
        """Keep a finished layer.

        Raises:
            FolderUnusableError: The disk is full or read-only. The layers kept before are unharmed.
        """
        facts = asdict(report)
        del facts["plan"]
        self._folder.save(report.plan.name, tensors, facts)

    def trained_blocks(
        self,
        spec: ReconstructSpec,
        calibration: Calibration,
        drawn: Outline,
        layers: Mapping[str, dict[str, Tensor]],
    ) -> TrainedBlocks:
        """The place for blocks that are trained. ``layers`` are all that were solved."""
        identity = training_identity(spec, calibration, layers)
        return TrainedBlocks(self._folder, identity, layers_by_block(drawn, layers))

    def distillation(
        self, spec: DistillSpec, calibration: Calibration, layers: Mapping[str, dict[str, Tensor]]
    ) -> DistillationFolder:
        """The place for epochs of distillation. ``layers`` are all that it begins with."""
        return DistillationFolder(self._folder, distillation_identity(spec, calibration, layers))


def _batches(names: Any, plan: Plan) -> list[list[LayerPlan]] | None:
    """The batches with these names; None unless they are all layers of the plan, once each, equal ones together."""
    layers = {layer.name: layer for layer in plan.layers}
    try:
        found = [[layers[name] for name in batch] for batch in names]
    except (KeyError, TypeError):
        return None
    complete = sorted(layer.name for layer in chain(*found)) == sorted(layers)
    alike = all(len({replace(layer, name="") for layer in batch}) == 1 for batch in found)
    return found if complete and alike else None


def _is_of(layer: LayerPlan, tensors: Mapping[str, Tensor], facts: Any) -> bool:
    """Whether this is what a solved layer leaves; a folder that somebody else filled may hold anything."""
    if not isinstance(facts, dict) or facts.keys() != _FACTS.keys():
        return False
    specs = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    dtype = {"float16": torch.float16, "float32": torch.float32}.get(str(facts["lut_dtype"]))
    return (
        dtype is not None
        and specs == lut_format.declare(layer.out_features, layer.in_features, layer.bits, dtype, layer.outliers)
        and all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())
        and (not layer.outliers or lut_format.are_columns(tensors["overlay_columns"], layer.in_features))
        and all(isinstance(facts[name], kind) for name, kind in _FACTS.items())
        and all(isinstance(value, int | float) for value in facts["objectives"].values())
    )


@contextmanager
def open_run_folder(path: str | os.PathLike | None) -> Iterator[RunFolder | None]:
    """The folder of a run, held for this process; None for None.

    Raises:
        FolderUnusableError: Another process is at work there, or the folder cannot be written to.
    """
    if path is None:
        yield None
        return
    folder = LayerFolder(path, "run.json", "run_dir")
    with folder.locked():
        yield RunFolder(folder)


def run_identity(
    model: PreTrainedModel,
    fingerprint: Mapping[str, str],
    config: GuidedQuantConfig,
    plan: Plan,
    calibration: Calibration | None,
) -> dict[str, Any]:
    """All that the solved layers depend on, in words that a message can use.

    ``fingerprint`` is the model's (:func:`model_fingerprint`).
    """
    data = {}
    if calibration is not None and plan.needs_data:
        data = {
            "calibration data": calibration.sha256(),
            "tokenizer": tokenizer_fingerprint(calibration.tokenizer),
        }
    return {
        "run folder format": _FOLDER_FORMAT,
        "settings": {name: getattr(config, name) for name in _SETTINGS},
        "model": dict(fingerprint),
        "data": data,
        "environment": environment(model, config.device),
        "layers": {layer.name: f"{layer.bits} bits by {layer.method}" for layer in plan.layers},
    }
