"""Reading and writing saved models safely: header pre-flight, all-or-nothing folders."""

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import align_module_device
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from .errors import (
    CheckpointError,
    DamagedFileError,
    NonFiniteTensorError,
    OutputFolderError,
    OverlayError,
    TensorMismatchError,
    UnsafeFileError,
)
from .formats.lut import TensorSpec, are_columns
from .nn import quantized_modules
from .workers import Workers

DTYPES = {
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
# A header larger than this is not one of a checkpoint (the safetensors limit).
_MAX_HEADER = 100_000_000
SAFETENSORS, PICKLED = ".safetensors", ".bin"


def weight_files(folder: Path, pickled: bool = False) -> list[Path]:
    """The files that hold a saved model's weights: one, or those that an index names.

    Args:
        folder: Where the model was saved.
        pickled: Whether ``pytorch_model.bin``, or its index, will do where there are no safetensors.

    Raises:
        CheckpointError: There is neither, or the index cannot be read.
    """
    known = [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, *([WEIGHTS_NAME, WEIGHTS_INDEX_NAME] if pickled else [])]
    index = next((folder / name for name in known if (folder / name).is_file()), None)
    if index is None:
        raise CheckpointError(f"{folder} has neither {' nor '.join(known)}. Download the model again.")
    if index.suffix in (SAFETENSORS, PICKLED):
        return [index]
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        files = [folder / name for name in sorted(names)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index.name} is no readable index of weights. Download it again.") from error
    if not files:
        raise CheckpointError(f"{index.name} names no files. Download it again.")
    return files


def check_files(files: Iterable[str | os.PathLike], origin: str, allowed: tuple[str, ...] = (SAFETENSORS,)) -> None:
    """Refuse files of other kinds than the ``allowed``, and an index that points outside the model's folder.

    Raises:
        CheckpointError: Naming the file.
    """
    folders = {os.path.dirname(os.path.abspath(file)) for file in files}
    root = os.path.abspath(origin) if os.path.isdir(origin) else min(folders)
    for file in map(os.path.abspath, files):
        if not file.endswith(allowed):
            kinds = " or ".join(kind.removeprefix(".") for kind in allowed)
            raise CheckpointError(f"{os.path.basename(file)} is no {kinds} file; nothing else is read.")
        if os.path.commonpath([root, file]) != root:
            raise UnsafeFileError(f"{file} lies outside the model's folder. Do not trust this checkpoint.")
        if not os.path.isfile(file):
            raise CheckpointError(f"{os.path.basename(file)} is missing. Download the model again.")


def read_headers(files: Iterable[str | os.PathLike]) -> dict[str, TensorSpec]:
    """Names, shapes and dtypes of all tensors in safetensors files, without reading the tensors.

    Raises:
        DamagedFileError: A file is truncated, or is no safetensors file.
    """
    found: dict[str, TensorSpec] = {}
    for path in map(Path, files):
        header, data_bytes = _read_header(path)
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            try:
                spec = TensorSpec(tuple(entry["shape"]), DTYPES.get(entry["dtype"], torch.complex64))
                end = entry["data_offsets"][1]
            except (TypeError, KeyError, IndexError) as error:
                raise DamagedFileError(
                    f"{path.name}: the header entry of {name!r} is malformed. Download it again."
                ) from error
            if not isinstance(end, int) or end > data_bytes:
                raise DamagedFileError(
                    f"{path.name} is truncated: {name!r} ends past the end of the file. Download it again."
                )
            found[name] = spec
        _check_layout(path)
    return found


def _check_layout(path: Path) -> None:
    """Let safetensors itself look at the header: shapes, offsets, gaps. No tensor is read."""
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise DamagedFileError(f"{path.name} is no valid safetensors file: {error}. Download it again.") from error


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The JSON header of a safetensors file, and how many bytes of data follow it."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size - 8, _MAX_HEADER):
                raise DamagedFileError(f"{path.name} is truncated or no safetensors file. Download it again.")
            header = json.loads(file.read(length))
    except (struct.error, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise DamagedFileError(f"{path.name} is no readable safetensors file: {error}. Download it again.") from error
    if not isinstance(header, dict):
        raise DamagedFileError(f"{path.name}: the header is not a table of tensors. Download it again.")
    return header, size - 8 - length


def preflight(
    found: Mapping[str, TensorSpec],
    quantized: Mapping[str, TensorSpec],
    others: Mapping[str, TensorSpec],
    exact: bool,
    ignore: Iterable[str] = (),
) -> None:
    """Compare a checkpoint's headers with what a model needs, before any weight is loaded.

    Args:
        found: What the checkpoint holds (:func:`read_headers`).
        quantized: Tensors of the quantized layers, by their name in the checkpoint. Names, shapes and dtypes must
            match.
        others: The other tensors that must be there. Of their dtypes only the kind must match, since transformers
            converts between floats.
        exact: Whether the checkpoint may hold no tensors besides these (it may, for another head on the same body).
        ignore: Names that may be missing (tied weights) or left over.

    Raises:
        TensorMismatchError: Tensors are missing, left over, or of the wrong shape or dtype. The message names them.
    """
    expected = {**quantized, **others}
    layers = {name.rpartition(".")[0] for name in quantized}
    ignored = set(ignore)
    missing = sorted(expected.keys() - found.keys() - ignored)
    extra = sorted(
        name for name in found.keys() - expected.keys() - ignored if exact or name.rpartition(".")[0] in layers
    )
    wrong = [
        f"{name} (expected {_describe(expected[name])}, got {_describe(found[name])})"
        for name in sorted(expected.keys() & found.keys())
        if not _fits(
            found[name], expected[name], same_dtype=name in quantized and not name.endswith((".bias", ".scale"))
        )
    ]
    if missing or extra or wrong:
        raise TensorMismatchError(missing, extra, wrong)


def _fits(found: TensorSpec, expected: TensorSpec, same_dtype: bool) -> bool:
    """Same shape, and the same dtype or at least the same kind of dtype."""
    if found.shape != expected.shape:
        return False
    if same_dtype:
        return found.dtype == expected.dtype
    return found.dtype.is_floating_point == expected.dtype.is_floating_point


def _describe(spec: TensorSpec) -> str:
    return f"{str(spec.dtype).removeprefix('torch.')} {list(spec.shape)}"


def check_layers(model: nn.Module) -> None:
    """Refuse a loaded model whose quantized layers hold NaN or infinity, or outliers where there are no weights.

    Raises:
        NonFiniteTensorError: Naming the layers.
        OverlayError: Naming the layers.
    """
    bad, astray = [], []
    for name, module in quantized_modules(model).items():
        # An offloaded layer's tensors are elsewhere until they are used.
        with align_module_device(module):
            floats = [tensor for tensor in module.parameters() if tensor.is_floating_point()]
            if not all(torch.isfinite(tensor).all() for tensor in floats):
                bad.append(name)
            if module.overlay_columns is not None and not are_columns(module.overlay_columns, module.in_features):
                astray.append(name)
    if bad:
        raise NonFiniteTensorError("codebook, bias or overlay", bad)
    if astray:
        raise OverlayError(astray)


def check_tensors(files: Iterable[str | os.PathLike], inputs: Mapping[str, int]) -> None:
    """Read every tensor in safetensors files, one at a time, and refuse what loading would refuse.

    Args:
        files: The files.
        inputs: Number of inputs of every quantized layer, by its name.

    Raises:
        CheckpointError: Naming the tensors, or the file that cannot be read.
    """
    bad, astray = [], []
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  # no mapping, it only has this method
                    tensor = tensors.get_tensor(name)
                    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                        bad.append(name)
                    layer, _, key = name.rpartition(".")
                    if key == "overlay_columns" and layer in inputs and not are_columns(tensor, inputs[layer]):
                        astray.append(layer)
        except SafetensorError as error:
            raise DamagedFileError(f"{os.path.basename(file)} cannot be read: {error}. Download it again.") from error
    if bad:
        raise NonFiniteTensorError("values", bad)
    if astray:
        raise OverlayError(astray)


def check_output_folder(folder: str | os.PathLike) -> Path:
    """The folder as a path, if it is empty, or does not exist yet and can be made. Nothing is left behind.

    Raises:
        OutputFolderError: There is something in it, or it cannot be made.
    """
    # A link leads to the folder that is meant, and would itself be in the way of one.
    path = Path(folder).resolve()
    try:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise OutputFolderError(
                f"{path} exists and is not an empty folder. Remove it, or choose another output folder."
            )
        # Only trying tells: permissions do not count for all users, nor everywhere.
        nearest = next(parent for parent in (path, *path.parents) if parent.exists())
        with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=nearest):
            pass
    except OutputFolderError:
        raise
    except OSError as error:
        raise OutputFolderError(
            f"{path} cannot be made: {error.strerror or error}. Choose another output folder."
        ) from error
    return path


def save(model: Any, folder: str | os.PathLike, tokenizer: Any = None, **options: Any) -> Path:
    """Save a model (and its tokenizer) into a new folder, all or nothing.

    An interrupted save leaves nothing behind that looks like a model. ``options`` go to ``save_pretrained``
    (``max_shard_size=...``). Of processes that quantize together the first one saves.

    Raises:
        OutputFolderError: The folder exists and is not empty, or cannot be made.
    """
    if not Workers(meet=False).first:
        return Path(folder)
    target = check_output_folder(folder)
    with staged(target) as temporary:
        model.save_pretrained(temporary, **options)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
    return target


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A temporary folder, which becomes ``target`` at the end unless there is an error.

    An empty ``target`` that is there already stays, because it may be a mount: its files come last, config.json after
    all others, without which they are no model.

    Raises:
        OutputFolderError: What is finished cannot be moved there. It stays where it is, and the message says where.
    """
    is_there = target.exists()
    (target if is_there else target.parent).mkdir(parents=True, exist_ok=True)
    around = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target if is_there else target.parent))
    # Named like the target, because the model card shows the folder's name.
    temporary = around / target.name
    try:
        temporary.mkdir()
        yield temporary
    except BaseException:
        shutil.rmtree(around, ignore_errors=True)
        raise
    try:
        if is_there:
            for file in sorted(temporary.iterdir(), key=lambda file: file.name == "config.json"):
                file.rename(target / file.name)
        else:
            temporary.rename(target)
    except OSError as error:
        raise OutputFolderError(
            f"{target} cannot be filled: {error.strerror or error}. The finished model is in {temporary}."
        ) from error
    shutil.rmtree(around, ignore_errors=True)
