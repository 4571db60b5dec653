"""What goes along when a quantized model is saved or pushed: its model card and the report of the run."""

import os
from pathlib import Path
from types import MethodType
from typing import Any

from huggingface_hub import HfApi, create_repo
from torch import nn

from .report import Report, model_card

CARD_FILE = "README.md"


def attach_saving(model: nn.Module, report: Report | None) -> None:
    """Make ``save_pretrained`` and ``push_to_hub`` of this model write a model card, and the report of the run.

    Transformers has no hook for files beside the weights, so the two methods are wrapped on the instance. A README
    that is already in the folder or the repository is left alone.
    """
    model.quantization_report = report  # type: ignore[assignment]
    model.save_pretrained = MethodType(_save_pretrained, model)  # type: ignore[assignment]
    model.push_to_hub = MethodType(_push_to_hub, model)  # type: ignore[assignment]


def _save_pretrained(self: Any, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
    result = type(self).save_pretrained(self, save_directory, *args, **kwargs)
    if getattr(self, "hf_quantizer", None) is not None and kwargs.get("is_main_process", True):
        write_companions(self, Path(save_directory))
    return result


def write_companions(model: Any, folder: Path) -> None:
    """The model card (unless there is a README) and, if the model was quantized in this process, its report."""
    settings = model.config.quantization_config.to_dict()
    report: Report | None = getattr(model, "quantization_report", None)
    if not (folder / CARD_FILE).exists():
        (folder / CARD_FILE).write_text(model_card(settings, report, folder.name), encoding="utf-8")
    if report is not None:
        report.save(folder)


def _push_to_hub(self: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
    # Transformers takes the README that is in the repository, or makes up one that does not mention the import. So ours
    # goes first, if there is none.
    options = {key: kwargs[key] for key in ("token", "private") if key in kwargs}
    repo_id = create_repo(repo_id, exist_ok=True, **options).repo_id
    token, revision = kwargs.get("token"), kwargs.get("revision")
    api = HfApi(token=token)
    if getattr(self, "hf_quantizer", None) is not None and not api.file_exists(repo_id, CARD_FILE, revision=revision):
        card = model_card(
            self.config.quantization_config.to_dict(), self.quantization_report, repo_id, tags=kwargs.get("tags")
        )
        api.upload_file(
            path_or_fileobj=card.encode(),
            path_in_repo=CARD_FILE,
            repo_id=repo_id,
            revision=revision,
            create_pr=None,
            commit_message="Add model card",
        )
    return type(self).push_to_hub(self, repo_id, *args, **kwargs)
