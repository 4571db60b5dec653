"""Statistics that are kept (``statistics=``): one calibration serves runs with other bits, other methods, and restarts.

statistics/statistics.json   which model and data they are of
statistics/layers/*          one file per layer: ``diagonal [g, K]``, ``bad_rows``, ``tokens``, and ``hessian
                             [g, K, K]`` and ``curvature [N, N]`` once a method has needed them, all fp32 but the
                             counts
"""

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from huggingface_hub import snapshot_download

from ..config import GuidedQuantConfig
from ..errors import CalibrationError
from ..layer_folder import LayerFolder, differences
from ..plan import LayerPlan
from .collector import LayerStatistics
from .rows import Calibration

logger = logging.getLogger(__name__)

_FOLDER_FORMAT = 1
_HUB = "hf://"
_RECORD = "statistics.json"
_ABOUT = (
    "Calibration statistics (Hessians) of a language model, kept by hf-guidedquant. "
    "GuidedQuantConfig(statistics=...) uses them again for the same model and data, with any bits and method."
)


class StatisticsStore:
    """Statistics in a folder: read where they are there, written where they are not.

    Args:
        folder: The folder.
        writable: Whether new statistics are kept in it.
        until_the_end: Holds the folder's lock until the run ends, once something has to be written.
    """

    def __init__(self, folder: LayerFolder, writable: bool, until_the_end: ExitStack) -> None:
        self._folder, self._writable, self._until_the_end = folder, writable, until_the_end
        self._locked = False

    def begin(
        self,
        identity: Mapping[str, Any],
        environment: Mapping[str, Any],
        data: Mapping[str, Any],
        layers: Iterable[LayerPlan],
    ) -> None:
        """Check that the statistics are of this model and data, or get ready to fill the folder.

        Args:
            identity: What statistics depend on (:func:`statistics_identity`).
            environment: What their rounding depends on. A difference is logged.
            data: What else is worth knowing about the calibration data.
            layers: The layers whose statistics will be needed.

        Raises:
            FolderMismatchError: They are of another model, other data, or another objective.
            FolderUnusableError: Statistics are missing, and another process is at work or nothing can be written.
            CalibrationError: A repository without statistics.
        """
        names = [layer.name for layer in layers if layer.statistics != "none"]
        there = sum(self._folder.file(name).exists() for name in names)
        if there < len(names):
            self._lock()
        record = self._folder.record()
        if record is not None:
            self._folder.check_identity(record["identity"], identity)
            changes = differences(record.get("environment"), dict(environment))
            if changes:
                logger.info("The statistics can differ in rounding from new ones: %s.", "; ".join(changes))
        elif self._writable:
            self._lock()
            self._folder.write_record({"about": _ABOUT, "identity": identity, "environment": environment, "data": data})
        else:
            raise CalibrationError(f"The repository has no intact {_RECORD}, so it holds no statistics to use.")
        logger.info("Statistics of %d of %d layers are kept in %s.", there, len(names), self._folder.path)

    def load(self, layer: LayerPlan, device: torch.device) -> LayerStatistics | None:
        """What the layer's method needs, on ``device``; None if it is not there, and then the folder is locked."""
        tensors, _ = self._folder.load(layer.name) or ({}, None)
        expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            layer.statistics: (layer.statistics_shape, torch.float32),
            "diagonal": (layer.statistics_shape[:2], torch.float32),
            "bad_rows": ((), torch.int64),
            "tokens": ((), torch.int64),
        }
        if layer.curvature_shape is not None:
            expected["curvature"] = layer.curvature_shape, torch.float32
        if any(name not in tensors or (tensors[name].shape, tensors[name].dtype) != e for name, e in expected.items()):
            self._lock()
            return None
        there = {name: tensors[name].to(device) for name in expected}
        return LayerStatistics(
            there[layer.statistics],
            there["bad_rows"],
            there["tokens"],
            there["diagonal"] if layer.statistics == "hessian" else None,
            curvature=there.get("curvature"),
        )

    def save(self, name: str, statistics: LayerStatistics) -> None:
        """Keep a layer's statistics.

        Raises:
            FolderUnusableError: The disk is full or read-only. What was kept before is unharmed.
        """
        if not self._writable:
            return
        tensors = {"bad_rows": statistics.bad_rows, "tokens": statistics.tokens}
        if statistics.diagonal is None:
            tensors["diagonal"] = statistics.hessian
        else:
            tensors |= {"diagonal": statistics.diagonal, "hessian": statistics.hessian}
        if statistics.curvature is not None:
            tensors["curvature"] = statistics.curvature
        self._folder.save(name, tensors, {})

    def _lock(self) -> None:
        """Keep other processes from filling the folder too, from the moment that something turns out to be missing."""
        if self._writable and not self._locked:
            self._until_the_end.enter_context(self._folder.locked())
            self._locked = True


@contextmanager
def open_statistics(place: str | os.PathLike | None) -> Iterator[StatisticsStore | None]:
    """The statistics in a folder, or in a Hub repository (``"hf://owner/name"``, only read); None for None.

    Raises:
        CalibrationError: The repository cannot be fetched.
    """
    if place is None:
        yield None
        return
    on_hub = str(place).startswith(_HUB)
    folder = _fetch(str(place)) if on_hub else place
    with ExitStack() as stack:
        yield StatisticsStore(LayerFolder(folder, _RECORD, "statistics"), not on_hub, stack)


def _fetch(place: str) -> str:
    """Download a repository of statistics: ``hf://owner/name`` or ``hf://datasets/owner/name``."""
    repository = place.removeprefix(_HUB)
    kind = "dataset" if repository.startswith("datasets/") else "model"
    try:
        return snapshot_download(
            repository.removeprefix("datasets/"), repo_type=kind, allow_patterns=[_RECORD, "layers/*.safetensors"]
        )
    except (OSError, ValueError) as error:
        raise CalibrationError(f"statistics={place!r} cannot be fetched: {error}") from error


def statistics_identity(
    fingerprint: Mapping[str, str], config: GuidedQuantConfig, calibration: Calibration
) -> dict[str, Any]:
    """All that statistics depend on, in words that a message can use. ``fingerprint`` is the model's."""
    return {
        "statistics folder format": _FOLDER_FORMAT,
        "model": dict(fingerprint),
        "calibration data": calibration.sha256(),
        "guided": config.guided,
        "num_groups": config.num_groups if config.guided else 1,
        "assistant_only_loss": config.assistant_only_loss,
    }
