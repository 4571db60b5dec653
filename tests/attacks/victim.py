"""The model that is attacked, and what an attack may end with."""

import functools
import json
import shutil
import traceback
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import tiny_model, token_rows
from safetensors import SafetensorError
from transformers import PreTrainedModel

import hf_guidedquant
from hf_guidedquant import GuidedQuantConfig
from hf_guidedquant.errors import GuidedQuantError

ROOT = Path(__file__).parents[2]
PACKAGE_FILES = sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "triton_kernels").rglob("*.py")])
WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
ESCAPE = "\x1b[2Jgone\r\n[guidedquant] all is well\u202e"


@functools.cache
def quantized():
    return hf_guidedquant.quantize(tiny_model(), GuidedQuantConfig(bits=3, method="squeezellm", dataset=token_rows(4)))


@pytest.fixture(scope="module")
def intact(request, tmp_path_factory) -> Path:
    """The model, or that of the test module's own ``quantized``, saved."""
    model = getattr(request.module, "quantized", quantized)()
    return hf_guidedquant.save(model, tmp_path_factory.mktemp("intact") / "model")


@pytest.fixture
def folder(intact, tmp_path) -> Path:
    return Path(shutil.copytree(intact, tmp_path / "model"))


@pytest.fixture
def forbid_weights(monkeypatch):
    def reached(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", reached)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.stack(token_rows(1))).logits


def change_config(folder: Path, change) -> None:
    """Apply ``change`` to the contents of config.json."""
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))


def change_settings(folder: Path, **settings) -> None:
    """Set entries of quantization_config."""
    change_config(folder, lambda config: config["quantization_config"].update(settings))


@contextmanager
def nothing_but_named_errors(*names: str):
    """What is raised is an error of ours that mentions one of ``names``.

    What transformers and safetensors refuse before us may be any of their usual errors.
    """
    try:
        yield
    except GuidedQuantError as error:
        message = str(error)
        assert any(name in message for name in names) if names else len(message) > 20, message
        assert message.isprintable()
    except (ValueError, RuntimeError, OSError, SafetensorError) as error:
        files = [Path(frame.filename).resolve() for frame in traceback.extract_tb(error.__traceback__)]
        if any(file in PACKAGE_FILES for file in files):
            raise
