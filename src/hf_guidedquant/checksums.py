"""Checksums of a saved model's weights: they tell a file that was damaged on its way."""

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from .errors import DamagedFileError, listed

# As ``sha256sum --check`` reads it.
CHECKSUM_FILE = "SHA256SUMS"
_CHUNK = 2**22


def write_checksums(folder: Path) -> None:
    """Write the checksums of all safetensors files in ``folder`` beside them."""
    lines = [f"{_sha256(file)}  {file.name}\n" for file in sorted(folder.glob("*.safetensors"))]
    (folder / CHECKSUM_FILE).write_text("".join(lines), encoding="utf-8")


def check_checksums(folder: Path, files: Iterable[Path]) -> int | None:
    """Compare files with the checksums in ``folder``: how many, or None if there are no checksums.

    Models saved by older versions have none.

    Raises:
        DamagedFileError: Naming the files that are not what was saved.
    """
    sums = folder / CHECKSUM_FILE
    if not sums.is_file():
        return None
    files = list(files)
    text = sums.read_text(encoding="utf-8", errors="replace")
    saved = {name: sha256 for sha256, name in re.findall(r"^([0-9a-f]{64})  (.+)$", text, re.MULTILINE)}
    damaged = [file.name for file in files if saved.get(file.name) != _sha256(file)]
    if damaged:
        raise DamagedFileError(f"{listed(damaged)}: not what was saved, by {CHECKSUM_FILE}. Download it again.")
    return len(files)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
