"""Which of Transformers' Auto classes a model belongs to."""

from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText


def auto_class(config: Any) -> Any:
    """The class that loads a model with this config: of a language model, or of one that also reads images."""
    known = [
        auto for auto in (AutoModelForCausalLM, AutoModelForImageTextToText) if type(config) in auto._model_mapping
    ]
    return known[0] if known else AutoModelForCausalLM


def pipeline_task(config: Any) -> str:
    """The pipeline that generates with a model of this config."""
    return "image-text-to-text" if auto_class(config) is AutoModelForImageTextToText else "text-generation"
