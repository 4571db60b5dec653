"""The commands of the command line: what each of them does with its options."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_token, is_offline_mode
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import Tensor
from transformers import AutoProcessor, AutoTokenizer, TextStreamer

from .auto import auto_class, check_unquantized, pipeline_task, read_config
from .calibration.kinds import builtin_text
from .calibration.local import JSON_SUFFIXES, read_text
from .checkpoint import check_output_folder, save
from .config import GuidedQuantConfig
from .errors import EvaluationError, OutputFolderError, TokenizerMissingError, UploadError
from .evaluate import (
    Measurement,
    check_tasks,
    compare,
    comparison_table,
    decode_speed,
    perplexity,
    run_tasks,
    token_ids,
)
from .forecast import plan
from .importer import convert
from .inspection import inspect
from .nn import cache_dequantized
from .page import PAGE_FILE, leave_page, write_page
from .pictures import check_picture, perplexity_curves
from .resources import check_device
from .workers import Workers

# What --speed reads before it generates: the beginning of the built-in text.
_PROMPT_TOKENS, _PROMPT_CHARACTERS = 32, 2000


def _plan(options: argparse.Namespace) -> None:
    """The forecast, from the model's config alone."""
    forecast = plan(options.model, config_of(options), probe=options.probe)
    _show(options, {**asdict(forecast), "bits_per_weight": forecast.bits_per_weight}, forecast.table())


def _quantize(options: argparse.Namespace) -> None:
    """Quantize a model and save it with a page about the run; the output folder is checked before all else."""
    check_output_folder(options.out)
    if options.push_to_hub:
        _check_upload(options.push_to_hub)
    check_device(options.device_map)
    config = config_of(options)
    _check_inside(options.out, config)
    model_config = read_config(options.model)
    check_unquantized(model_config)
    tokenizer = _tokenizer(options.model)
    processor = _processor(options.model, tokenizer) if "image" in pipeline_task(model_config) else tokenizer
    model: Any = auto_class(model_config).from_pretrained(
        options.model, quantization_config=config, dtype=options.dtype, device_map=options.device_map
    )
    folder = save(model, options.out, processor)
    if Workers(meet=False).first:
        leave_page(model.quantization_report, folder / PAGE_FILE)
    if options.push_to_hub:
        model.push_to_hub(options.push_to_hub)
        processor.push_to_hub(options.push_to_hub)
    # Without --json the log has shown the report.
    _show(options, model.quantization_report.to_dict(), f"Saved in {folder}.")


def _check_inside(out: Path, config: GuidedQuantConfig) -> None:
    """Refuse to keep a run's work in the output folder, which must be empty when the model is saved there.

    Raises:
        OutputFolderError: Naming the option.
    """
    for name in ("run_dir", "statistics"):
        kept = getattr(config, name)
        if kept and not str(kept).startswith("hf://") and Path(kept).resolve().is_relative_to(Path(out).resolve()):
            option = "--" + name.replace("_", "-")
            raise OutputFolderError(f"{option} {kept} is in the output folder {out}. Choose a folder beside it.")


def _convert(options: argparse.Namespace) -> None:
    """Convert a published checkpoint, and say what it has become."""
    folder = convert(options.source, options.out, options.bits, revision=options.revision)
    inspection = inspect(folder)
    _show(options, inspection.to_dict(), f"{inspection.table()}\nSaved in {folder}.")


def _evaluate(options: argparse.Namespace) -> None:
    """Measure one model after the other; the original, if there is one, comes first in the table."""
    if not (options.text or options.tasks or options.speed):
        options.wrong("nothing to measure: give --text, --speed or --tasks")
    for option in ("original", "picture"):
        if getattr(options, option) and not options.text:
            options.wrong(f"--{option} needs --text")
    if options.picture:
        check_picture(options.picture)
    text = _text(options.text) if options.text else None
    if options.tasks:
        check_tasks(options.tasks)
    names = [*options.models, *filter(None, [options.original])]
    tokenizers = {name: _tokenizer(name) for name in names}
    ids = {} if text is None else {name: token_ids(tokenizer, text) for name, tokenizer in tokenizers.items()}
    if options.original:
        _check_tokens(options.original, ids)
    original = _load(options, options.original) if options.original else None
    found = [_measure(options, name, tokenizers[name], ids.get(name), original) for name in options.models]
    if original is not None:
        first = _measure(options, options.original, tokenizers[options.original], None, None, original)
        found.insert(0, replace(first, tokens=found[0].tokens, perplexity=found[0].original_perplexity))
    _tell(options, found, text is not None)
    if options.picture:
        name = Path(options.text).stem
        curves: Any = {each.name: [(each.bits_per_weight, each.perplexity)] for each in found}
        whole = None if original is None else {name: curves.pop(options.original)[0][1]}
        perplexity_curves({name: curves}, whole).savefig(options.picture)


def _tell(options: argparse.Namespace, found: list[Measurement], read_text: bool) -> None:
    """Show what was measured."""
    if len(found) == 1 and read_text and not (options.tasks or options.speed):
        (only,) = found
        told = {"perplexity": only.perplexity, "tokens": only.tokens, "context": options.context}
        line = f"perplexity {only.perplexity:.4f} on {only.tokens:,} tokens, context {options.context}"
        _show(options, told, line)
        return
    told = {"context": options.context, "models": [measurement.to_dict() for measurement in found]}
    read = "" if not read_text else f"\ntext: {found[0].tokens:,} tokens, context {options.context}"
    _show(options, told, comparison_table(found) + read)


def _check_tokens(original: str, ids: dict[str, Tensor]) -> None:
    """Refuse models that do not read the text as the original does: their answers are about other tokens."""
    for name, read in ids.items():
        if not torch.equal(read, ids[original]):
            raise EvaluationError(
                f"{name} reads the text as other tokens than {original} does. Compare a model with the one it was "
                "quantized from."
            )


def _text(file: str) -> str:
    """The text to measure on."""
    if file.endswith(JSON_SUFFIXES):
        raise EvaluationError(
            f"{file} is JSON, and perplexity is of plain text: braces and keys would count. Write the texts to a file, "
            "e.g. jq -r .text FILE > texts.txt."
        )
    return read_text(file, EvaluationError)


def _measure(
    options: argparse.Namespace, name: str, tokenizer: Any, ids: Tensor | None, original: Any, model: Any = None
) -> Measurement:
    """What the options ask for, of one model."""
    model = _load(options, name) if model is None else model
    result: dict[str, Any] = {}
    if ids is not None:
        result["tokens"] = ids.numel()
        if original is None:
            result["perplexity"] = perplexity(model, tokenizer, ids, options.context)
        else:
            compared = asdict(compare(model, original, tokenizer, ids, options.context))
            result |= {key: compared[key] for key in ("perplexity", "original_perplexity", "kl", "top1")}
    if options.speed:
        prompt = token_ids(tokenizer, builtin_text()[:_PROMPT_CHARACTERS])[:_PROMPT_TOKENS]
        result["speed"] = decode_speed(model, prompt, options.new_tokens)
    if options.tasks:
        result["tasks"] = run_tasks(model, tokenizer, options.tasks)
    return Measurement.of(model, name, **result)


def _inspect(options: argparse.Namespace) -> None:
    """Say what a saved model is, after its files are checked."""
    inspection = inspect(options.folder, options.verify)
    _show(options, inspection.to_dict(), inspection.table())


def _report(options: argparse.Namespace) -> None:
    """Write the report of a saved model as a page."""
    _write(f"Written to {write_page(options.folder, options.out)}.\n")


def _chat(options: argparse.Namespace) -> None:
    """Answer every line of the input, with all that was said before in view."""
    tokenizer = _tokenizer(options.model)
    model = _load(options, options.model)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    messages: list[dict[str, str]] = []
    prompt = "> " if sys.stdin.isatty() else ""
    _write(prompt)
    for line in sys.stdin:
        said = line.strip()
        if said == "/exit":
            break
        if said:
            messages.append({"role": "user", "content": said})
            text = said
            if tokenizer.chat_template:
                text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            # A template writes the special tokens itself.
            inputs = tokenizer(text, add_special_tokens=not tokenizer.chat_template, return_tensors="pt")
            output = model.generate(**inputs.to(model.device), max_new_tokens=options.max_new_tokens, streamer=streamer)
            reply = output[0, inputs["input_ids"].shape[1] :]
            messages.append({"role": "assistant", "content": tokenizer.decode(reply, skip_special_tokens=True)})
        _write(prompt)


def config_of(options: argparse.Namespace) -> GuidedQuantConfig:
    """The settings that were given; the others are left to the preset, or else to the config."""
    known = {"preset", *(field.name for field in fields(GuidedQuantConfig))}
    return GuidedQuantConfig(**{name: value for name, value in vars(options).items() if name in known})


def _check_upload(repository: str) -> None:
    """Refuse an upload that cannot succeed, as far as this machine can tell."""
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UploadError(f"{repository} cannot be the name of a repository: {error}") from error
    if is_offline_mode():
        raise UploadError(f"{repository} cannot be uploaded to with HF_HUB_OFFLINE=1. Unset it.")
    if get_token() is None:
        raise UploadError(f"{repository} cannot be uploaded to without a token. Run `hf auth login`, or set HF_TOKEN.")


def _tokenizer(model: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, ImportError) as error:
        read_config(model)  # Of a model that is not there, the tokenizer is not what is missed.
        raise TokenizerMissingError(f"The tokenizer of {model!r} cannot be loaded: {error}") from error


def _processor(model: str, tokenizer: Any) -> Any:
    """What prepares texts and images for a model, or its tokenizer if there is nothing for images."""
    try:
        return AutoProcessor.from_pretrained(model)
    except (OSError, ValueError, ImportError):
        return tokenizer


def _load(options: argparse.Namespace, name: str) -> Any:
    check_device(options.device_map)
    kind = auto_class(read_config(name))
    model: Any = kind.from_pretrained(name, dtype=options.dtype, device_map=options.device_map)
    cache_dequantized(model, model.device.type == "cpu" and not options.lean)
    return model


def _show(options: argparse.Namespace, result: dict[str, Any], text: str) -> None:
    _write((json.dumps(result, indent=1) if options.json else text) + "\n")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "plan": _plan,
    "quantize": _quantize,
    "convert": _convert,
    "evaluate": _evaluate,
    "inspect": _inspect,
    "report": _report,
    "chat": _chat,
}
