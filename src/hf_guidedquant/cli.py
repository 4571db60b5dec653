"""The command line: ``python -m hf_guidedquant COMMAND ...``, with Optimum also ``optimum-cli guidedquant ...``."""

import argparse
import inspect as introspection
import json
import re
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

from .calibration.kinds import builtin_text
from .checkpoint import check_output_folder, save
from .config import METHODS, PRESETS, GuidedQuantConfig
from .errors import GuidedQuantError, TokenizerMissingError
from .evaluate import (
    TASKS,
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

_PROGRAM = "python -m hf_guidedquant"
_INTERRUPTED = 130
# What --speed reads before it generates: the beginning of the built-in text.
_PROMPT_TOKENS, _PROMPT_CHARACTERS = 32, 2000
# Fields of GuidedQuantConfig that are options, in the order of the help.
_PLAN_FIELDS = (
    "bits",
    "embedding_bits",
    "method",
    "guided",
    "num_groups",
    "num_samples",
    "seq_len",
    "max_memory",
    "device",
)
_QUANTIZE_FIELDS = (
    *_PLAN_FIELDS,
    "dataset",
    "assistant_only_loss",
    "seed",
    "reconstruct",
    "distill",
    "run_dir",
    "statistics",
)
# What the class takes, but a command line cannot be given, is left out.
_TEXTS = {
    "dataset": 'Calibration data: "builtin", "wikitext2", "c4", "redpajama", the path of a text file, or any dataset '
    """of the Hub, e.g. '{"name": "HuggingFaceH4/ultrachat_200k", "split": "train_sft"}'."""
}
_CONTEXT = introspection.signature(perplexity).parameters["context"].default


def main(arguments: Sequence[str] | None = None, program: str = _PROGRAM) -> int:
    """Run a command.

    Args:
        arguments: What stands after the program's name. Default: this process's own.
        program: What the help calls the program.

    Returns:
        The exit code: 0 if all went well, 1 after an error (its message is on stderr), 130 after Ctrl-C. Wrong usage
        raises ``SystemExit(2)``, as argparse does.
    """
    options = _parser(program).parse_args(arguments)
    try:
        options.run(options)
    except (GuidedQuantError, OSError) as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 1
    except KeyboardInterrupt:
        return _INTERRUPTED
    return 0


def _plan(options: argparse.Namespace) -> None:
    """Say what quantizing a model will do and take: layers, sizes, memory and time. Only its config is fetched."""
    forecast = plan(options.model, _config(options, _PLAN_FIELDS), probe=options.probe)
    _show(options, {**asdict(forecast), "bits_per_weight": forecast.bits_per_weight}, forecast.table())


def _quantize(options: argparse.Namespace) -> None:
    """Quantize a model, and save it with its tokenizer in a new folder."""
    check_output_folder(options.out)
    config = _config(options, _QUANTIZE_FIELDS)
    tokenizer = _tokenizer(options.model)
    model: Any = AutoModelForCausalLM.from_pretrained(
        options.model, quantization_config=config, dtype=options.dtype, device_map=options.device_map
    )
    folder = save(model, options.out, tokenizer)
    if options.push_to_hub:
        model.push_to_hub(options.push_to_hub)
        tokenizer.push_to_hub(options.push_to_hub)
    # Without --json the log has shown the report.
    _show(options, model.quantization_report.to_dict(), f"Saved in {folder}.")


def _convert(options: argparse.Namespace) -> None:
    """Convert a published any-precision checkpoint, GuidedQuant's among them. Codes and codebooks stay as they are."""
    folder = convert(options.source, options.out, options.bits, revision=options.revision)
    inspection = inspect(folder)
    _show(options, inspection.to_dict(), f"{inspection.table()}\nSaved in {folder}.")


def _evaluate(options: argparse.Namespace) -> None:
    """Measure models: perplexity on a text, distance to the original, speed of decoding, accuracy on tasks."""
    if not (options.text or options.tasks or options.speed):
        options.wrong("nothing to measure: give --text, --speed or --tasks")
    if options.original and not options.text:
        options.wrong("--original needs --text")
    text = Path(options.text).read_text(encoding="utf-8") if options.text else None
    if options.tasks:
        check_tasks(options.tasks)
    original = _load(options, options.original) if options.original else None
    found = [_measure(options, name, text, original) for name in options.models]
    if original is not None:
        measured: dict[str, Any] = {"tokens": found[0].tokens, "perplexity": found[0].original_perplexity}
        found.insert(0, replace(_measure(options, options.original, None, None, original), **measured))
    if len(found) == 1 and text is not None and not (options.tasks or options.speed):
        (only,) = found
        told = {"perplexity": only.perplexity, "tokens": only.tokens, "context": options.context}
        line = f"perplexity {only.perplexity:.4f} on {only.tokens:,} tokens, context {options.context}"
        _show(options, told, line)
        return
    told = {"context": options.context, "models": [measurement.to_dict() for measurement in found]}
    read = "" if text is None else f"\ntext: {found[0].tokens:,} tokens, context {options.context}"
    _show(options, told, comparison_table(found) + read)


def _measure(options: argparse.Namespace, name: str, text: str | None, original: Any, model: Any = None) -> Measurement:
    """What the options ask for, of one model."""
    tokenizer = _tokenizer(name)
    ids = None if text is None else token_ids(tokenizer, text)
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
    """Say what a saved model is, and check names, shapes and dtypes in its files. No weight is loaded."""
    inspection = inspect(options.folder, options.verify)
    _show(options, inspection.to_dict(), inspection.table())


def _chat(options: argparse.Namespace) -> None:
    """Talk to a model. /exit, or the end of the input, ends it."""
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


def _config(options: argparse.Namespace, names: Sequence[str]) -> GuidedQuantConfig:
    given = {name: getattr(options, name) for name in ("preset", *names) if hasattr(options, name)}
    return GuidedQuantConfig(**given)


def _tokenizer(model: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, ImportError) as error:
        raise TokenizerMissingError(f"The tokenizer of {model!r} cannot be loaded: {error}") from error


def _load(options: argparse.Namespace, name: str) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=options.dtype, device_map=options.device_map)
    cache_dequantized(model, model.device.type == "cpu" and not options.lean)
    return model


def _show(options: argparse.Namespace, result: dict[str, Any], text: str) -> None:
    _write((json.dumps(result, indent=1) if options.json else text) + "\n")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(program, description="2-4 bit language models for Hugging Face Transformers.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(run: Callable[[argparse.Namespace], None], example: str) -> argparse.ArgumentParser:
        name = run.__name__.removeprefix("_")
        about = introspection.getdoc(run) or ""
        added = commands.add_parser(
            name,
            help=about.partition(". ")[0].rstrip("."),
            description=about,
            epilog=f"example:\n  {program} {name} {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(run=run)
        return added

    planning = command(_plan, "meta-llama/Llama-3.1-8B-Instruct --bits 2 --max-memory 24")
    planning.add_argument("model", help="name or folder of the model")
    _add_settings(planning, _PLAN_FIELDS)
    planning.add_argument("--no-probe", dest="probe", action="store_false", help="do not measure this machine")
    quantizing = command(_quantize, "HuggingFaceTB/SmolLM2-135M-Instruct SmolLM2-3bit --bits 3")
    quantizing.add_argument("model", help="name or folder of the full-precision model")
    quantizing.add_argument("out", help="folder to save to; must be empty, or not exist")
    _add_settings(quantizing, _QUANTIZE_FIELDS)
    _add_loading(quantizing)
    quantizing.add_argument("--push-to-hub", metavar="REPO", help="also upload to this repository of the Hub")
    converting = command(_convert, "OWNER/ANY-PRECISION-MODEL converted --bits 3")
    converting.add_argument("source", help="name or folder of the published checkpoint")
    converting.add_argument("out", help="folder to save to; must be empty, or not exist")
    converting.add_argument("--bits", type=int, help="one of the widths that it holds (default: the largest)")
    converting.add_argument("--revision", help="branch, tag or commit of its repository")
    evaluating = command(_evaluate, "SmolLM2-2bit SmolLM2-3bit --text held_out.txt --original SmolLM2-135M --speed")
    evaluating.add_argument("models", metavar="MODEL", nargs="+", help="names or folders of models, quantized or not")
    evaluating.add_argument("--text", metavar="FILE", help="text file (UTF-8) to measure perplexity on")
    evaluating.add_argument("--context", type=int, default=_CONTEXT, help="tokens per window (default: %(default)s)")
    evaluating.add_argument(
        "--original", metavar="MODEL", help="also measure KL divergence and top-1 agreement with this model's answers"
    )
    evaluating.add_argument("--speed", action="store_true", help="also measure tokens per second of generate, batch 1")
    evaluating.add_argument(
        "--new-tokens", type=int, default=64, help="tokens to generate for --speed (default: %(default)s)"
    )
    evaluating.add_argument(
        "--tasks",
        nargs="?",
        type=lambda names: names.split(","),
        const=list(TASKS),
        help="also run tasks of lm-evaluation-harness, by names or YAML files with commas between; "
        f"without names: {', '.join(TASKS)}",
    )
    evaluating.set_defaults(wrong=evaluating.error)
    inspecting = command(_inspect, "SmolLM2-3bit --verify")
    inspecting.add_argument("folder", help="folder of a quantized model")
    inspecting.add_argument("--verify", action="store_true", help="read all files: checksums, NaN, infinity")
    chatting = command(_chat, "SmolLM2-3bit")
    chatting.add_argument("model", help="name or folder of a model, quantized or not")
    chatting.add_argument(
        "--max-new-tokens", type=int, default=512, help="longest reply, in tokens (default: %(default)s)"
    )
    for loading in (evaluating, chatting):
        _add_loading(loading)
        loading.add_argument("--lean", action="store_true", help="on a CPU: no dense copies of the weights; slow")
    for reporting in (planning, quantizing, converting, evaluating, inspecting):
        reporting.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def _add_loading(parser: argparse.ArgumentParser) -> None:
    """What ``from_pretrained`` takes."""
    dtypes = ("auto", "float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, default="auto", help="of what is not quantized; auto: as saved")
    parser.add_argument("--device-map", default="auto", help="auto, cpu, cuda:1, ... (default: %(default)s)")


def _add_settings(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    """Fields of :class:`GuidedQuantConfig` as options: its names, types, defaults and first sentences."""
    known = {field.name: field for field in fields(GuidedQuantConfig)}
    documented = re.findall(r"^    (\w+): (.+(?:\n     +.+)*)", introspection.getdoc(GuidedQuantConfig) or "", re.M)
    sentences = {name: re.split(r"(?<=\.)(?<!e\.g\.)\s+", text)[0] for name, text in documented} | _TEXTS
    about = "Values of several settings at once; settings that are given count instead."
    parser.add_argument("--preset", choices=PRESETS, default=argparse.SUPPRESS, help=about)
    for name in names:
        field = known[name]
        kinds = typing.get_args(field.type) or (field.type,)
        about = " ".join(sentences.get(name, "").replace("``", "").replace("%", "%%").split())
        if field.default is not None:
            about += f" (default: {field.default})"
        parse: dict[str, Any] = {"type": _number if float in kinds else int if int in kinds else str}
        if bool in kinds:
            parse = {"action": argparse.BooleanOptionalAction}
        elif name == "method":
            parse = {"choices": METHODS}
        elif name == "dataset":
            parse = {"type": _dataset}
        # What is not given is left to the preset, or else to the config.
        parser.add_argument("--" + name.replace("_", "-"), default=argparse.SUPPRESS, help=about, **parse)


def _dataset(text: str) -> str | dict[str, Any]:
    return json.loads(text) if text.startswith("{") else text


def _number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        return float(text)
