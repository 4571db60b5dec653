"""The model card: how to load a quantized model, what it is, and how it was made."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .auto import pipeline_task
from .config import CONVERTED
from .evaluate import bits_per_weight
from .nn import GuidedEmbedding, without_copies
from .report import megabytes
from .solvers import SOLVERS

_CALIBRATION = {"calibration": str, "rows": int, "tokens": int, "sha256": str, "seed": int}
# Texts are told if they look like this; a stranger's config may say anything.
_FORMS = {"calibration": r"[\w -]{1,40}", "sha256": r"\w{16,64}"}
_METHODS = {
    "lnq": "LNQ",
    "gptvq1d": "GPTVQ-1D",
    "gptq": "GPTQ",
    "squeezellm": "SqueezeLLM (weighted k-means)",
    "kmeans": "k-means",
    "rtn": "round to nearest",
}

_BODY = """
# {title}

{bits}-bit language model, {made}{source} with hf-guidedquant: every output channel of a linear layer has its own
codebook.

**`import hf_guidedquant` before loading it.** Without the import Transformers does not know the format and stops with a
size mismatch of the `weight` tensors.

```bash
pip install hf-guidedquant
```

```python
import hf_guidedquant  # registers the format with Transformers
from transformers import pipeline

generator = pipeline("{task}", model="{name}", device_map="auto")
print(generator({text}"Once upon a time", max_new_tokens=40)[0]["generated_text"])
```

| | |
|---|---|
{facts}
"""


def model_card(settings: Mapping[str, Any], name: str, tags: Iterable[str] = (), model: Any = None) -> ModelCard:
    """The README of a quantized model that is saved or pushed as ``name``.

    Nothing is said of the licence: it is the original's, and the user's to state. ``measured`` of the model's report is
    in the table of facts, so what was measured before a model is saved is told.

    Args:
        settings: Its config's, as they are saved.
        name: A folder's name or a repository of the Hub; the snippet loads the model from there.
        tags: More tags for the Hub.
        model: The model, if it is in memory. It tells sizes, and its report what the run did.
    """
    provenance = settings["provenance"]
    base, source = (_repository(provenance.get(key)) for key in ("base_model", "source"))
    origin = base or source
    task = "text-generation" if model is None else pipeline_task(model.config)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        base_model=base,
        base_model_relation="quantized" if base else None,
        tags=list(dict.fromkeys(["guidedquant", f"{settings['bits']}-bit", *tags])),
    )
    body = _BODY.format(
        title=name.rpartition("/")[2] or name,
        name=name,
        task=task,
        text="" if task == "text-generation" else "text=",
        bits=settings["bits"],
        made="converted" if settings["method"] == CONVERTED else "quantized",
        source=f" from [{origin}](https://huggingface.co/{origin})" if origin else "",
        facts="\n".join(f"| {_cell(key)} | {_cell(value)} |" for key, value in _facts(model, settings).items()),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{body}")


def _repository(name: object) -> str | None:
    """The name of a repository on the Hub, if it is one; a stranger's config may say anything."""
    form = r"[\w.-]{1,96}(/[\w.-]{1,96})?"
    return name if isinstance(name, str) and re.fullmatch(form, name, re.ASCII) else None


def _facts(model: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the card's table tells."""
    provenance, report = settings["provenance"], getattr(model, "quantization_report", None)
    facts = {"method": _method(settings)}
    if model is not None:
        layers = without_copies(model)
        tables = [layer for layer in layers.values() if isinstance(layer, GuidedEmbedding)]
        kinds = f"{len(layers) - len(tables)} linear layers" + " and the embeddings" * bool(tables)
        included = "codebooks and overlays" if settings["outliers"] else "codebooks"
        facts["bits per weight"] = f"{bits_per_weight(model):.3f} in {kinds}, {included} included"
        facts["size"] = megabytes(sum(tensor.nbytes for tensor in model.parameters()))
    if report is not None:
        facts["size"] += f" (before: {megabytes(report.dense_bytes)})"
        if report.reconstruction is not None:
            facts["reconstructed"] = report.reconstruction.describe()
        if report.distillation is not None:
            facts["distilled"] = report.distillation.describe()
    typed = all(isinstance(provenance.get(key), kind) for key, kind in _CALIBRATION.items())
    if typed and all(re.fullmatch(form, provenance[key], re.ASCII) for key, form in _FORMS.items()):
        facts["calibration"] = (
            f"{provenance['calibration']}: {provenance['rows']} rows, {provenance['tokens']:,} tokens "
            f"(sha256 `{provenance['sha256'][:16]}…`), seed {provenance['seed']}"
        )
    return facts | (report.measured if report is not None else {})


def _method(settings: Mapping[str, Any]) -> str:
    """How the model was quantized, in a line."""
    name = settings["method"]
    if name == CONVERTED:
        return "not known; converted from the any-precision format"
    parts = [_METHODS.get(name, name)]
    if settings["guided"] and SOLVERS[name].statistics != "none":
        parts.append("guided by the end loss ([GuidedQuant](https://arxiv.org/abs/2505.07004))")
    if settings["outliers"]:
        parts.append(f"{settings['outliers']:.2%} of the weights kept beside the codes")
    if settings["reconstruct"]:
        codes = settings["reconstruct"].get("codes", True)
        parts.append("blocks reconstructed" if codes else "codebooks reconstructed block by block")
    if settings["distill"]:
        parts.append("codebooks distilled")
    return ", ".join(parts)


def _cell(value: Any) -> str:
    """A value in a line of a Markdown table."""
    text = f"{value:.5g}" if isinstance(value, float) else " ".join(str(value).split())
    return text.replace("|", "\\|")
