"""The command line: what its commands print, and its exit codes."""

import importlib
import inspect as inspect_module
import io
import json
import logging
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import tiny_model, token_rows
from hub_server import HubServer
from safetensors.torch import load_file, save_file
from tokenizer import texts, word_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin, PreTrainedModel

import hf_guidedquant
from hf_guidedquant import GuidedQuantConfig, cli, commands
from hf_guidedquant.checkpoint import check_output_folder
from hf_guidedquant.checksums import write_checksums
from hf_guidedquant.cli import main
from hf_guidedquant.commands import config_of
from hf_guidedquant.evaluate import TASKS, compare, perplexity
from hf_guidedquant.inspection import inspect
from hf_guidedquant.nn import quantized_modules
from hf_guidedquant.page import report_page

SOURCE = Path(hf_guidedquant.__file__).parent.parent
COMMANDS = ["plan", "quantize", "convert", "evaluate", "inspect", "report", "chat"]
QUICK = ["--method", "squeezellm", "--num-samples", "4", "--seq-len", "32"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n".join(texts()), encoding="utf-8")
    return str(file)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "model"
    tiny_model().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def quantized(dense, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized") / "model"
    assert main(["quantize", dense, str(folder), "--bits", "3", "--dataset", text, *QUICK]) == 0
    return str(folder)


def printed(capsys, *arguments):
    """What a command that must succeed prints."""
    capsys.readouterr()
    assert main(arguments) == 0
    return capsys.readouterr().out


def refused(capsys, *arguments):
    """The message of a command that must fail with an error."""
    capsys.readouterr()
    assert main(arguments) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    return shown.err


def run(*arguments, program=("-m", "hf_guidedquant"), **options):
    command = [sys.executable, *program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, **options)


def help_of(capsys, command):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_help_names_every_command():
    done = run("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert [
        line.split()[0] for line in done.stdout.splitlines() if line.startswith("    ") and line[4] != " "
    ] == COMMANDS


def test_version():
    assert run("--version").stdout == hf_guidedquant.__version__ + "\n"


@pytest.mark.parametrize("command", [None, "convert", "evaluate", "inspect", "report", "chat"])
def test_help_does_not_wait_for_torch(command):
    arguments = ["--help"] if command is None else [command, "--help"]
    done = run(*arguments, program=("-X", "importtime", "-m", "hf_guidedquant"))
    assert done.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported and "hf_guidedquant.cli" in imported
    assert not {"torch", "transformers", "accelerate"} & imported


def test_only_our_own_command_line_puts_registration_off():
    code = (
        "import sys; sys.argv = ['-m', 'x']; import hf_guidedquant; sys.exit(not hasattr(hf_guidedquant, 'quantize'))"
    )
    assert run(program=("-c", code)).returncode == 0


def test_defaults_in_the_help_are_the_librarys():
    options = cli._parser("").parse_args(["evaluate", "MODEL", "--tasks"])
    assert options.context == inspect_module.signature(perplexity).parameters["context"].default
    assert options.tasks == list(TASKS)
    assert cli._COMMANDS.keys() == commands.COMMANDS.keys()


@pytest.mark.parametrize("command", COMMANDS)
def test_the_example_of_the_help_is_valid(command, capsys):
    example = help_of(capsys, command).partition("example:\n")[2].split()
    assert example[:4] == ["python", "-m", "hf_guidedquant", command]
    assert cli._parser("").parse_args(example[3:]).command == command


@pytest.mark.parametrize("command", ["plan", "quantize"])
def test_settings_are_those_of_the_config(command):
    arguments = {"plan": ["plan", "MODEL"], "quantize": ["quantize", "MODEL", "OUT"]}[command]
    options = cli._parser("").parse_args(arguments)
    names = getattr(cli, f"_{command.upper()}_FIELDS")
    assert {"bits", "method", "guided", "num_groups", "num_samples", "seq_len", "max_memory", "device"} <= set(names)
    assert config_of(options) == GuidedQuantConfig()
    options = cli._parser("").parse_args([*arguments, "--preset", "paper"])
    assert config_of(options) == GuidedQuantConfig(preset="paper") != GuidedQuantConfig()
    options = cli._parser("").parse_args([*arguments, "--preset", "paper", "--num-groups", "1"])
    assert config_of(options) == GuidedQuantConfig(preset="paper", num_groups=1)


def test_settings_reach_the_config():
    given = "--bits 2.5 --no-guided --num-groups 3 --max-memory 1.5 --device cpu --distill --reconstruct "
    given += "--run-dir R --statistics S"
    options = cli._parser("").parse_args(["quantize", "MODEL", "OUT", *given.split()])
    names = ("bits", "guided", "num_groups", "max_memory", "device", "distill", "reconstruct", "run_dir", "statistics")
    assert [getattr(options, name) for name in names] == [2.5, False, 3, 1.5, "cpu", True, True, "R", "S"]
    assert isinstance(cli._parser("").parse_args(["plan", "MODEL", "--bits", "3"]).bits, int)


@pytest.mark.parametrize("command", [["plan", "MODEL"], ["quantize", "MODEL", "OUT"]])
def test_settings_of_a_training_are_json(command):
    given = ["--preset", "best", "--reconstruct", '{"codes": false}', "--no-distill"]
    config = config_of(cli._parser("").parse_args([*command, *given]))
    assert config == GuidedQuantConfig(preset="best", reconstruct={"codes": False}, distill=False)
    with pytest.raises(SystemExit):
        cli._parser("").parse_args([*command, "--distill", "{"])
    # A name behind the option is none of its settings.
    options = cli._parser("").parse_args([command[0], "--distill", "--reconstruct", *command[1:]])
    assert (options.model, options.reconstruct, options.distill) == ("MODEL", True, True)


def test_a_dataset_of_the_hub_is_json():
    given = ["--dataset", '{"name": "me/chats", "split": "test"}', "--assistant-only-loss"]
    options = cli._parser("").parse_args(["quantize", "MODEL", "OUT", *given])
    config = config_of(options)
    assert config.dataset == {"name": "me/chats", "split": "test"}
    assert config.assistant_only_loss is True
    with pytest.raises(SystemExit):
        cli._parser("").parse_args(["quantize", "MODEL", "OUT", "--dataset", '{"name": '])


@pytest.mark.parametrize("command", ["plan", "quantize"])
def test_every_setting_is_explained(command, capsys):
    page = help_of(capsys, command)
    assert "Bits per weight, 1-8; " in page and "(default: 4)" in page
    for line, after in zip(page.splitlines(), page.splitlines()[1:], strict=False):
        if line.startswith("  --"):
            assert len(line.split("  ")) > 2 or after.startswith(" " * 20), line


def test_plan(capsys, dense):
    arguments = ["plan", dense, "--bits", "2", "--num-groups", "3", "--seq-len", "32", "--no-probe"]
    forecast = hf_guidedquant.plan(dense, GuidedQuantConfig(bits=2, num_groups=3, seq_len=32), probe=False)
    assert printed(capsys, *arguments) == forecast.table() + "\n"
    told = json.loads(printed(capsys, *arguments, "--json"))
    assert told["quantized_bytes"] == forecast.quantized_bytes
    assert told["bits_per_weight"] == forecast.bits_per_weight
    assert [layer["name"] for layer in told["layers"]] == [layer.name for layer in forecast.layers]
    assert told["seconds"] == {}


def test_plan_probes_unless_told_not_to(capsys, dense):
    told = json.loads(printed(capsys, "plan", dense, "--method", "rtn", "--seq-len", "32", "--json"))
    assert told["seconds"]["solving"] > 0


def test_quantize_gives_what_the_library_gives(dense, text, quantized, tmp_path):
    config = GuidedQuantConfig(bits=3, method="squeezellm", dataset=text, num_samples=4, seq_len=32)
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    hf_guidedquant.save(model, tmp_path / "model", AutoTokenizer.from_pretrained(dense))
    saved = {file.name for file in (tmp_path / "model").iterdir()}
    assert {file.name for file in Path(quantized).iterdir()} == saved | {"report.html"}
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert Path(quantized, name).read_bytes() == (tmp_path / "model" / name).read_bytes(), name


def test_quantize_prints_its_report(capsys, dense, tmp_path):
    out = tmp_path / "out"
    told = json.loads(printed(capsys, "quantize", dense, str(out), "--method", "rtn", "--dtype", "bfloat16", "--json"))
    assert told == json.loads((out / "guidedquant_report.json").read_text())
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16


def test_quantize_leaves_a_page_without_paths_or_texts(caplog, dense, text, tmp_path):
    out = tmp_path / "out"
    with caplog.at_level(logging.INFO, "hf_guidedquant"):
        assert main(["quantize", dense, str(out), "--dataset", text, *QUICK]) == 0
    assert f"What was done to every layer: {out / 'report.html'}" in caplog.text
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page == report_page(out)
    line = Path(text).read_text(encoding="utf-8").partition("\n")[0]
    assert len(line) > 8
    assert not [private for private in (dense, text, str(tmp_path), line) if private in page]
    # A page is no part of what checksums and pre-flight look at.
    (out / "report.html").write_text("")
    inspect(out, verify=True)


def test_a_filled_output_folder_is_refused_before_any_work(capsys, tmp_path):
    (tmp_path / "file").touch()
    message = refused(capsys, "quantize", "no model of this name", str(tmp_path))
    assert message.startswith("OutputFolderError: ") and str(tmp_path) in message


@pytest.mark.parametrize("out", ["{folder}/file/out", "/proc/out", "{folder}/" + "x" * 300])
@pytest.mark.parametrize("command", ["quantize", "convert"])
def test_an_output_folder_that_cannot_be_made_is_refused_before_any_work(capsys, tmp_path, command, out):
    (tmp_path / "file").touch()
    out = out.format(folder=tmp_path)
    assert refused(capsys, command, "no model of this name", out).startswith(f"OutputFolderError: {out} cannot be made")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("option", ["--run-dir", "--statistics"])
@pytest.mark.parametrize("inside", ["out", "out/run", "out/../out/run"])
def test_work_is_not_kept_in_the_output_folder(capsys, tmp_path, option, inside):
    kept = str(tmp_path / inside)
    message = refused(capsys, "quantize", "no model of this name", str(tmp_path / "out"), option, kept)
    assert message.startswith(f"OutputFolderError: {option} {kept} is in the output folder")
    assert not list(tmp_path.iterdir())


def test_checking_an_output_folder_leaves_nothing_behind(tmp_path):
    assert check_output_folder(tmp_path / "a" / "b" / "c") == tmp_path / "a" / "b" / "c"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "settings", "problem"),
    [
        ("me/pushed", {"offline": True, "token": "hf_x"}, "HF_HUB_OFFLINE"),
        ("me/pushed", {"offline": False, "token": None}, "without a token"),
        ("me/pushed/twice", {"offline": False, "token": "hf_x"}, "cannot be the name"),
    ],
)
def test_an_upload_that_cannot_succeed_is_refused_first(capsys, monkeypatch, tmp_path, name, settings, problem):
    monkeypatch.setattr(commands, "is_offline_mode", lambda: settings["offline"])
    monkeypatch.setattr(commands, "get_token", lambda: settings["token"])
    message = refused(capsys, "quantize", "no model of this name", str(tmp_path / "out"), "--push-to-hub", name)
    assert message.startswith("UploadError: ") and problem in message


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "MODEL", "--device", "cuda:99"],
        ["quantize", "MODEL", "OUT", "--device", "cuda:99", "--method", "rtn"],
        ["quantize", "MODEL", "OUT", "--device-map", "cuda:99"],
        ["quantize", "MODEL", "OUT", "--device-map", "nonsense"],
        ["evaluate", "MODEL", "--speed", "--device-map", "cuda:99"],
        ["chat", "MODEL", "--device-map", "cuda:99"],
    ],
)
def test_a_device_that_is_not_there_is_told(capsys, monkeypatch, dense, tmp_path, arguments):
    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", None)
    places = {"MODEL": dense, "OUT": str(tmp_path / "out")}
    message = refused(capsys, *(places.get(argument, argument) for argument in arguments))
    assert message.startswith("DeviceError: ") and "This machine has: cpu" in message


def test_a_quantized_model_is_refused_before_any_work(capsys, monkeypatch, quantized, tmp_path):
    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", None)
    out = tmp_path / "out"
    for arguments in (["quantize", quantized, str(out), "--bits", "4"], ["plan", quantized]):
        message = refused(capsys, *arguments)
        assert message.startswith("AlreadyQuantizedError: ") and "guidedquant" in message
    assert not out.exists()


def test_quantize_pushes_model_and_tokenizer(dense, tmp_path):
    with HubServer() as hub:
        arguments = ["quantize", dense, str(tmp_path / "out"), "--method", "rtn", "--push-to-hub", "me/pushed"]
        done = run(*arguments, env=hub.environment(tmp_path / "home"))
        assert done.returncode == 0, done.stderr
        files = hub.find("me/pushed").files()
    assert {"config.json", "model.safetensors", "README.md", "tokenizer.json"} <= files.keys()
    assert "report.html" not in files
    assert files["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("none.txt", None, "cannot be read: No such file"),
        ("binary.txt", b"\xd6\xff", "is no text in UTF-8"),
        ("texts.jsonl", b'{"text": "word1"}', "is JSON"),
        ("empty.txt", b"", "at least 2 tokens"),
    ],
)
def test_evaluate_says_what_is_wrong_with_a_text(capsys, quantized, tmp_path, name, content, problem):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    message = refused(capsys, "evaluate", quantized, "--text", str(tmp_path / name), "--context", "32")
    assert "EvaluationError: " in message and problem in message


@pytest.mark.parametrize("lean", [[], ["--lean"]])
def test_evaluate(capsys, quantized, text, lean):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(quantized), AutoTokenizer.from_pretrained(quantized)
    hf_guidedquant.cache_dequantized(model, not lean)
    expected = perplexity(model, tokenizer, Path(text).read_text(), 32)
    arguments = ["evaluate", quantized, "--text", text, "--context", "32", *lean]
    assert json.loads(printed(capsys, *arguments, "--json")) == {"perplexity": expected, "tokens": 240, "context": 32}
    assert f"{expected:.4f}" in printed(capsys, *arguments)


def test_evaluate_compares_models_with_their_original(capsys, dense, quantized, text, tmp_path):
    config = GuidedQuantConfig(bits=2, method="rtn")
    other = str(hf_guidedquant.save(hf_guidedquant.quantize(tiny_model(), config), tmp_path / "rtn", word_tokenizer()))
    arguments = ["evaluate", quantized, other, "--text", text, "--context", "32"]
    told = json.loads(printed(capsys, *arguments, "--original", dense, "--json"))
    first, *rest = told["models"]
    original, tokenizer = tiny_model(), word_tokenizer()
    sizes = {"name": dense, "bits_per_weight": 32, "nbytes": sum(p.nbytes for p in original.parameters())}
    measured = {"tokens": 240, "perplexity": perplexity(original, tokenizer, Path(text).read_text(), 32)}
    assert first == sizes | measured
    for name, found in zip((quantized, other), rest, strict=True):
        report = json.loads(Path(name, "guidedquant_report.json").read_text())
        assert (found["name"], found["tokens"]) == (name, 240)
        assert (found["bits_per_weight"], found["nbytes"]) == (report["bits_per_weight"], report["quantized_bytes"])
        model = AutoModelForCausalLM.from_pretrained(name)
        hf_guidedquant.cache_dequantized(model)
        expected = compare(model, original, tokenizer, Path(text).read_text(), 32)
        assert [found[key] for key in ("perplexity", "original_perplexity", "kl", "top1")] == [
            expected.perplexity,
            expected.original_perplexity,
            expected.kl,
            expected.top1,
        ]
    table = printed(capsys, *arguments, "--original", dense).splitlines()
    assert table[0].split() == ["model", "bits", "size", "perplexity", "KL", "top-1"]
    assert [line.split()[0] for line in table[1:-1]] == [dense, quantized, other]
    assert table[-1] == "text: 240 tokens, context 32"
    assert table[3].split()[-2:] == [f"{rest[1]['kl']:.5f}", f"{rest[1]['top1']:.2%}"]
    assert [len(told["models"]), "KL" in printed(capsys, *arguments)] == [3, False]


def test_an_original_with_another_vocabulary_is_refused_before_models_are_loaded(
    capsys, monkeypatch, dense, quantized, text, tmp_path
):
    tiny_model().save_pretrained(tmp_path)
    tokenizer = json.loads(Path(dense, "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["word1"], words["word2"] = words["word2"], words["word1"]
    for file in Path(dense).glob("tokenizer*"):
        (tmp_path / file.name).write_text(file.read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", None)
    message = refused(capsys, "evaluate", quantized, "--text", text, "--original", str(tmp_path))
    assert message.startswith("EvaluationError: ") and "other tokens" in message


def test_evaluate_draws_a_picture(capsys, dense, quantized, text, tmp_path):
    pytest.importorskip("matplotlib")
    arguments = ["evaluate", quantized, "--text", text, "--context", "32", "--picture", str(tmp_path / "picture.png")]
    printed(capsys, *arguments, "--original", dense)
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"
    arguments[-1] = str(tmp_path / "picture.mistyped")
    arguments[1] = "no model of this name"
    assert refused(capsys, *arguments).startswith("EvaluationError: ")


def test_evaluate_measures_speed(capsys, quantized):
    arguments = ["evaluate", quantized, "--speed", "--new-tokens", "3"]
    (told,) = json.loads(printed(capsys, *arguments, "--json"))["models"]
    assert "perplexity" not in told
    speed = told["speed"]
    assert speed["tokens_per_second"] > 0
    assert (speed["new_tokens"], speed["prompt_tokens"], speed["batch"], speed["dtype"]) == (3, 32, 1, "float32")
    header, row, how = printed(capsys, *arguments).splitlines()
    assert header.split() == ["model", "bits", "size", "tokens/s"] and float(row.split()[-1]) > 0
    assert how.startswith("tokens/s: 3 tokens after a prompt of 32, batch 1, greedy, float32 on ")


def test_evaluate_runs_tasks(capsys, monkeypatch, quantized):
    seen = []
    monkeypatch.setattr(commands, "check_tasks", lambda tasks: None)
    monkeypatch.setattr(commands, "run_tasks", lambda model, tokenizer, tasks: seen.append(tasks) or RESULTS)
    told = json.loads(printed(capsys, "evaluate", quantized, "--tasks", "--json"))
    assert told["models"][0]["tasks"] == RESULTS
    header, row = printed(capsys, "evaluate", quantized, "--tasks", "piqa,other").splitlines()
    assert header.split()[-2:] == ["piqa", "other"] and row.split()[-2:] == ["62.50%", "25.00%"]
    assert seen == [list(TASKS), ["piqa", "other"]]


RESULTS = {"piqa": {"acc_norm": 0.5, "acc": 0.625}, "other": {"exact_match": 0.25}}


def test_missing_packages_are_told_before_a_model_is_loaded(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert refused(capsys, "evaluate", "no model of this name", "--tasks").startswith("PackageMissingError: ")


def test_inspect_tells_what_was_saved_without_weights(capsys, quantized, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(quantized)

    def reached(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", reached)
    # Opened for their headers, files have no tensors to give.
    monkeypatch.setattr("hf_guidedquant.checkpoint.safe_open", lambda *args, **kwargs: nullcontext())
    told = json.loads(printed(capsys, "inspect", quantized, "--json"))
    layers = quantized_modules(model)
    assert [layer["name"] for layer in told["layers"]] == list(layers)
    for layer in told["layers"]:
        module = layers[layer["name"]]
        assert (layer["out_features"], layer["in_features"]) == (module.out_features, module.in_features)
        assert (layer["bits"], layer["method"], layer["lut_dtype"]) == (3, "squeezellm", "float16")
        assert layer["nbytes"] == module.weight.nbytes + module.lut.nbytes
    assert told["nbytes"] == sum(tensor.nbytes for tensor in load_file(Path(quantized, "model.safetensors")).values())
    assert told["settings"]["provenance"] == model.config.quantization_config.provenance
    assert told["settings"]["format_version"] == "1.0"
    assert told["verified"] is False
    report = json.loads(Path(quantized, "guidedquant_report.json").read_text())
    assert told["bits_per_weight"] == report["bits_per_weight"]
    table = printed(capsys, "inspect", quantized)
    assert "guidedquant format 1.0" in table and "q_proj" in table and f"{told['bits_per_weight']:.3f}" in table


def test_inspect_knows_settings_of_single_layers_and_shards(capsys, tmp_path):
    overrides = {"*.down_proj": {"bits": 2}, "*.up_proj": {"method": "squeezellm"}}
    config = GuidedQuantConfig(method="rtn", overrides=overrides, dataset=token_rows())
    hf_guidedquant.save(hf_guidedquant.quantize(tiny_model(), config), tmp_path / "out", max_shard_size="20KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    told = json.loads(printed(capsys, "inspect", str(tmp_path / "out"), "--verify", "--json"))
    kinds = {layer["name"].rpartition(".")[2]: (layer["bits"], layer["method"]) for layer in told["layers"]}
    assert [kinds[name] for name in ("down_proj", "up_proj", "q_proj")] == [(2, "rtn"), (4, "squeezellm"), (4, "rtn")]
    assert told["files"] == told["compared"] > 1 and told["verified"] is True


def test_verify_says_what_was_compared(capsys, copy):
    word_tokenizer().save_pretrained(copy)
    (copy / "tokenizer.json").write_text("altered")
    told = printed(capsys, "inspect", str(copy), "--verify")
    assert "finite; 1 file of weights as in SHA256SUMS\n" in told
    assert "not verified: all other files, such as the tokenizer's\n" in told
    (copy / "SHA256SUMS").unlink()
    assert "finite; no SHA256SUMS: the files were compared with nothing\n" in printed(
        capsys, "inspect", str(copy), "--verify"
    )
    assert "verified" not in printed(capsys, "inspect", str(copy))


def test_inspect_of_a_name_says_how_to_get_a_folder(capsys):
    message = refused(capsys, "inspect", "owner/name")
    assert message.startswith("CheckpointError: There is no folder owner/name.")
    assert "hf download owner/name --local-dir FOLDER" in message


def test_inspect_reads_every_architecture(any_model, tmp_path):
    hf_guidedquant.quantize(any_model, GuidedQuantConfig(bits=3, method="rtn")).save_pretrained(tmp_path)
    inspection = inspect(tmp_path, verify=True)
    assert inspection.model == type(any_model).__name__
    assert inspection.bits_per_weight == any_model.quantization_report.bits_per_weight


def damage(folder, name, change):
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    write_checksums(folder)


LUT = "model.layers.0.mlp.up_proj.lut"


@pytest.fixture
def copy(quantized, tmp_path):
    hf_guidedquant.save(AutoModelForCausalLM.from_pretrained(quantized), tmp_path / "copy")
    return tmp_path / "copy"


def test_verify_finds_codebooks_that_are_not_finite(capsys, copy):
    printed(capsys, "inspect", str(copy), "--verify")
    damage(copy, LUT, lambda lut: lut.index_fill(0, torch.tensor([1]), float("nan")))
    printed(capsys, "inspect", str(copy))
    message = refused(capsys, "inspect", str(copy), "--verify")
    assert message.startswith("NonFiniteTensorError: ") and LUT in message


@pytest.mark.parametrize("change", [lambda lut: lut[:, :4].contiguous(), lambda lut: lut.float()])
def test_inspect_finds_wrong_shapes_and_dtypes(capsys, copy, change):
    damage(copy, LUT, change)
    assert LUT in refused(capsys, "inspect", str(copy))


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def index_of(text):
    def change(folder):
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(text)

    return change


def config_with(**changes):
    def change(folder):
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**settings, **changes}))

    return change


@pytest.mark.parametrize(
    ("change", "error", "problem"),
    [
        (cut, "DamagedFileError", "truncated"),
        (index_of("[]"), "CheckpointError", "no readable index"),
        (index_of('{"weight_map": {}}'), "CheckpointError", "names no files"),
        (index_of('{"weight_map": {"x": "../x.safetensors"}}'), "UnsafeFileError", "outside the model's folder"),
        (config_with(architectures=["pipeline"]), "UnknownArchitectureError", "no model class 'pipeline'"),
        (config_with(architectures=5), "CheckpointError", "describes no model"),
        (config_with(num_attention_heads=0), "CheckpointError", "describes no model"),
        (config_with(num_hidden_layers="two"), "CheckpointError", "describes no model"),
        (config_with(num_hidden_layers=3), "TensorMismatchError", "missing: model.layers.2"),
        (lambda folder: (folder / "model.safetensors").unlink(), "CheckpointError", "neither model.safetensors nor"),
        (lambda folder: (folder / "config.json").unlink(), "CheckpointError", "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{}"), "CheckpointError", "describes no model"),
    ],
)
def test_inspect_says_what_is_wrong_with_a_folder(capsys, copy, change, error, problem):
    change(copy)
    message = refused(capsys, "inspect", str(copy))
    assert message.startswith(f"{error}: ") and problem in message


def test_inspect_trusts_no_text_of_the_config(capsys, copy):
    settings = json.loads((copy / "config.json").read_text())["quantization_config"]
    config_with(quantization_config={**settings, "provenance": {"base_model": "\x1b[2Jgone"}})(copy)
    assert "base_model: [2Jgone\n" in printed(capsys, "inspect", str(copy))
    modules = {name: {**module, "method": ["lnq"]} for name, module in settings["modules"].items()}
    config_with(quantization_config={**settings, "modules": modules})(copy)
    assert refused(capsys, "inspect", str(copy)).startswith("ConfigError: ")


def test_inspect_refuses_what_is_not_ours(capsys, dense):
    assert "was not quantized with hf-guidedquant" in refused(capsys, "inspect", dense)


class Recorder:
    """Stands in for ``generate``: keeps the prompts, and answers each with the same words."""

    def __init__(self, tokenizer):
        self.tokenizer, self.prompts = tokenizer, []

    def __call__(self, model, input_ids, attention_mask, max_new_tokens, streamer):
        assert max_new_tokens == 7
        self.prompts.append(self.tokenizer.decode(input_ids[0]))
        answer = torch.tensor([self.tokenizer("word8 word9")["input_ids"]])
        streamer.put(input_ids)
        streamer.put(answer[0])
        streamer.end()
        return torch.cat([input_ids, answer], dim=1)


@pytest.mark.parametrize("template", [None, "{% for m in messages %}<s> {{ m['content'] }} {% endfor %}"])
@pytest.mark.parametrize("end", ["/exit\nword3\n", ""])
def test_chat(capsys, monkeypatch, quantized, template, end):
    tokenizer = AutoTokenizer.from_pretrained(quantized)
    tokenizer.chat_template = template
    recorder = Recorder(tokenizer)
    monkeypatch.setattr(commands, "_tokenizer", lambda model: tokenizer)
    monkeypatch.setattr(GenerationMixin, "generate", lambda model, **options: recorder(model, **options))
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"word1\n\n word2 \n{end}"))
    assert printed(capsys, "chat", quantized, "--max-new-tokens", "7").split() == ["word8", "word9"] * 2
    second = "<s> word1 <s> word8 word9 <s> word2" if template else "word2"
    assert recorder.prompts == ["<s> word1" if template else "word1", second]


def test_chat_generates(quantized):
    done = run("chat", quantized, "--max-new-tokens", "4", input="word1 word2\n/exit\n")
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    assert 1 <= len(words) <= 4 and all(word.startswith("word") for word in words)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["no-such-command"],
        ["plan"],
        ["plan", "MODEL", "--bits", "two"],
        ["quantize", "MODEL"],
        ["evaluate", "MODEL"],
        ["evaluate", "--text", "FILE"],
        ["evaluate", "MODEL", "--speed", "--original", "MODEL"],
        ["evaluate", "MODEL", "--speed", "--picture", "FILE"],
    ],
)
def test_wrong_usage_is_2(capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["plan", "MODEL", "--bits", "zwei"], "--bits: 'zwei' is no number"),
        (["plan", "MODEL", "--num-groups", "1.5"], "--num-groups: '1.5' is no integer"),
        (["quantize", "MODEL", "OUT", "--dataset", "{name: x}"], "--dataset: '{name: x}' is no JSON: Expecting"),
        (["chat", "MODEL", "--max-new-tokens", "0"], "--max-new-tokens: 0 is less than 1"),
        (["evaluate", "MODEL", "--speed", "--new-tokens", "x"], "--new-tokens: 'x' is no integer"),
    ],
)
def test_a_wrong_value_is_told_in_plain_words(capsys, arguments, problem):
    with pytest.raises(SystemExit):
        main(arguments)
    assert f"argument {problem}" in capsys.readouterr().err


def test_report_of_a_folder_without_one_says_so(capsys, tmp_path):
    message = refused(capsys, "report", str(tmp_path))
    assert message.startswith(f"CheckpointError: There is no readable report in {tmp_path}: no guidedquant_report.json")


def test_errors_are_told_in_a_line_without_a_traceback(tmp_path):
    done = run("plan", str(tmp_path), "--bits", "9")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"ConfigError: {config_error()}\n"


def config_error():
    with pytest.raises(hf_guidedquant.errors.ConfigError) as caught:
        GuidedQuantConfig(bits=9)
    return caught.value


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "{folder}"],
        ["quantize", "{folder}", "{folder}/out"],
        ["evaluate", "{folder}", "--speed"],
        ["chat", "{folder}"],
    ],
)
@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("", "no folder of a model: there is no config.json in it"),
        ("/mistyped", "There is no folder {}, and a model of the Hub cannot have that name."),
    ],
)
def test_a_folder_without_a_model_is_an_error_too(capsys, tmp_path, arguments, name, problem):
    folder = f"{tmp_path}{name}"
    message = refused(capsys, *(argument.format(folder=folder) for argument in arguments))
    assert message.startswith("ModelError: ") and problem.format(folder) in message


def test_a_name_that_the_hub_does_not_give_is_told_as_one(capsys):
    message = refused(capsys, "chat", "owner/no-such-model")
    assert message.startswith("ModelError: owner/no-such-model is no folder, and could not be had from the Hub: ")


def test_a_model_without_a_tokenizer_says_that_it_lacks_one(capsys, dense, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    assert refused(capsys, "chat", str(tmp_path)).startswith("TokenizerMissingError: ")


def test_ctrl_c_is_130(monkeypatch, dense):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "plan", interrupted)
    assert main(["plan", dense]) == 130


OPTIMUM = "from optimum.commands.optimum_cli import main; main()"


def run_optimum(*arguments, code=OPTIMUM):
    pytest.importorskip("optimum.commands.base")
    folders = importlib.import_module("optimum.commands.register").__path__
    if sum(Path(folder, "register_guidedquant.py").exists() for folder in folders) > 1:
        pytest.skip("optimum-cli finds the command twice: another copy of the package is installed")
    return run(*arguments, program=("-c", code), env={**os.environ, "PYTHONPATH": str(SOURCE)})


def test_optimum_lists_the_commands_without_loading_anything():
    done = run_optimum("guidedquant", "--help")
    assert done.returncode == 0, done.stderr
    assert "usage: optimum-cli guidedquant" in done.stdout
    assert all(command in done.stdout for command in COMMANDS)
    code = "import sys, optimum.commands.register.register_guidedquant; sys.exit('torch' in sys.modules)"
    assert run_optimum(code=code).returncode == 0


def test_optimum_without_a_command_explains_them():
    done = run_optimum("guidedquant")
    assert done.returncode == 0 and "usage: optimum-cli guidedquant" in done.stdout
    assert "Talk to a model" in done.stdout


def test_optimum_runs_the_commands(capsys, quantized, tmp_path):
    assert run_optimum("guidedquant", "inspect", quantized).stdout == printed(capsys, "inspect", quantized)
    assert "usage: optimum-cli guidedquant inspect" in run_optimum("guidedquant", "inspect", "--help").stdout
    failed = run_optimum("guidedquant", "inspect", str(tmp_path))
    assert failed.returncode == 1 and failed.stderr.startswith("CheckpointError: ")
