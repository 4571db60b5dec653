"""Folders that outlive the process: tensors of one layer (or block) per file, each whole and checked or not there.

Every file is written under a temporary name, flushed to the disk and renamed, so that a kill at any moment leaves what
was there before. A file carries the sha256 of all it holds and of the folder's record, a small JSON that says what the
folder belongs to; a file that is damaged, or comes from another folder, counts as absent.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import FolderMismatchError, FolderUnusableError, printable
from .fingerprint import json_sha256, tensors_sha256

logger = logging.getLogger(__name__)

_LOCK, _LAYERS = "lock", "layers"
# Characters of a value, or of its name, that a message shows.
_SHOWN = 200


class LayerFolder:
    """A folder of checked files, one per layer, and the record of what they belong to.

    Args:
        path: The folder. It is made when something is written.
        record: Name of the record's file.
        setting: The field of :class:`GuidedQuantConfig` that names the folder, for messages.
    """

    def __init__(self, path: str | os.PathLike, record: str, setting: str) -> None:
        self.path, self.setting = Path(path).absolute(), setting
        self._record_file = self.path / record
        self._record_sha256 = ""

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process. The operating system lets go of it however the process ends.

        Raises:
            FolderUnusableError: Another process holds it, or it cannot be written to.
        """
        links = [name for name in (_LOCK, _LAYERS) if (self.path / name).is_symlink()]
        if links:
            # What is written, or cleared away, would be somebody else's.
            raise FolderUnusableError(self._named(), f"{links[0]} in it is a link", "Remove it.")
        lock = FileLock(self.path / _LOCK, timeout=0)
        try:
            (self.path / _LAYERS).mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout as error:
            raise FolderUnusableError(
                self._named(), "another process is writing to it", "Wait for it to end, or choose another folder."
            ) from error
        except OSError as error:
            raise FolderUnusableError(
                self._named(), f"it cannot be written to ({error})", "Choose another folder."
            ) from error
        try:
            self._remove_leftovers()
            yield
        finally:
            lock.release()

    def _remove_leftovers(self) -> None:
        """What a killed process was writing, under our temporary names and under those of safetensors."""
        layers = self.path / _LAYERS
        strays = [*layers.glob("*.safetensors.tmp"), *layers.glob(".tmp??????"), _temporary(self._record_file)]
        for stray in strays:
            stray.unlink(missing_ok=True)

    def record(self) -> dict[str, Any] | None:
        """The folder's record; None if there is none yet, or if it is damaged."""
        if not self._record_file.is_file():
            return None
        try:
            kept = json.loads(self._record_file.read_bytes())
            sha256 = kept.pop("sha256")
            kept["identity"]
        except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError):
            kept = sha256 = None
        if sha256 is None or sha256 != json_sha256(kept):
            logger.warning("%s is damaged and counts as absent.", self._record_file)
            return None
        self._record_sha256 = sha256
        return kept

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Make ``record`` the folder's record. Files that were kept under another one count as absent from now on."""
        self._record_sha256 = json_sha256(record)
        with self._replacing(self._record_file) as temporary:
            text = json.dumps({**record, "sha256": self._record_sha256}, indent=1) + "\n"
            temporary.write_text(text, encoding="utf-8")

    def check_identity(self, kept: Any, now: Any) -> None:
        """Refuse to go on with a folder of something else.

        Raises:
            FolderMismatchError: Naming each difference.
        """
        changes = differences(kept, json.loads(json.dumps(now)))
        if changes:
            raise FolderMismatchError(self._named(), changes, self.setting)

    def file(self, layer: str) -> Path:
        """Where a layer's tensors are kept. The hash tells names apart that differ in unsafe characters only."""
        readable = re.sub(r"[^A-Za-z0-9_.-]", "_", layer)[-100:]
        return self.path / _LAYERS / f"{readable}-{hashlib.sha256(layer.encode()).hexdigest()[:12]}.safetensors"

    def save(self, layer: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Keep a layer's tensors, and JSON-like ``facts`` about them.

        Raises:
            FolderUnusableError: The disk is full or read-only. Whatever was kept before is unharmed.
        """
        tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
        about = json.dumps({"layer": layer, "record": self._record_sha256, "facts": facts})
        metadata = {"about": about, "sha256": _sha256_of_file(about, tensors)}
        with self._replacing(self.file(layer)) as temporary:
            save_file(tensors, temporary, metadata)

    def load(self, layer: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """A layer's tensors (on the CPU) and facts; None if they are not there, damaged, or of another record."""
        path = self.file(layer)
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
                # Copies, because what safetensors gives is a window onto the file, which may change or go away.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  (no mapping)
            about = json.loads(metadata["about"])
            if metadata["sha256"] != _sha256_of_file(metadata["about"], tensors):
                raise ValueError("its checksum is wrong")
            if (about["layer"], about["record"]) != (layer, self._record_sha256):
                raise ValueError("it was written under other conditions")
            return tensors, about["facts"]
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            logger.warning("%s cannot be used (%s); it is done again.", path, printable(error))
            return None

    def remove(self, layer: str) -> None:
        """Forget a layer, if it is there.

        Raises:
            FolderUnusableError: The folder cannot be written to.
        """
        path = self.file(layer)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise FolderUnusableError(
                self._named(), f"{path.name} cannot be removed ({error})", "Mend the folder, and run the same again."
            ) from error

    @contextmanager
    def _replacing(self, path: Path) -> Iterator[Path]:
        """A temporary name to write to; it becomes ``path`` at the end, all at once and to stay."""
        temporary = _temporary(path)
        try:
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
        except (OSError, SafetensorError) as error:
            raise FolderUnusableError(
                self._named(),
                f"{path.name} cannot be written ({error})",
                "All that was kept before is still there: free some space or mend the folder, and run the same again.",
            ) from error
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _named(self) -> str:
        return f"{self.setting}={str(self.path)!r}"


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def _sha256_of_file(about: str, tensors: Mapping[str, Tensor]) -> str:
    return hashlib.sha256(f"{tensors_sha256(tensors)} {about}".encode()).hexdigest()


def _sync_folder(folder: Path) -> None:
    """Flush a rename. Only POSIX systems can open a folder."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def differences(kept: Any, now: Any, name: str = "the record") -> list[str]:
    """What differs between two JSON values, as ``seed was 0, is 1``."""
    if isinstance(kept, dict) and isinstance(now, dict):
        keys = {**kept, **now}
        return [line for key in keys for line in differences(kept.get(key), now.get(key), printable(key)[:_SHOWN])]
    return [] if kept == now else [f"{name} was {_short(kept)}, is {_short(now)}"]


def _short(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value):
        return value[:12] + "…"
    return "absent" if value is None else printable(value)[:_SHOWN]
