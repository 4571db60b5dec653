"""The tensors in a model's weight files: read from safetensors or pickles one by one, written as safetensors."""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from .checkpoint import DTYPES, PICKLED, SAFETENSORS, check_files, read_headers, weight_files
from .errors import CheckpointError, DamagedFileError, UnsafeFileError
from .formats.lut import TensorSpec

_ZIP = b"PK"


class WeightFiles(Mapping[str, Tensor]):
    """Tensors by name. Each access reads one, as a contiguous copy on the CPU; none are kept.

    Args:
        folder: Where the model was saved: safetensors or, in their absence, files of ``torch.save`` that hold nothing
            but tensors. One file, or several with an index.

    Attributes:
        specs: Shapes and dtypes.

    Raises:
        DamagedFileError: A file is cut off or cannot be read.
        UnsafeFileError: A file lies outside the folder, or runs code when it is read, which is not done.
        CheckpointError: There are no such files, or one holds something else than tensors.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        files = weight_files(Path(folder), pickled=True)
        check_files(files, str(folder), allowed=(SAFETENSORS, PICKLED))
        self.specs: dict[str, TensorSpec] = {}
        self._sources: dict[str, Path | Tensor] = {}
        for file in files:
            if file.suffix == SAFETENSORS:
                specs = read_headers([file])
                self._sources |= dict.fromkeys(specs, file)
            else:
                tensors = _unpickled(file)
                specs = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
                self._sources |= tensors
            self.specs |= specs

    def __getitem__(self, name: str) -> Tensor:
        source = self._sources[name]
        if isinstance(source, Tensor):
            return source.clone(memory_format=torch.contiguous_format)
        try:
            with safe_open(source, framework="pt") as tensors:
                return tensors.get_tensor(name)
        except SafetensorError as error:
            raise DamagedFileError(f"{source.name} cannot be read: {error}. Download it again.") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


def write_weights(
    folder: Path, specs: Mapping[str, TensorSpec], read: Callable[[str], Tensor], max_shard_size: int | str
) -> None:
    """Write tensors as safetensors: one file, or several with an index, of which one is in memory at a time.

    Args:
        folder: Where to.
        specs: Names, shapes and dtypes.
        read: Gives the tensor of a name.
        max_shard_size: Largest size of a file, like ``"5GB"``.
    """
    meta = {name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for name, spec in specs.items()}
    split = split_torch_state_dict_into_shards(meta, max_shard_size=max_shard_size)
    for file, names in split.filename_to_tensors.items():
        save_file({name: read(name) for name in names}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _unpickled(file: Path) -> dict[str, Tensor]:
    """The tensors in a file of ``torch.save``. They stay on the disk, but for files older than PyTorch 1.6."""
    with file.open("rb") as opened:
        mapped = opened.read(len(_ZIP)) == _ZIP
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except UnpicklingError as error:
        # Torch's own message advises to trust the file.
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"would run code ({code[1]})" if code else "is damaged, or would run code"
        raise UnsafeFileError(
            f"{file.name} {what} when it is read, which is refused; it may hold nothing but tensors. "
            "Use a copy in safetensors, from somebody you trust."
        ) from error
    except Exception as error:  # Which one is up to the damage.
        raise DamagedFileError(f"{file.name} cannot be read: {error}. Download it again.") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{file.name} holds a {type(loaded).__name__}; it must hold tensors by name.")
    for name, value in loaded.items():
        if not isinstance(name, str) or not _is_plain(value):
            raise CheckpointError(f"{file.name}: {name!r:.200} is no dense tensor. Nothing else is read.")
    return loaded


def _is_plain(value: object) -> bool:
    """Whether this is a dense tensor of a usual dtype that takes no more memory than there are bytes of it."""
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and value.dtype in DTYPES.values()
        and value.device.type == "cpu"
        and value.untyped_storage().nbytes() >= value.nbytes
    )
