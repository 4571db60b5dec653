"""Statistics that are kept: other bits and methods come out as if they had gone over the data themselves."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import memory_for, tiny_model, token_rows
from test_run_folder import FEW, Crash, at_the, config, crash, in_a_killed_process, layer_files, saved

import hf_guidedquant
from hf_guidedquant import pipeline
from hf_guidedquant.calibration import Relay
from hf_guidedquant.errors import CalibrationError, FolderMismatchError, FolderUnusableError
from hf_guidedquant.fingerprint import environment
from hf_guidedquant.layer_folder import LayerFolder


def quantize(statistics, model_seed=0, **changes):
    return hf_guidedquant.quantize(tiny_model(seed=model_seed), config(statistics=statistics, **changes))


@pytest.fixture
def collected(monkeypatch):
    """The names of the layers of every segment that rows are taken through."""
    collect, seen = Relay.collect, []
    monkeypatch.setattr(
        Relay, "collect", lambda relay, number, layers: seen.append([*layers]) or collect(relay, number, layers)
    )
    return seen


def little_memory():
    return memory_for(tiny_model(), config())


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Statistics of a run of LNQ, of all 14 layers."""
    folder = tmp_path_factory.mktemp("kept")
    quantize(folder)
    return folder


@pytest.mark.parametrize("guided", [True, False])
def test_other_bits_and_methods_need_no_pass_and_come_out_the_same(guided, tmp_path, collected):
    quantize(tmp_path / "statistics", guided=guided)
    for changes in (
        {"bits": 3},
        {"bits": 4, "seed": 5},
        {"method": "squeezellm"},
        {"method": "rtn"},
        {"overrides": {"up_proj": {"bits": 4, "method": "squeezellm"}}, "modules_to_not_convert": ["q_proj"]},
        {"max_memory": 2 * little_memory()},
    ):
        collected.clear()
        model = saved(quantize(tmp_path / "statistics", guided=guided, **changes), tmp_path / "model")
        assert not collected
        assert model == saved(quantize(None, guided=guided, **changes), tmp_path / "model"), changes


def test_filling_the_folder_changes_nothing(tmp_path):
    model = saved(quantize(tmp_path / "statistics"), tmp_path / "model")
    assert model == saved(quantize(None), tmp_path / "model")


def test_what_a_method_did_not_need_is_added_later(tmp_path, collected):
    """SqueezeLLM needs diagonals only. They still serve it when LNQ's Hessians have joined them."""
    expected = {method: saved(quantize(None, method=method), tmp_path / "model") for method in ("squeezellm", "lnq")}
    for method, number in (("squeezellm", 1), ("lnq", 1), ("squeezellm", 0), ("lnq", 0)):
        collected.clear()
        assert saved(quantize(tmp_path / "statistics", method=method), tmp_path / "model") == expected[method]
        assert len(collected) == number, method


def test_the_curvature_of_outputs_is_added_later(tmp_path, collected):
    expected = {wanted: saved(quantize(None, output_curvature=wanted), tmp_path / "model") for wanted in (False, True)}
    for wanted, number in ((False, 1), (True, 1), (False, 0), (True, 0)):
        collected.clear()
        model = quantize(tmp_path / "statistics", output_curvature=wanted)
        assert saved(model, tmp_path / "model") == expected[wanted]
        assert len(collected) == number, wanted
    assert expected[True]["model.safetensors"] != expected[False]["model.safetensors"]


def test_kept_curvatures_serve_other_bits(tmp_path, collected):
    quantize(tmp_path / "statistics", output_curvature=True)
    for changes in ({"bits": 3}, {"method": "squeezellm", "output_curvature": False}):
        collected.clear()
        changes = {"output_curvature": True, **changes}
        model = saved(quantize(tmp_path / "statistics", **changes), tmp_path / "model")
        assert not collected
        assert model == saved(quantize(None, **changes), tmp_path / "model"), changes


def test_only_layers_that_are_missing_are_watched(kept, tmp_path, collected):
    shutil.copytree(kept, tmp_path / "statistics")
    gone, damaged, *others = layer_files(tmp_path / "statistics")
    gone.unlink()
    damaged.write_bytes(damaged.read_bytes()[:-1])
    before = {path: path.read_bytes() for path in others}
    model = saved(quantize(tmp_path / "statistics"), tmp_path / "model")
    assert model == saved(quantize(None), tmp_path / "model")
    assert set(collected[0]) == {path.name.rpartition("-")[0] for path in (gone, damaged)}
    assert {path: path.read_bytes() for path in others} == before
    assert len(layer_files(tmp_path / "statistics")) == 14


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": token_rows(seed=1)}, "calibration data was [0-9a-f]{12}…, is [0-9a-f]{12}…"),
        ({"num_samples": 7}, "calibration data was"),
        ({"num_groups": 4}, "num_groups was 3, is 4"),
        ({"guided": False}, "guided was True, is False; num_groups was 3, is 1"),
        ({"model_seed": 1}, "model weights was [0-9a-f]{12}…, is [0-9a-f]{12}…"),
    ],
)
def test_other_statistics_are_refused_by_name(changes, message, kept):
    with pytest.raises(FolderMismatchError, match=message) as caught:
        quantize(kept, **changes)
    assert "set statistics to another folder, or delete this one" in str(caught.value)


def test_another_config_of_the_model_is_refused_by_name(kept):
    model = tiny_model()
    model.config.rope_parameters["rope_theta"] = 5e5
    with pytest.raises(FolderMismatchError, match="model config was"):
        hf_guidedquant.quantize(model, config(statistics=kept))


def test_rtn_touches_no_statistics(tmp_path):
    quantize(tmp_path / "statistics", method="rtn")
    assert not (tmp_path / "statistics").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(("count", "passes"), [(1, 2), (2, 2), (4, 2), (8, 1), (10, 1), (15, 0)])
def test_killed_while_calibrating(count, passes, tmp_path, collected):
    """A segment per block of seven layers; what is finished is there after a kill. Write 1 is the record."""

    def run():
        os.replace = at_the(count, "after", lambda: os.kill(os.getpid(), signal.SIGKILL))
        quantize(tmp_path / "statistics", max_memory=little_memory())

    in_a_killed_process(run)
    kept = len(layer_files(tmp_path / "statistics"))
    # Four are written at a time, so others may have been finished before the kill.
    assert count - 1 <= kept <= count + 2
    model = saved(quantize(tmp_path / "statistics", max_memory=little_memory()), tmp_path / "model")
    assert len(collected) == passes
    assert sum(map(len, collected)) == 14 - kept
    assert model == saved(quantize(None), tmp_path / "model")


def test_a_run_folder_and_statistics_work_together(tmp_path, collected, monkeypatch):
    """An interrupted run takes its second half from the statistics, and those of a finished run go unread."""
    folders = {"run_dir": tmp_path / "run", "statistics": tmp_path / "statistics"}
    # Two records, 14 layers' statistics, six layers.
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(os, "replace", at_the(22, "after", crash))
        quantize(**folders)
    assert len(layer_files(tmp_path / "run")) == 6
    collected.clear()
    model = saved(quantize(**folders), tmp_path / "model")
    assert not collected
    assert model == saved(quantize(None), tmp_path / "model")
    shutil.rmtree(tmp_path / "statistics")
    assert saved(quantize(**folders), tmp_path / "model") == model
    assert not (tmp_path / "statistics").exists()


def test_readers_share_a_folder_and_writers_do_not(kept, tmp_path):
    shutil.copytree(kept, tmp_path / "statistics")
    with LayerFolder(tmp_path / "statistics", "statistics.json", "statistics").locked():
        quantize(tmp_path / "statistics", bits=3, **FEW)
        layer_files(tmp_path / "statistics")[0].unlink()
        with pytest.raises(FolderUnusableError, match="another process is writing to it"):
            quantize(tmp_path / "statistics", bits=3)


def test_a_full_disk_keeps_what_was_there(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(FolderUnusableError, match="No space left"):
        patch.setattr(os, "fsync", from_the_fifth(OSError(28, "No space left on device")))
        quantize(tmp_path / "statistics")
    # Two for the record, two for layers.
    assert 1 <= len(layer_files(tmp_path / "statistics")) <= 2
    assert saved(quantize(tmp_path / "statistics"), tmp_path / "model") == saved(quantize(None), tmp_path / "model")


def from_the_fifth(error):
    calls, fsync = iter(range(1, 10**6)), os.fsync

    def failing(descriptor):
        if next(calls) >= 5:
            raise error
        fsync(descriptor)

    return failing


def test_bad_rows_are_reported_from_kept_statistics_too(tmp_path):
    def run(**changes):
        model = tiny_model()
        calls = iter(range(10**6))
        handle = model.model.layers[1].mlp.up_proj.register_forward_hook(
            # The first call is the one without data.
            lambda module, args, output: output * float("inf") if next(calls) == 1 else output
        )
        hf_guidedquant.quantize(model, config(statistics=tmp_path / "s", dataset=token_rows(20), **changes, **FEW))
        handle.remove()
        return [layer.bad_rows for layer in model.quantization_report.layers]

    assert run() == run(bits=3) == [1, 1, 1]


HUB = """
import sys
sys.path[:0] = sys.argv[1:2]
from pathlib import Path
import hf_guidedquant
from hf_guidedquant.calibration import Relay
from hf_guidedquant.errors import CalibrationError
from test_run_folder import config, saved
from conftest import tiny_model

with_pass = hf_guidedquant.quantize(tiny_model(), config(bits=3))
expected = saved(with_pass, Path(sys.argv[2]))
def no_pass(*args, **kwargs):
    raise AssertionError("a pass was made")
Relay.collect = no_pass
model = hf_guidedquant.quantize(tiny_model(), config(bits=3, statistics="hf://me/statistics"))
assert saved(model, Path(sys.argv[2])) == expected
for missing, message in (("hf://me/nothing", "cannot be fetched"), ("hf://me/empty", "no intact statistics.json")):
    try:
        hf_guidedquant.quantize(tiny_model(), config(bits=3, statistics=missing))
    except CalibrationError as error:
        assert message in str(error), error
    else:
        raise AssertionError(missing)
"""


def test_statistics_from_the_hub(kept, tmp_path):
    from hub_server import HubServer

    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "README.md").write_text("nothing")
    with HubServer() as hub:
        hub.add_folder("me/statistics", kept)
        hub.add_folder("me/empty", tmp_path / "empty")
        subprocess.run(
            [sys.executable, "-c", HUB, os.path.dirname(__file__), tmp_path / "model"],
            env=hub.environment(tmp_path / "home"),
            check=True,
            timeout=120,
        )


def test_a_hub_repository_without_network_is_a_clear_error():
    with pytest.raises(CalibrationError, match="statistics='hf://me/nothing' cannot be fetched"):
        quantize("hf://me/nothing")


def test_the_record_tells_what_the_folder_is(kept):
    record = json.loads((kept / "statistics.json").read_text())
    assert "GuidedQuantConfig(statistics=...)" in record["about"]
    assert record["data"]["rows"] == 8
    assert record["environment"]["versions"]["torch"] == torch.__version__


def test_statistics_from_another_environment_are_used_and_the_difference_is_told(kept, monkeypatch, caplog, collected):
    logging.getLogger("hf_guidedquant").propagate = True
    monkeypatch.setattr(pipeline, "environment", lambda model, *rest: {**environment(model), "attention": "eager"})
    with caplog.at_level(logging.INFO, logger="hf_guidedquant"):
        quantize(kept, bits=3)
    assert "attention was sdpa, is eager" in caplog.text
    assert not collected
