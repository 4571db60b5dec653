"""Blocks of a run whose training is finished: each is kept in the run's folder, so that a killed run goes on behind it.

Of a block its file holds the figures of its report, what the training depends on, and the ``weight`` and ``lut`` of its
layers, if training made them better. The files of the solved layers stay as they are, for a training with other
settings.
"""

import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from .calibration import Calibration
from .config import ReconstructSpec
from .fingerprint import tensors_sha256
from .layer_folder import LayerFolder, differences
from .training import BlockReport, Layers, TrainedBlock, flat_tensors

logger = logging.getLogger(__name__)

_FIGURES = ("solved", "trained", "moved")
# Tensors of a layer that training may change.
_TRAINED = ("weight", "lut")


class TrainedBlocks:
    """The blocks that earlier processes of a run have trained, and the place for those that this one trains.

    A block was trained on what those before it gave, so it counts only if all of them are there.

    Args:
        folder: Of the run. Its record must be that of the run.
        identity: What training depends on beside that (:func:`training_identity`).
        solved: The solved layers of every block that is trained, in the order of the blocks.
    """

    def __init__(self, folder: LayerFolder, identity: Mapping[str, Any], solved: Mapping[str, Layers]) -> None:
        self._folder, self._identity, self._solved = folder, dict(identity), solved

    def finished(self) -> list[TrainedBlock]:
        """The blocks that are there, in order, up to the first gap; tensors on the CPU."""
        found = []
        for name in self._solved:
            block = self._load(name)
            if block is None:
                break
            found.append(block)
        if found:
            logger.info("%d of %d blocks are trained in %s.", len(found), len(self._solved), self._folder.path)
        return found

    def commit(self, block: TrainedBlock) -> None:
        """Keep a trained block. Those behind it, which were trained on what another one gave in its place, are removed.

        Raises:
            FolderUnusableError: The disk is full or read-only. The layers, and the blocks before it, are unharmed.
        """
        figures = asdict(block.report)
        name = figures.pop("name")
        order = list(self._solved)
        for later in order[order.index(name) + 1 :]:
            self._folder.remove(later)
        self._folder.save(name, flat_tensors(block.layers), {**figures, "training": self._identity})

    def _load(self, name: str) -> TrainedBlock | None:
        """The block, if it is there and was trained as this run does it."""
        kept = self._folder.load(name)
        if kept is None:
            return None
        block = _block(name, self._solved[name], *kept)
        if block is None:
            logger.warning("%s does not hold this block; it is trained again.", self._folder.file(name))
            return None
        changes = differences(kept[1]["training"], self._identity)
        if changes:
            logger.info("%s was trained otherwise (%s); training starts there.", name, "; ".join(changes))
            return None
        return block


def training_identity(
    spec: ReconstructSpec, calibration: Calibration, layers: Mapping[str, dict[str, Tensor]]
) -> dict[str, Any]:
    """All that trained blocks depend on beside the record of the run's folder; ``layers`` are all that were solved."""
    return {
        "reconstruct": asdict(spec),
        "calibration data": calibration.sha256(),
        "solved layers": tensors_sha256(flat_tensors(layers)),
    }


def _block(name: str, solved: Layers, tensors: Mapping[str, Tensor], facts: Any) -> TrainedBlock | None:
    """The block, if this is what training leaves of it; a folder that somebody else filled may hold anything."""
    if not isinstance(facts, dict) or facts.keys() != {*_FIGURES, "training"}:
        return None
    figures = {figure: facts[figure] for figure in _FIGURES}
    # Errors of a training that went astray may be infinite or NaN; then its layers are not used.
    if any(type(value) is not float or value < 0 for value in figures.values()) or not figures["moved"] <= 1:
        return None
    report = BlockReport(name, **figures)
    layers = {layer: {key: own[key] for key in _TRAINED} for layer, own in solved.items()} if report.kept else {}
    expected = {key: (tensor.shape, tensor.dtype) for key, tensor in flat_tensors(layers).items()}
    if {key: (tensor.shape, tensor.dtype) for key, tensor in tensors.items()} != expected:
        return None
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        return None
    return TrainedBlock(report, {layer: {key: tensors[f"{layer}.{key}"] for key in _TRAINED} for layer in layers})
