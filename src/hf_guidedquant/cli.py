"""The command line: ``python -m hf_guidedquant COMMAND ...``, with Optimum also ``optimum-cli guidedquant ...``.

Help should not wait for torch and transformers: what takes long to import is imported when a command needs it.
"""

import argparse
import importlib
import inspect as introspection
import json
import re
import sys
import typing
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields
from itertools import pairwise
from typing import Any

from .errors import GuidedQuantError

_PROGRAM = "python -m hf_guidedquant"
_INTERRUPTED = 130
# Fields of GuidedQuantConfig that are options, in the order of the help.
_PLAN_FIELDS = (
    "bits",
    "embedding_bits",
    "method",
    "guided",
    "num_groups",
    "output_curvature",
    "outliers",
    "num_samples",
    "seq_len",
    "reconstruct",
    "distill",
    "max_memory",
    "device",
)
_QUANTIZE_FIELDS = (
    *_PLAN_FIELDS,
    "dataset",
    "assistant_only_loss",
    "seed",
    "run_dir",
    "statistics",
)
# Fields that are False, True or settings.
_TRAINING = ("reconstruct", "distill")
# Without what the class takes but a command line cannot be given, and in a sentence what would need two.
_TEXTS = {
    "bits": "Bits per weight, 1-8; a number with a point, like 2.5, is a mean that layers share out by the end loss.",
    "num_groups": "Groups of output channels that share one guided Hessian, per layer, 1-1024; a layer with fewer "
    "outputs has a group for each.",
    "max_memory": "GiB that may be in use on every device, weights included (default: what is free).",
    "device": 'Where to compute, e.g. "cuda:1" or "cpu", if the weights lie in the CPU\'s memory (default: the first '
    "GPU, if there is one).",
    "statistics": "A folder that keeps the Hessians, so that other bits or methods need no pass over the same data.",
    "dataset": 'Calibration data: "builtin", "wikitext2", "c4", "redpajama", the path of a text file, or of a .json or '
    ".jsonl file of texts or chats (by themselves, or as text or messages of objects), or any dataset of the Hub, e.g. "
    """'{"name": "HuggingFaceH4/ultrachat_200k", "split": "train_sft"}', or a file or folder with another column, """
    """e.g. '{"name": "chats.jsonl", "column": "conversation"}'.""",
}
# The library's own, which are not imported for the help: the context of perplexity, the usual tasks.
_CONTEXT = 2048
_TASKS = ("arc_easy", "arc_challenge", "boolq", "hellaswag", "openbookqa", "piqa", "social_iqa", "winogrande")


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
        _commands()[options.command](options)
    except (GuidedQuantError, OSError) as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 1
    except KeyboardInterrupt:
        return _INTERRUPTED
    return 0


def _commands() -> dict[str, Callable[[argparse.Namespace], None]]:
    package = sys.modules[__package__]
    if not hasattr(package, "register"):
        # On the way here it left out what takes long.
        importlib.reload(package)
    from .commands import COMMANDS

    return COMMANDS


class _Command(argparse.ArgumentParser):
    """The parser of a command, which learns its arguments when it is used: some stand in what takes long to import."""

    def __init__(self, learn: Callable[[argparse.ArgumentParser], None], **options: Any) -> None:
        super().__init__(**options)
        self._learn: Callable[[argparse.ArgumentParser], None] | None = learn

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        learn, self._learn = self._learn, None
        if learn is not None:
            learn(self)
        return super().parse_known_args(_without_guessing(args), namespace)


def _without_guessing(arguments: Sequence[str]) -> list[str]:
    """The arguments, with ``true`` behind an option that settings could follow where what follows is something else."""
    options = [f"--{name}" for name in _TRAINING]
    return [
        f"{argument}=true" if argument in options and not following.startswith("{") else argument
        for argument, following in pairwise([*arguments, "{"])
    ]


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        program,
        description="2-4 bit language models for Hugging Face Transformers.",
        epilog=f"{program} COMMAND --help explains a command, with an example. To begin with: quantize, then chat.",
    )
    parser.add_argument("--version", action="version", version=sys.modules[__package__].__version__)
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", required=True, parser_class=_Command)
    for name, (about, example, learn) in _COMMANDS.items():
        commands.add_parser(
            name,
            help=about.partition(". ")[0].rstrip("."),
            description=about,
            epilog=f"example:\n  {program} {name} {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            learn=learn,
        )
    return parser


def _planning(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="name or folder of the model")
    _add_settings(parser, _PLAN_FIELDS)
    parser.add_argument("--no-probe", dest="probe", action="store_false", help="do not measure this machine")
    _add_json(parser)


def _quantizing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="name or folder of the full-precision model")
    parser.add_argument("out", help="folder to save to; must be empty, or not exist")
    _add_settings(parser, _QUANTIZE_FIELDS)
    _add_loading(parser)
    parser.add_argument("--push-to-hub", metavar="REPO", help="also upload to this repository of the Hub")
    _add_json(parser)


def _converting(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="name or folder of the published checkpoint")
    parser.add_argument("out", help="folder to save to; must be empty, or not exist")
    parser.add_argument("--bits", type=_integer, help="one of the widths that it holds (default: the largest)")
    parser.add_argument("--revision", help="branch, tag or commit of its repository")
    _add_json(parser)


def _evaluating(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", metavar="MODEL", nargs="+", help="names or folders of models, quantized or not")
    parser.add_argument("--text", metavar="FILE", help="text file (UTF-8) to measure perplexity on")
    parser.add_argument("--context", type=_integer, default=_CONTEXT, help="tokens per window (default: %(default)s)")
    parser.add_argument(
        "--original", metavar="MODEL", help="also measure KL divergence and top-1 agreement with this model's answers"
    )
    parser.add_argument("--picture", metavar="FILE", help="also draw perplexity against bits per weight, e.g. as .png")
    parser.add_argument("--speed", action="store_true", help="also measure tokens per second of generate, batch 1")
    parser.add_argument(
        "--new-tokens", type=_count, default=64, help="tokens to generate for --speed (default: %(default)s)"
    )
    parser.add_argument(
        "--tasks",
        nargs="?",
        type=lambda names: names.split(","),
        const=list(_TASKS),
        help="also run tasks of lm-evaluation-harness, by names or YAML files with commas between; "
        f"without names: {', '.join(_TASKS)}",
    )
    parser.set_defaults(wrong=parser.error)
    _add_loading(parser)
    _add_lean(parser)
    _add_json(parser)


def _inspecting(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="folder of a quantized model; hf download fetches one of the Hub")
    parser.add_argument("--verify", action="store_true", help="read all weights: checksums, NaN, infinity")
    _add_json(parser)


def _reporting(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="folder of a model that was quantized here")
    parser.add_argument("--out", metavar="FILE", help="where to write it (default: report.html in that folder)")


def _chatting(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="name or folder of a model, quantized or not")
    parser.add_argument(
        "--max-new-tokens", type=_count, default=512, help="longest reply, in tokens (default: %(default)s)"
    )
    _add_loading(parser)
    _add_lean(parser)


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _add_lean(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lean", action="store_true", help="on a CPU: no dense copies of the weights; slow")


def _add_loading(parser: argparse.ArgumentParser) -> None:
    """What ``from_pretrained`` takes."""
    dtypes = ("auto", "float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, default="auto", help="of what is not quantized; auto: as saved")
    parser.add_argument("--device-map", default="auto", help="auto, cpu, cuda:1, ... (default: %(default)s)")


def _add_settings(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    """Fields of ``GuidedQuantConfig`` as options: its names, types, defaults and first sentences."""
    from .config import METHODS, PRESETS, GuidedQuantConfig

    known = {field.name: field for field in fields(GuidedQuantConfig)}
    documented = re.findall(r"^    (\w+): (.+(?:\n     +.+)*)", introspection.getdoc(GuidedQuantConfig) or "", re.M)
    sentences = {name: re.split(r"(?<=\.)(?<!e\.g\.)\s+", text)[0] for name, text in documented} | _TEXTS
    about = (
        "Several settings at once: fast (no guidance, few rows), paper (guided, as published) or best (also trained "
    )
    about += "afterwards). Settings given beside it count instead."
    parser.add_argument("--preset", choices=PRESETS, default=argparse.SUPPRESS, help=about)
    for name in names:
        field = known[name]
        kinds = typing.get_args(field.type) or (field.type,)
        about = " ".join(sentences.get(name, "").replace("``", "").replace("%", "%%").split())
        if field.default is not None:
            about += f" (default: {field.default})"
        parse: dict[str, Any] = {"type": _number if float in kinds else _integer if int in kinds else str}
        if name in _TRAINING:
            never = "not, whatever the preset says"
            parser.add_argument(f"--no-{name}", dest=name, default=argparse.SUPPRESS, action="store_false", help=never)
            about += " For other settings, JSON behind it."
            parse = {"nargs": "?", "const": True, "metavar": "JSON", "type": _json}
        elif bool in kinds:
            parse = {"action": argparse.BooleanOptionalAction}
        elif name == "method":
            parse = {"choices": METHODS}
        elif name == "dataset":
            parse = {"type": _dataset}
        # What is not given is left to the preset, or else to the config.
        parser.add_argument("--" + name.replace("_", "-"), default=argparse.SUPPRESS, help=about, **parse)


def _dataset(text: str) -> str | dict[str, Any]:
    return _json(text) if text.startswith("{") else text


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r:.200} is no JSON: {error}") from error


def _number(text: str) -> int | float:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    raise argparse.ArgumentTypeError(f"{text!r:.50} is no number")


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r:.50} is no integer") from error


def _count(text: str) -> int:
    if (count := _integer(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return count


# Command -> what it does, an example, and the function that adds its arguments.
_COMMANDS: dict[str, tuple[str, str, Callable[[argparse.ArgumentParser], None]]] = {
    "plan": (
        "Say what quantizing a model will do and take: layers, sizes, memory and time. Only its config is fetched.",
        "meta-llama/Llama-3.1-8B-Instruct --bits 2 --max-memory 24",
        _planning,
    ),
    "quantize": (
        "Quantize a model, and save it with its tokenizer, and a page about the run, in a new folder.",
        "HuggingFaceTB/SmolLM2-135M-Instruct SmolLM2-3bit --bits 3",
        _quantizing,
    ),
    "convert": (
        "Convert a published any-precision checkpoint, GuidedQuant's among them. Codes and codebooks stay as they are.",
        "OWNER/ANY-PRECISION-MODEL converted --bits 3",
        _converting,
    ),
    "evaluate": (
        "Measure models: perplexity on a text, distance to the original, speed of decoding, accuracy on tasks.",
        "SmolLM2-2bit SmolLM2-3bit --text held_out.txt --original SmolLM2-135M --speed",
        _evaluating,
    ),
    "inspect": (
        "Say what a saved model is, and check names, shapes and dtypes in its files. No weight is loaded.",
        "SmolLM2-3bit --verify",
        _inspecting,
    ),
    "report": (
        "Write what a run did as a page for a browser: sizes, errors of all layers, training, times.",
        "SmolLM2-3bit",
        _reporting,
    ),
    "chat": ("Talk to a model. /exit, or the end of the input, ends it.", "SmolLM2-3bit", _chatting),
}
