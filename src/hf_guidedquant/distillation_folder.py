"""A run's distillation after each of its epochs: kept in the run's folder, so that a killed run goes on behind it."""

import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from .calibration import Calibration
from .config import DistillSpec
from .fingerprint import tensors_sha256
from .layer_folder import LayerFolder, differences
from .training import DistilledEpochs, Layers, flat_tensors

logger = logging.getLogger(__name__)

# No layer and no block has a name with a space.
_NAME = "distilled codebooks"
_FIGURES = ("trained", "held_back", "best_epoch")


class DistillationFolder:
    """The place for the epochs of a distillation.

    Args:
        folder: Of the run. Its record must be that of the run.
        identity: What the distillation depends on beside that (:func:`distillation_identity`).
    """

    def __init__(self, folder: LayerFolder, identity: Mapping[str, Any]) -> None:
        self._folder, self._identity = folder, dict(identity)

    def finished(self) -> DistilledEpochs | None:
        """The epochs that earlier processes have finished; tensors on the CPU."""
        kept = self._folder.load(_NAME)
        if kept is None:
            return None
        tensors, facts = kept
        found = _epochs(tensors, facts)
        if found is None:
            logger.warning("%s holds no distillation; it begins anew.", self._folder.file(_NAME))
            return None
        changes = differences(facts["distillation"], self._identity)
        if changes:
            logger.info("The distillation in %s was another one (%s).", self._folder.path, "; ".join(changes))
            return None
        epochs = self._identity["distill"]["epochs"]
        logger.info("%d of %d epochs are distilled in %s.", len(found.trained), epochs, self._folder.path)
        return found

    def commit(self, epochs: DistilledEpochs) -> None:
        """Keep what has been done, in place of what was kept before.

        Raises:
            FolderUnusableError: The disk is full or read-only. What was kept before is unharmed.
        """
        facts = {name: getattr(epochs, name) for name in _FIGURES}
        self._folder.save(_NAME, flat_tensors(epochs.layers), {**facts, "distillation": self._identity})


def distillation_identity(
    spec: DistillSpec, calibration: Calibration, layers: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Any]:
    """All that a distillation depends on beside the record of the run's folder; ``layers`` are what it begins with."""
    return {
        "distill": asdict(spec),
        "calibration data": calibration.sha256(),
        "layers": tensors_sha256(flat_tensors(layers)),
    }


def _epochs(tensors: Mapping[str, Tensor], facts: Any) -> DistilledEpochs | None:
    """The epochs, if this is what a distillation leaves; a folder that somebody else filled may hold anything."""
    if not isinstance(facts, dict) or facts.keys() != {*_FIGURES, "distillation"}:
        return None
    figures = [facts["trained"], facts["held_back"]]
    # Of a training that went astray they may be infinite or NaN.
    if not all(isinstance(each, list) and all(type(value) is float for value in each) for each in figures):
        return None
    if type(facts["best_epoch"]) is not int:
        return None
    if not all(tensor.dtype == torch.float32 and bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        return None
    layers: Layers = {}
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        layers.setdefault(layer, {})[part] = tensor
    return DistilledEpochs(tuple(figures[0]), tuple(figures[1]), facts["best_epoch"], layers)


__all__ = ["DistillationFolder", "distillation_identity"]
