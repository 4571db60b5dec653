"""What goes along when a quantized model is saved or pushed: its model card, the report, checksums."""

import os
from pathlib import Path
from types import MethodType
from typing import Any

from huggingface_hub import ModelCard, file_exists
from torch import nn

from .card import model_card
from .checksums import write_checksums
from .report import Report
from .workers import Workers

CARD_FILE = "README.md"


def attach_saving(model: nn.Module, report: Report | None) -> None:
    """Make ``save_pretrained`` and ``push_to_hub`` of this model write a model card, and the report of the run.

    Transformers has no hook for files beside the weights, so two methods are wrapped on the instance: the one that
    saves, and the one that both ways of pushing upload with. A user's own README is left alone.
    """
    model.quantization_report = report  # type: ignore[assignment]
    model.save_pretrained = MethodType(save_pretrained, model)  # type: ignore[assignment]
    model._upload_modified_files = MethodType(_upload_modified_files, model)  # type: ignore[assignment]


# The two functions have the names of the methods they wrap: that is how a bound method is pickled, so that a model read
# back from a pickle has the plain methods again.


def save_pretrained(self: Any, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
    """``PreTrainedModel.save_pretrained``, and the companions. Of several processes the first one saves."""
    if "is_main_process" not in kwargs and not Workers(meet=False).first:
        return None
    result = type(self).save_pretrained(self, save_directory, *args, **kwargs)
    if _is_quantized(self) and kwargs.get("is_main_process", True):
        folder = Path(save_directory)
        write_checksums(folder)
        if not (folder / CARD_FILE).exists():
            _write_card(self, folder, folder.resolve().name)
        if self.quantization_report is not None:
            self.quantization_report.save(folder)
    return result


def _upload_modified_files(self: Any, working_dir: str, repo_id: str, *args: Any, **kwargs: Any) -> Any:
    """Upload with our model card, unless the repository has a README already.

    At this point transformers has put a README among the files: the repository's own, or one that it made up and that
    does not mention the import.
    """
    token, revisions = kwargs.get("token"), {kwargs.get("revision"), None}
    if _is_quantized(self) and not any(file_exists(repo_id, CARD_FILE, revision=r, token=token) for r in revisions):
        made_up = Path(working_dir, CARD_FILE)
        tags = ModelCard.load(made_up).data.tags if made_up.exists() else None
        _write_card(self, Path(working_dir), repo_id, tags)
    if _is_quantized(self):
        # save_pretrained(..., push_to_hub=True) uploads before it returns to us.
        write_checksums(Path(working_dir))
        if self.quantization_report is not None:
            self.quantization_report.save(Path(working_dir))
    return type(self)._upload_modified_files(self, working_dir, repo_id, *args, **kwargs)


def _is_quantized(model: Any) -> bool:
    """Whether a quantized model is what will be saved: of one with adapters of its own, only these are."""
    return getattr(model, "hf_quantizer", None) is not None and not getattr(model, "_hf_peft_config_loaded", False)


def _write_card(model: Any, folder: Path, name: str, tags: list[str] | None = None) -> None:
    (folder / CARD_FILE).write_text(
        str(model_card(model.config.quantization_config.to_dict(), name, tags or (), model)), encoding="utf-8"
    )
