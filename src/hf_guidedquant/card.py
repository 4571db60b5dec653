"""The model card: how to load a quantized model, what it is, and how it was made."""

import re
from collections.abc import Iterable
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .measurement import bits_per_weight
from .nn import quantized_modules
from .report import megabytes
from .solvers import SOLVERS

_CALIBRATION = {"calibration": str, "rows": int, "tokens": int, "sha256": str, "seed": int}
_METHODS = {"lnq": "LNQ", "squeezellm": "SqueezeLLM (weighted k-means)", "rtn": "round to nearest"}

_BODY = """
# {title}

{bits}-bit language model, quantized{source} with hf-guidedquant: every output channel of a linear layer has its own
codebook.

**`import hf_guidedquant` before loading it.** Without the import Transformers does not know the format and stops with a
size mismatch of the `weight` tensors.

```bash
pip install hf-guidedquant
```

```python
import hf_guidedquant  # registers the format with Transformers
from transformers import pipeline

generator = pipeline("text-generation", model="{name}", device_map="auto")
print(generator("Once upon a time", max_new_tokens=40)[0]["generated_text"])
```

| | |
|---|---|
{facts}
"""


def model_card(model: Any, name: str, tags: Iterable[str] = ()) -> ModelCard:
    """The README of a quantized model that is saved or pushed as ``name``.

    Nothing is said of the licence: it is the original's, and the user's to state. ``measured`` of the model's report is
    in the table of facts, so what was measured before a model is saved is told.

    Args:
        model: A quantized model.
        name: A folder's name or a repository of the Hub; the snippet loads the model from there.
        tags: More tags for the Hub.
    """
    settings = model.config.quantization_config.to_dict()
    base = settings["provenance"].get("base_model")
    # From a config that anybody may have written.
    if not (isinstance(base, str) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base)):
        base = None
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=base,
        base_model_relation="quantized" if base else None,
        tags=list(dict.fromkeys(["guidedquant", f"{settings['bits']}-bit", *tags])),
    )
    body = _BODY.format(
        title=name.rpartition("/")[2] or name,
        name=name,
        bits=settings["bits"],
        source=f" from [{base}](https://huggingface.co/{base})" if base else "",
        facts="\n".join(f"| {_cell(key)} | {_cell(value)} |" for key, value in _facts(model, settings).items()),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{body}")


def _facts(model: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """What the card's table tells."""
    method, provenance, report = settings["method"], settings["provenance"], model.quantization_report
    guided = settings["guided"] and SOLVERS[method].statistics != "none"
    facts = {
        "method": _METHODS.get(method, method)
        + (", guided by the end loss ([GuidedQuant](https://arxiv.org/abs/2505.07004))" if guided else "")
        + (", codebooks distilled" if settings["distill"] else ""),
        "bits per weight": f"{bits_per_weight(model):.3f} in {len(quantized_modules(model))} linear layers, codebooks "
        "included",
        "size": megabytes(sum(tensor.nbytes for tensor in model.parameters())),
    }
    if report is not None:
        facts["size"] += f" (before: {megabytes(report.dense_bytes)})"
        if report.distillation is not None:
            facts["distilled"] = report.distillation.describe()
    if all(isinstance(provenance.get(key), kind) for key, kind in _CALIBRATION.items()):
        facts["calibration"] = (
            f"{provenance['calibration']}: {provenance['rows']} rows, {provenance['tokens']:,} tokens "
            f"(sha256 `{provenance['sha256'][:16]}…`), seed {provenance['seed']}"
        )
    return facts | (report.measured if report is not None else {})


def _cell(value: Any) -> str:
    """A value in a line of a Markdown table."""
    text = f"{value:.5g}" if isinstance(value, float) else " ".join(str(value).split())
    return text.replace("|", "\\|")
