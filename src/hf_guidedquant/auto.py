"""A model's config by its name, and which of Transformers' Auto classes it belongs to."""

import os
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from .errors import AlreadyQuantizedError, ModelError


def read_config(name: str | os.PathLike, **options: Any) -> Any:
    """The config of a model, by its name on the Hub or its folder; ``options`` are those of ``AutoConfig``.

    Raises:
        ModelError: There is no such model, or Transformers does not know its kind.
    """
    try:
        return AutoConfig.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise ModelError(_why_not(os.fspath(name), error)) from error


def _why_not(name: str, error: Exception) -> str:
    if os.path.isdir(name):
        if not os.path.isfile(os.path.join(name, "config.json")):
            return f"{name} is no folder of a model: there is no config.json in it."
        return f"{name} is no model that Transformers knows: {error}"
    try:
        validate_repo_id(name)
    except HFValidationError:
        return f"There is no folder {name}, and a model of the Hub cannot have that name."
    return f"{name} is no folder, and could not be had from the Hub: {error}"


def check_unquantized(config: Any) -> None:
    """Refuse the config of a model that was quantized before, by this or by another method.

    Raises:
        AlreadyQuantizedError: Saying by which.
    """
    parts = config, config.get_text_config()
    saved: Any = next((found for part in parts if (found := getattr(part, "quantization_config", None))), None)
    if saved is not None:
        raise AlreadyQuantizedError(saved.get("quant_method") if isinstance(saved, dict) else None)


def auto_class(config: Any) -> Any:
    """The class that loads a model with this config: of a language model, or of one that also reads images.

    Raises:
        ModelError: Neither does.
    """
    found = _known_class(config)
    if found is None and "AutoModelForCausalLM" not in (getattr(config, "auto_map", None) or {}):
        raise ModelError(
            f"A model with a {type(config).__name__} is no causal language model, such as an encoder-decoder or a "
            "vision model; none of these can be quantized here."
        )
    return found or AutoModelForCausalLM


def pipeline_task(config: Any) -> str:
    """The pipeline that generates with a model of this config."""
    return "image-text-to-text" if _known_class(config) is AutoModelForImageTextToText else "text-generation"


def _known_class(config: Any) -> Any:
    autos = (AutoModelForCausalLM, AutoModelForImageTextToText)
    return next((auto for auto in autos if type(config) in auto._model_mapping), None)
