"""A run that is killed goes on, and ends with the same bytes; whatever would not, is refused by name."""

import errno
import importlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import memory_for, tiny_model, token_rows
from tokenizer import texts, word_tokenizer
from transformers import AutoModelForCausalLM

import hf_guidedquant
from hf_guidedquant import GuidedQuantConfig, layer_folder, run_folder, solving
from hf_guidedquant.calibration import Relay
from hf_guidedquant.errors import FolderMismatchError, FolderUnusableError
from hf_guidedquant.fingerprint import environment
from hf_guidedquant.layer_folder import LayerFolder
from hf_guidedquant.plan import plan_layers

# Three layers in two batches: gate_proj with up_proj, and down_proj.
FEW = {"modules_to_not_convert": ["self_attn", "layers.1"]}
# What a run writes: its record, and a file per layer.
WRITES = 4


def config(**changes):
    return GuidedQuantConfig(**{"bits": 2, "dataset": token_rows(), "num_groups": 3, "lnq_iterations": 1, **changes})


def quantize(run_dir, architecture="llama", model_seed=0, **changes):
    return hf_guidedquant.quantize(tiny_model(architecture, model_seed), config(run_dir=run_dir, **changes))


def saved(model, folder):
    """All files that a model is saved as, by name; of the report all but the times."""
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    report = json.loads(files["guidedquant_report.json"])
    del report["seconds"]
    return {**files, "guidedquant_report.json": report}


def layer_files(run_dir):
    return sorted((run_dir / "layers").glob("*.safetensors"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The files of a run of :data:`FEW` layers without a folder."""
    return saved(quantize(None, **FEW), tmp_path_factory.mktemp("undisturbed") / "model")


@pytest.fixture
def warnings_log(caplog):
    logging.getLogger("hf_guidedquant").propagate = True
    caplog.set_level(logging.WARNING, logger="hf_guidedquant")
    return caplog


class Crash(BaseException):
    """What no handler expects."""


def at_the(count, moment, act):
    """Make the ``count``-th write of this process call ``act`` before, in the middle of, or after its last step.

    Of writes by several threads, those that have begun are counted, or after the last step those that have ended.
    """
    calls = iter(range(1, 10**6))
    replace = os.replace

    def failing_replace(source, target):
        if moment == "after":
            replace(source, target)
        if next(calls) == count:
            if moment == "in the middle":
                Path(source).write_bytes(Path(source).read_bytes()[:100])
            act()
        if moment != "after":
            replace(source, target)

    return failing_replace


def crash():
    raise Crash


@pytest.mark.parametrize("moment", ["before", "in the middle", "after"])
@pytest.mark.parametrize("count", range(1, WRITES + 1))
def test_an_exception_at_any_write_costs_nothing_that_was_kept(count, moment, undisturbed, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(os, "replace", at_the(count, moment, crash))
        quantize(tmp_path / "run", **FEW)
    assert len(layer_files(tmp_path / "run")) == max(0, count - 1 - (moment != "after"))
    assert saved(quantize(tmp_path / "run", **FEW), tmp_path / "model") == undisturbed


def in_a_killed_process(function):
    """Run ``function``, which is to kill its process, in a fork."""
    child = os.fork()
    if child == 0:
        try:
            function()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def kill_at_the(count, moment):
    return at_the(count, moment, lambda: os.kill(os.getpid(), signal.SIGKILL))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("moment", ["before", "in the middle", "after"])
@pytest.mark.parametrize("count", range(1, WRITES + 1))
def test_a_kill_at_any_write_costs_nothing_that_was_kept(count, moment, undisturbed, tmp_path):
    def run():
        os.replace = kill_at_the(count, moment)
        quantize(tmp_path / "run", **FEW)

    in_a_killed_process(run)
    assert len(layer_files(tmp_path / "run")) == max(0, count - 1 - (moment != "after"))
    (tmp_path / "run" / "layers" / ".tmpAb3xY9").write_text("what safetensors leaves behind")
    assert saved(quantize(tmp_path / "run", **FEW), tmp_path / "model") == undisturbed
    assert not list((tmp_path / "run").rglob("*tmp*"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_again_and_again(undisturbed, tmp_path):
    """Every process gets one write done; calibration is kept too."""
    folders = {"run_dir": tmp_path / "run", "statistics": tmp_path / "statistics"}

    def run():
        os.replace = kill_at_the(1, "after")
        quantize(**folders, **FEW)

    for _ in range(2 * WRITES):
        in_a_killed_process(run)
    assert len(layer_files(tmp_path / "run")) == len(layer_files(tmp_path / "statistics")) == 3
    assert saved(quantize(**folders, **FEW), tmp_path / "model") == undisturbed


SCRIPT = """
import sys
sys.path[:0] = sys.argv[1:2]
from test_run_folder import quantize
quantize(sys.argv[2], lnq_iterations=50, bits=3)
"""


def test_a_process_is_killed_while_a_second_one_tries(tmp_path):
    """A real process: the folder is its own as long as it lives, and free the moment it is dead."""
    run_dir = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(Path(__file__).parent), str(run_dir)])
    try:
        deadline = time.monotonic() + 120
        while not layer_files(run_dir) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        started = time.monotonic()
        with pytest.raises(FolderUnusableError, match="another process is writing to it"):
            quantize(run_dir, lnq_iterations=50, bits=3)
        assert time.monotonic() - started < 5
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert 0 < len(layer_files(run_dir)) < 14
    resumed = saved(quantize(run_dir, lnq_iterations=50, bits=3), tmp_path / "model")
    assert resumed == saved(quantize(None, lnq_iterations=50, bits=3), tmp_path / "model")


def test_gaps_are_filled_in_the_batches_of_the_first_run(tmp_path, monkeypatch):
    """Any subset of layers may be there. A batch is solved with all its members, and only if one is missing."""
    expected = saved(quantize(tmp_path / "run"), tmp_path / "model")
    files = layer_files(tmp_path / "run")
    before = {path.name: path.read_bytes() for path in files}
    solve, solved = solving._solve_batch, []
    monkeypatch.setattr(
        solving, "_solve_batch", lambda model, batch, *rest: solved.append(batch) or solve(model, batch, *rest)
    )
    for kept in ([0], [1, 5, 6], [0, 1, 2, 3, 4], list(range(1, 14)), list(range(14))):
        for index in set(range(14)) - set(kept):
            files[index].unlink()
        solved.clear()
        batches = json.loads((tmp_path / "run" / "run.json").read_text())["batches"]
        missing = {name for batch in batches for name in batch} - {_layer_of(files[index]) for index in kept}
        assert saved(quantize(tmp_path / "run"), tmp_path / "model") == expected
        found = [[layer.name for layer in batch] for batch in solved]
        assert found == [batch for batch in batches if missing & set(batch)]
        for path in files:
            assert _contents(path.read_bytes()) == _contents(before[path.name])


def _layer_of(path):
    return path.name.rpartition("-")[0]


def _contents(data):
    """A safetensors file as its header's entries (their order is not fixed) and its data."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


@pytest.mark.parametrize("little_first", [True, False])
def test_memory_may_change_between_the_processes(little_first, tmp_path, monkeypatch):
    """With little memory a segment per decoder block, of four batches each; else one with four batches."""
    expected = saved(quantize(None), tmp_path / "model")
    little = memory_for(tiny_model(), config())
    first, second = (little, None) if little_first else (None, 2 * little)
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(os, "replace", at_the(4, "after", crash))
        quantize(tmp_path / "run", max_memory=first)
    solve, solved = solving._solve_batch, []
    monkeypatch.setattr(
        solving, "_solve_batch", lambda model, batch, *rest: solved.append(batch) or solve(model, batch, *rest)
    )
    assert saved(quantize(tmp_path / "run", max_memory=second), tmp_path / "model") == expected
    assert [len(batch) for batch in solved] == ([2, 2, 2, 1, 2, 2, 1] if little_first else [4, 4, 4, 2])


def test_kinds_of_layers_take_turns(monkeypatch):
    """A quarter of the batches holds a quarter of every kind, whatever kinds come first in the model."""
    monkeypatch.setattr(importlib.import_module("hf_guidedquant.plan"), "_BATCH_BYTES_CPU", 1)
    model = tiny_model(blocks=4)
    found = solving.batches(model, plan_layers(model, config()).layers)
    shapes = [(layer.out_features, layer.in_features) for (layer,) in found]
    assert len(shapes) == 28
    quarters = [sorted(shapes[start : start + 7]) for start in range(0, 28, 7)]
    assert quarters[0] == quarters[1] == quarters[2] == quarters[3]


def test_a_finished_run_needs_neither_a_pass_nor_a_solver(undisturbed, tmp_path, monkeypatch):
    quantize(tmp_path / "run", **FEW)
    monkeypatch.setattr(Relay, "collect", lambda *args: pytest.fail("a pass"))
    monkeypatch.setattr(solving, "_solve_batch", lambda *args: pytest.fail("a layer was solved"))
    assert saved(quantize(tmp_path / "run", **FEW), tmp_path / "model") == undisturbed


@pytest.mark.parametrize("architecture", ["gpt2", "llama-tied"])
def test_other_architectures_and_from_pretrained(architecture, tmp_path, monkeypatch):
    tiny_model(architecture).save_pretrained(tmp_path / "dense")

    def run(run_dir):
        settings = config(run_dir=run_dir)
        return AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=settings)

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(os, "replace", at_the(5, "after", crash))
        run(tmp_path / "run")
    assert saved(run(tmp_path / "run"), tmp_path / "model") == saved(run(None), tmp_path / "model")
    # A model in memory is the same model.
    assert saved(quantize(tmp_path / "run", architecture), tmp_path / "model") == saved(run(None), tmp_path / "model")


def test_rtn_needs_no_data_and_is_kept_too(tmp_path):
    expected = saved(quantize(None, method="rtn"), tmp_path / "model")
    for _ in range(2):
        assert saved(quantize(tmp_path / "run", method="rtn"), tmp_path / "model") == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed was 0, is 1"),
        ({"bits": 3}, "bits was 2, is 3"),
        ({"method": "squeezellm"}, "method was lnq, is squeezellm"),
        ({"guided": False}, "guided was True, is False"),
        ({"num_groups": 4}, "num_groups was 3, is 4"),
        ({"lnq_iterations": 2}, "lnq_iterations was 1, is 2"),
        ({"lnq_cycles": 2}, "lnq_cycles was 4, is 2"),
        ({"output_curvature": True}, "output_curvature was False, is True"),
        ({"kmeans_iterations": 2}, "kmeans_iterations was 50, is 2"),
        ({"modules_to_not_convert": ["self_attn"]}, r"modules_to_not_convert was \['self_attn', 'layers.1'\], is \["),
        ({"overrides": {"up_proj": {"bits": 4}}}, r"0\.mlp\.up_proj was 2 bits by lnq, is 4 bits by lnq"),
        ({"dataset": token_rows(seed=1)}, "calibration data was [0-9a-f]{12}…, is [0-9a-f]{12}…"),
        ({"num_samples": 7}, "num_samples was 128, is 7; calibration data was"),
        ({"dataset": texts(), "tokenizer": word_tokenizer(), "seq_len": 16}, "tokenizer was absent, is [0-9a-f]{12}…"),
    ],
)
def test_a_changed_setting_is_refused_by_name(changes, message, started):
    with pytest.raises(FolderMismatchError, match=message) as caught:
        quantize(started, **{**FEW, **changes})
    assert "set run_dir to another folder, or delete this one" in str(caught.value)
    assert str(started) in str(caught.value)


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """The folder of a run of :data:`FEW` layers."""
    folder = tmp_path_factory.mktemp("started")
    quantize(folder, **FEW)
    return folder


def test_another_model_is_refused_by_name(started):
    with pytest.raises(FolderMismatchError, match="model weights was") as caught:
        quantize(started, model_seed=1, **FEW)
    assert len(caught.value.changes) == 1
    model = tiny_model()
    model.model.norm.weight.data[3] += 1e-3  # one value of 49 344
    with pytest.raises(FolderMismatchError, match="model weights was") as caught:
        hf_guidedquant.quantize(model, config(run_dir=started, **FEW))
    assert len(caught.value.changes) == 1
    model = tiny_model()
    model.config.rms_norm_eps = 1e-5
    with pytest.raises(FolderMismatchError, match="model config was"):
        hf_guidedquant.quantize(model, config(run_dir=started, **FEW))
    with pytest.raises(FolderMismatchError, match="model weights was"):
        hf_guidedquant.quantize(tiny_model().bfloat16(), config(run_dir=started, **FEW))
    model = tiny_model()
    model.set_attn_implementation("eager")
    with pytest.raises(FolderMismatchError, match="attention was sdpa, is eager"):
        hf_guidedquant.quantize(model, config(run_dir=started, **FEW))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("versions", {"torch": "1.0"}, r"torch was \d.*, is 1\.0"),
        ("devices", ["Abacus"], r"devices was \['cpu'\], is \['Abacus'\]"),
    ],
)
def test_another_environment_is_refused_by_name(name, value, message, started, monkeypatch):
    monkeypatch.setattr(run_folder, "environment", lambda model, *rest: {**environment(model), name: value})
    with pytest.raises(FolderMismatchError, match=message):
        quantize(started, **FEW)


def test_another_folder_format_is_refused_by_name(started, monkeypatch):
    monkeypatch.setattr(run_folder, "_FOLDER_FORMAT", 2)
    with pytest.raises(FolderMismatchError, match="run folder format was 1, is 2"):
        quantize(started, **FEW)


def test_a_changed_tokenizer_is_refused_by_name(tmp_path):
    quantize(tmp_path / "run", dataset=texts(), tokenizer=word_tokenizer(), seq_len=16, **FEW)
    other = word_tokenizer()
    other.add_tokens(["alpha"])
    with pytest.raises(FolderMismatchError, match="tokenizer was"):
        quantize(tmp_path / "run", dataset=texts(), tokenizer=other, seq_len=16, **FEW)


def test_what_does_not_matter_may_change(started, undisturbed, tmp_path):
    changes = {"max_memory": 1.0, "cache_dequantized": True, "fuse_layers": False}
    assert saved(quantize(started, **changes, **FEW), tmp_path / "model") == undisturbed


def test_layers_of_another_run_are_not_taken_for_this_one(started, undisturbed, tmp_path, warnings_log):
    quantize(tmp_path / "run", seed=1, **FEW)
    for path in layer_files(started):
        shutil.copy(path, tmp_path / "run" / "layers")
    expected = saved(quantize(None, seed=1, **FEW), tmp_path / "model")
    assert saved(quantize(tmp_path / "run", seed=1, **FEW), tmp_path / "model") == expected != undisturbed
    assert warnings_log.text.count("it was written under other conditions") == 3


def test_damaged_files_are_done_again_with_a_warning(started, undisturbed, tmp_path, warnings_log):
    shutil.copytree(started, tmp_path / "run")
    truncated, flipped, empty = layer_files(tmp_path / "run")
    truncated.write_bytes(truncated.read_bytes()[:-7])
    damaged = bytearray(flipped.read_bytes())
    damaged[-100] ^= 4
    flipped.write_bytes(damaged)
    empty.write_bytes(b"")
    assert saved(quantize(tmp_path / "run", **FEW), tmp_path / "model") == undisturbed
    for path in (truncated, flipped, empty):
        assert f"{path} cannot be used" in warnings_log.text
    warnings_log.clear()
    quantize(tmp_path / "run", **FEW)
    assert not warnings_log.text


def test_every_flipped_bit_of_a_layers_file_is_noticed(tmp_path):
    folder = LayerFolder(tmp_path, "run.json", "run_dir")
    tensors = {"weight": torch.arange(6, dtype=torch.int32).view(2, 3), "lut": torch.rand(2, 4).half()}
    with folder.locked():
        folder.write_record({"identity": {}})
        folder.save("a.layer", tensors, {"objective": 0.1})
    path = folder.file("a.layer")
    intact, (loaded, facts) = path.read_bytes(), folder.load("a.layer")
    assert facts == {"objective": 0.1}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    end_of_header = 8 + int.from_bytes(intact[:8], "little")
    used = len(intact[:end_of_header].rstrip())
    for position in range(len(intact)):
        damaged = bytearray(intact)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        found = folder.load("a.layer")
        # Spaces that pad the header mean nothing; another kind of white space may take their place.
        assert found is None or used <= position < end_of_header, position
    for length in range(0, len(intact), 17):
        path.write_bytes(intact[:length])
        assert folder.load("a.layer") is None


@pytest.mark.parametrize("damage", [lambda text: "", lambda text: text[:-9], lambda text: text.replace("2", "3", 1)])
def test_a_damaged_record_is_written_anew_and_the_layers_stay(
    damage, started, undisturbed, tmp_path, warnings_log, monkeypatch
):
    shutil.copytree(started, tmp_path / "run")
    record = tmp_path / "run" / "run.json"
    intact = record.read_text()
    record.write_text(damage(intact))
    monkeypatch.setattr(solving, "_solve_batch", lambda *args: pytest.fail("a layer was solved"))
    assert saved(quantize(tmp_path / "run", **FEW), tmp_path / "model") == undisturbed
    assert "run.json is damaged" in warnings_log.text
    assert record.read_text() == intact


def test_names_of_layers_make_safe_names_of_files(tmp_path):
    folder = LayerFolder(tmp_path, "run.json", "run_dir")
    names = ["a.b", "a/b", "a_b", "..", "../../x", "A.b", "é" * 300, "x" * 5000, "con"]
    paths = [folder.file(name) for name in names]
    assert len({str(path).lower() for path in paths}) == len(names)
    for path in paths:
        assert path.parent == tmp_path / "layers" == path.resolve().parent
        assert path.name.isascii() and len(path.name) < 200


def test_what_is_loaded_does_not_hang_on_the_file(tmp_path):
    folder = LayerFolder(tmp_path, "run.json", "run_dir")
    with folder.locked():
        folder.write_record({"identity": {}})
        folder.save("layer", {"weight": torch.ones(4096)}, {})
    tensors, _ = folder.load("layer")
    with open(folder.file("layer"), "r+b") as file:
        file.write(bytes(file.seek(0, os.SEEK_END)))
        file.seek(0)
        file.write(bytes(os.path.getsize(file.name)))
    assert tensors["weight"].sum() == 4096


def test_a_file_is_flushed_before_it_takes_its_name_and_the_name_afterwards(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        function = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, call=function: calls.append(name) or call(*args))
    folder = LayerFolder(tmp_path, "run.json", "run_dir")
    with folder.locked():
        folder.write_record({"identity": {}})
        folder.save("layer", {"weight": torch.ones(4)}, {})
    assert calls == ["fsync", "replace", "fsync"] * 2


@pytest.mark.parametrize("problem", [errno.ENOSPC, errno.EIO])
def test_a_failing_write_is_a_clear_error_and_the_run_goes_on_later(problem, undisturbed, tmp_path, monkeypatch):
    save_file, calls = layer_folder.save_file, iter(range(1, 100))

    def failing(tensors, path, metadata):
        if next(calls) < 3:
            return save_file(tensors, path, metadata)
        Path(path).write_bytes(b"half of it")
        raise OSError(problem, os.strerror(problem))

    with monkeypatch.context() as patch, pytest.raises(FolderUnusableError, match=os.strerror(problem)) as caught:
        patch.setattr(layer_folder, "save_file", failing)
        quantize(tmp_path / "run", **FEW)
    assert "All that was kept before is still there" in str(caught.value)
    assert len(layer_files(tmp_path / "run")) == 2
    assert not list((tmp_path / "run").rglob("*tmp*"))
    assert saved(quantize(tmp_path / "run", **FEW), tmp_path / "model") == undisturbed


def mount(*options):
    if shutil.which("mount") is None or subprocess.run(["mount", *map(str, options)], capture_output=True).returncode:
        pytest.skip("needs the right to mount")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own with room for a few layers."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount("-t", "tmpfs", "-o", "size=32k", "tmpfs", disk)
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk(small_disk, tmp_path):
    with pytest.raises(FolderUnusableError, match="No space left on device"):
        quantize(small_disk / "run")
    kept = {path: path.read_bytes() for path in layer_files(small_disk / "run")}
    assert 0 < len(kept) < 14
    with pytest.raises(FolderUnusableError, match="No space left on device"):
        quantize(small_disk / "run")
    assert {path: path.read_bytes() for path in layer_files(small_disk / "run")} == kept
    mount("-o", "remount,size=1m", small_disk)
    assert saved(quantize(small_disk / "run"), tmp_path / "model") == saved(quantize(None), tmp_path / "model")


@pytest.mark.parametrize("begun", [False, True])
def test_a_read_only_disk(small_disk, begun):
    if begun:
        quantize(small_disk / "run", **FEW)
    mount("-o", "remount,ro", small_disk)
    with pytest.raises(FolderUnusableError, match=r"cannot be written to .*[Rr]ead-only"):
        quantize(small_disk / "run", **FEW)


def test_a_file_in_the_folders_place(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(FolderUnusableError, match="cannot be written to"):
        quantize(tmp_path / "run", **FEW)
    assert (tmp_path / "run").read_text() == "mine"


def test_other_files_in_the_folder_are_left_alone(tmp_path):
    mine = [tmp_path / "notes.tmp", tmp_path / "layers" / "notes.tmp", tmp_path / "sub" / ".tmpAb3xY9"]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    quantize(tmp_path, **FEW)
    assert all(path.read_text() == "mine" for path in mine)


def test_a_folder_in_use_is_noticed_before_the_model_is_read(tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path / "dense")
    monkeypatch.setattr(torch.nn.Module, "__init__", lambda *args, **kwargs: pytest.fail("the model was built"))
    settings = config(run_dir=tmp_path / "run")
    other = LayerFolder(tmp_path / "run", "run.json", "run_dir")
    with other.locked(), pytest.raises(FolderUnusableError, match="another process is writing to it"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=settings)


def test_the_model_keeps_neither_folder(tmp_path):
    settings = config(run_dir=tmp_path / "secret_run", statistics=tmp_path / "secret_statistics", **FEW)
    model = hf_guidedquant.quantize(tiny_model(), settings)
    assert model.config.quantization_config.run_dir is model.config.quantization_config.statistics is None
    assert settings.run_dir == tmp_path / "secret_run"
    for name, content in saved(model, tmp_path / "model").items():
        assert "secret" not in str(content), name
    assert "secret" not in (tmp_path / "secret_run" / "run.json").read_text()
    assert "secret" not in (tmp_path / "secret_statistics" / "statistics.json").read_text()
