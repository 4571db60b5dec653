"""Named errors. Each message says what was found, what is allowed, and what to do."""

import re
from collections.abc import Iterable

# What a message shows of a value or a name; a stranger's may be of any length.
_SHOWN = 200


def printable(text: object) -> str:
    """A stranger's text on one line of a log or a terminal: line breaks are blanks, what does not print is escaped."""
    line = re.sub(r"\s*[\r\n]\s*", " ", str(text))
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def listed(names: Iterable[str], shown: int = 5, separator: str = ", ") -> str:
    """The first names of a list, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return separator.join(name[:_SHOWN] for name in names[:shown]) + more


class GuidedQuantError(Exception):
    """Base of every error that this package raises on purpose. Its message is one line without control characters."""

    def __str__(self) -> str:
        return printable(super().__str__())


class ConfigError(GuidedQuantError, ValueError):
    """A field of :class:`GuidedQuantConfig` has a value outside its range."""

    def __init__(self, field: str, value: object, allowed: str) -> None:
        super().__init__(f"GuidedQuantConfig.{field} = {value!r:.{_SHOWN}} is not allowed; it must be {allowed}.")
        self.field, self.value, self.allowed = field, value, allowed


class CalibrationError(GuidedQuantError, ValueError):
    """The calibration data cannot be used: nothing left, unknown kind, or too many bad rows."""


class TokenizerMissingError(CalibrationError):
    """Calibration texts were given, but no tokenizer to read them with."""


class ModelError(GuidedQuantError, ValueError):
    """The model cannot be quantized as it is."""


class NoLinearLayersError(ModelError):
    """Nothing in the model can be quantized under this config."""


class AlreadyQuantizedError(ModelError):
    """The model was quantized before, by this or by another method."""

    def __init__(self, method: object) -> None:
        super().__init__(
            f"This model is quantized already ({method or 'unknown method'}). Load the full-precision original instead."
        )


class NonFiniteWeightError(ModelError):
    """A weight of the model holds NaN or infinity."""

    def __init__(self, layers: Iterable[str]) -> None:
        self.layers = list(layers)
        super().__init__(
            f"NaN or infinite weights in: {listed(self.layers)}. Load an intact checkpoint; a float16 copy may have "
            "overflowed, so try dtype=torch.bfloat16 or torch.float32."
        )


class HessianError(GuidedQuantError, ArithmeticError):
    """A layer's statistics are unusable."""

    def __init__(self, layer: str, problem: str, remedy: str) -> None:
        super().__init__(f"Hessian of {layer}: {problem}. {remedy}")
        self.layer = layer


class SolverError(GuidedQuantError, ArithmeticError):
    """A layer's solution holds NaN or infinity, and is not kept."""

    def __init__(self, layer: str, device: object) -> None:
        super().__init__(
            f"Solving {layer} on {device} gave NaN or infinity, from finite weights and statistics. Run it again with "
            "HF_GUIDEDQUANT_KERNELS=torch, or on another device, and please report it."
        )
        self.layer = layer


class CheckpointError(GuidedQuantError, ValueError):
    """A saved model does not hold what its config promises."""


class DamagedFileError(CheckpointError):
    """A file of a saved model is cut off, or cannot be read."""


class UnsafeFileError(CheckpointError):
    """A file of a saved model lies outside its folder, or runs code when it is read."""


class TensorMismatchError(CheckpointError):
    """A saved model's tensors are not those that its config promises.

    Attributes:
        missing, unexpected: Names.
        wrong: Names of tensors of another shape or dtype, with what was expected and what was found.
    """

    def __init__(self, missing: Iterable[str], unexpected: Iterable[str], wrong: Iterable[str]) -> None:
        self.missing, self.unexpected, self.wrong = list(missing), list(unexpected), list(wrong)
        kinds = {"missing": self.missing, "not expected": self.unexpected, "wrong shape or dtype": self.wrong}
        problems = [f"{what}: {listed(names, 6)}" for what, names in kinds.items() if names]
        super().__init__(
            f"The checkpoint does not hold what its config promises. {'; '.join(problems)}. "
            "Download or save the model again."
        )


class NonFiniteTensorError(CheckpointError):
    """Tensors of a saved model hold NaN or infinity."""

    def __init__(self, what: str, names: Iterable[str]) -> None:
        self.names = list(names)
        super().__init__(
            f"NaN or infinite {what} in {listed(self.names, 6)}. The checkpoint is damaged; download or save it again."
        )


class OverlayError(CheckpointError):
    """Outliers of a saved model are not where a layer has weights."""

    def __init__(self, layers: Iterable[str]) -> None:
        self.layers = list(layers)
        super().__init__(
            f"overlay_columns of {listed(self.layers, 6)} are no inputs of the layer in ascending order. "
            "The checkpoint is damaged; download or save it again."
        )


class UnknownArchitectureError(CheckpointError):
    """A saved model's config asks for a model class that Transformers does not have."""


class AnyPrecisionConfigError(CheckpointError):
    """The config of a published any-precision checkpoint lacks a key, or has a value outside its range."""

    def __init__(self, key: str, value: object, allowed: str) -> None:
        found = "is missing" if value is None else f"is {value!r:.{_SHOWN}}"
        super().__init__(
            f"config.json: {key} {found}; it must be {allowed}. Only checkpoints in the any-precision format can be "
            "converted: check the name, or download it again."
        )
        self.key, self.value, self.allowed = key, value, allowed


class UnavailableBitsError(GuidedQuantError, ValueError):
    """A published any-precision checkpoint does not hold the bits that were asked for."""

    def __init__(self, bits: object, available: Iterable[int]) -> None:
        self.available = list(available)
        held = ", ".join(map(str, self.available))
        super().__init__(f"bits={bits!r} is not in this checkpoint, which holds {held}. Choose one of these.")


class OutputFolderError(GuidedQuantError, FileExistsError):
    """The folder to write to exists and is not empty, or it cannot be made."""


class UploadError(GuidedQuantError, OSError):
    """A model is to be uploaded to the Hub, and cannot be."""


class DeviceError(GuidedQuantError, ValueError):
    """A device is asked for that is not there."""


class FolderUnusableError(GuidedQuantError, OSError):
    """A folder of a run, or of kept statistics, is in use by another process, cannot be written to, or is full."""

    def __init__(self, folder: str, problem: str, remedy: str) -> None:
        super().__init__(f"{folder}: {problem}. {remedy}")


class FolderMismatchError(GuidedQuantError, ValueError):
    """A folder holds the work of another run, or statistics of another model or other data.

    Attributes:
        changes: What differs, like ``"seed was 0, is 1"``.
    """

    def __init__(self, folder: str, changes: Iterable[str], setting: str) -> None:
        self.changes = list(changes)
        super().__init__(
            f"{folder} was filled under other conditions: {listed(self.changes, 6, '; ')}. "
            f"Undo that change, set {setting} to another folder, or delete this one."
        )


class DecodingError(GuidedQuantError, ValueError):
    """A call of ``generate`` asks for something that the graphed decode loop cannot do."""

    def __init__(self, request: str) -> None:
        super().__init__(f"graphed_decode cannot do {request}. Call generate without custom_generate, which can.")


class NonFiniteScoresError(GuidedQuantError, RuntimeError):
    """A token is to be drawn from scores that are NaN or infinite."""

    def __init__(self) -> None:
        super().__init__(
            "The model's scores of the next token are NaN or infinite, so none can be drawn. Try another dtype: fp16 "
            "overflows where bf16 does not."
        )


class AdapterError(GuidedQuantError, ValueError):
    """An adapter asks for something that quantized layers cannot do."""


class WorkerError(GuidedQuantError, RuntimeError):
    """The processes that quantize a model together do not belong together, or one of them has stopped."""


class EvaluationError(GuidedQuantError, ValueError):
    """A model cannot be measured as asked."""


class PackageMissingError(GuidedQuantError, ImportError):
    """Something asked for needs a package that is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed. Install it: pip install 'hf-guidedquant[{extra}]'")
