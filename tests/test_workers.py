"""Several processes, started as `torchrun` starts them, on a CPU with gloo."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import memory_for, tiny_model, token_rows
from transformers import AutoModelForCausalLM

import hf_guidedquant
from hf_guidedquant import GuidedQuantConfig
from hf_guidedquant.layer_folder import LayerFolder
from hf_guidedquant.triton_kernels import unpack_codes
from hf_guidedquant.workers import Workers

PRIMITIVES = """
import time
import torch
from hf_guidedquant.errors import WorkerError
from hf_guidedquant.workers import Workers

workers = Workers()
assert workers.size == 2
assert workers.share([10, 11, 12]) == ([10, 12], [11])[workers.rank]
tensor = torch.full((3,), float(workers.rank + 1))
workers.add_up(tensor)
assert tensor.tolist() == [3.0, 3.0, 3.0]
tensor += workers.rank
workers.hand_over(tensor, 1)
assert tensor.tolist() == [4.0, 4.0, 4.0]
columns = torch.tensor([-300, 7 * workers.rank], dtype=torch.int16)
workers.hand_over(columns, 1)
assert columns.tolist() == [-300, 7]
assert workers.tell({"rank": workers.rank}, 1) == {"rank": 1}
workers.check_agreement({"seed": 0, "data": "x"})
try:
    workers.check_agreement({"data": "x", "seed": workers.rank})
except WorkerError as error:
    assert "seed (process 0: 0, process 1: 1)" in str(error)
else:
    raise AssertionError
print(f"finished {workers.rank}", flush=True)
# A process that leaves at once can cut off one that is still receiving.
time.sleep(2)
"""

LOST = """
import os
import torch
from hf_guidedquant.workers import Workers

workers = Workers()
if workers.rank == 1:
    raise SystemExit("the disk is on fire")
workers.add_up(torch.zeros(3))
print("went on alone")
"""


def launch(script, tmp_path, *arguments):
    path = tmp_path / "script.py"
    path.write_text(script, encoding="utf-8")
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *start, str(path), *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120)


def test_alone_nothing_happens():
    workers = Workers()
    assert (workers.rank, workers.size, workers.first) == (0, 1, True)
    assert workers.share([1, 2, 3]) == [1, 2, 3]
    assert workers.tell("value", 0) == "value"
    workers.check_agreement({"seed": 0})


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_work_is_shared_out_evenly(size):
    workers = Workers()
    workers.size = size
    costs = [5.0, 1.0, 8.0, 3.0, 3.0, 2.0, 7.0, 1.0]
    owners = workers.owners(costs)
    load = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(size)]
    assert sum(load) == sum(costs)
    # Graham's bound for jobs given to whoever is idle.
    assert max(load) <= sum(costs) / size + (1 - 1 / size) * max(costs) + 1e-9


def test_a_process_that_saves_alone_waits_for_nobody(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert Workers(meet=False).size == 1


def test_two_processes(tmp_path):
    done = launch(PRIMITIVES, tmp_path)
    assert done.returncode == 0, done.stdout
    assert "finished 0" in done.stdout
    assert "finished 1" in done.stdout


def test_a_process_that_dies_stops_all(tmp_path):
    done = launch(LOST, tmp_path)
    assert done.returncode != 0
    assert "the disk is on fire" in done.stdout
    assert "went on alone" not in done.stdout


QUANTIZE = """
import json, sys
import torch
sys.path.insert(0, sys.argv[1])
from conftest import tiny_model, token_rows
import hf_guidedquant
from hf_guidedquant import GuidedQuantConfig
from hf_guidedquant.workers import Workers

folder, method, extra = sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
# What is held back from training is among what is trained on, unless there are rows enough.
rows = (token_rows(extra.pop("rows", 5)) * 2)[:10]
config = GuidedQuantConfig(bits=3, dataset=rows, num_groups=2, method=method, **extra)
model = hf_guidedquant.quantize(tiny_model(), config)
rank = Workers().rank
torch.save(model.state_dict(), f"{folder}/state{rank}.pt")
model.save_pretrained(f"{folder}/model")
hf_guidedquant.save(model, f"{folder}/staged")
print(f"rows {model.quantization_report.settings['provenance']['rows']}")
"""


def quantized_by(tmp_path, method="lnq", **extra):
    """The state dicts of two processes that quantize a model together, in a folder of their own."""
    folder = tmp_path / f"model{len(list(tmp_path.glob('model*')))}"
    folder.mkdir()
    done = launch(QUANTIZE, folder, str(Path(__file__).parent), str(folder), method, json.dumps(extra))
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("rows 10") == 2
    assert done.stdout.count("[guidedquant] Calibration data") == 1
    return folder, [torch.load(folder / f"state{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize(
    ("method", "segments", "curvature"),
    [("lnq", 1, False), ("lnq", 2, False), ("lnq", 1, True), ("squeezellm", 1, False)],
)
def test_two_processes_quantize_as_one(method, segments, curvature, tmp_path):
    extra = {"output_curvature": curvature}
    if segments == 2:
        config = GuidedQuantConfig(bits=3, num_groups=2, method=method, seq_len=33)
        config.max_memory = extra["max_memory"] = 1.01 * memory_for(tiny_model(), config)
        assert hf_guidedquant.plan(tiny_model(), config, probe=False).segments == 2
    settings = GuidedQuantConfig(bits=3, dataset=token_rows(10), num_groups=2, method=method, **extra)
    model = hf_guidedquant.quantize(tiny_model(), settings)
    alone = model.state_dict()
    folder, states = quantized_by(tmp_path, method, rows=10, **extra)
    weights = different = 0
    for name, tensor in alone.items():
        assert torch.equal(states[0][name], states[1][name]), name
        if tensor.dtype == torch.int32:
            ours = unpack_codes(states[0][name], alone[name].shape[2] * 32)
            different += int((ours != unpack_codes(tensor, tensor.shape[2] * 32)).sum())
            weights += ours.numel()
    # Hessians are added up in another order, which can decide between two codes that are equally good.
    assert different <= 1e-4 * weights
    told = json.loads((folder / "model" / "guidedquant_report.json").read_text(encoding="utf-8"))["layers"]
    for theirs, ours in zip(told, model.quantization_report.layers, strict=True):
        assert theirs["name"] == ours.plan.name
        for stage in ours.objectives.keys() - {"curvature"}:
            assert theirs["objectives"][stage] == pytest.approx(ours.objectives[stage], rel=1e-3), stage
        assert theirs["joint_left"] == (None if ours.joint_left is None else pytest.approx(ours.joint_left, rel=0.02))
    saved = {path.name for path in (folder / "model").iterdir()}
    assert saved == {path.name for path in (folder / "staged").iterdir()}
    assert {"model.safetensors", "config.json", "README.md", "guidedquant_report.json"} <= saved
    loaded = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in states[0].items())


def test_processes_share_a_run_folder_and_statistics(tmp_path):
    extra = {"run_dir": str(tmp_path / "run"), "statistics": str(tmp_path / "statistics"), "distill": True}
    _, first = quantized_by(tmp_path, **extra)
    _, again = quantized_by(tmp_path, **extra)
    assert all(torch.equal(again[rank][name], tensor) for rank in (0, 1) for name, tensor in first[rank].items())


def test_the_first_process_hands_over_the_statistics_that_were_kept(tmp_path):
    extra = {"statistics": str(tmp_path / "statistics"), "output_curvature": True}
    _, first = quantized_by(tmp_path, **extra)
    kept = {path: path.stat().st_ino for path in (tmp_path / "statistics" / "layers").iterdir()}
    assert len(kept) == len(tiny_model().model.layers) * 7
    _, again = quantized_by(tmp_path, **extra)
    assert all(torch.equal(again[rank][name], tensor) for rank in (0, 1) for name, tensor in first[rank].items())
    assert kept == {path: path.stat().st_ino for path in (tmp_path / "statistics" / "layers").iterdir()}


def test_processes_go_on_with_the_same_block(tmp_path):
    training = {"batch_tokens": 64, "epochs": 8, "latent_learning_rate": 0.01}
    extra = {"run_dir": str(tmp_path / "run"), "reconstruct": training}
    before, first = quantized_by(tmp_path, **extra)
    kept, lost = (LayerFolder(tmp_path / "run", "run.json", "run_dir").file(f"model.layers.{n}") for n in (0, 1))
    written = kept.stat().st_ino
    lost.unlink()
    folder, again = quantized_by(tmp_path, **extra)
    assert all(torch.equal(again[rank][name], tensor) for rank in (0, 1) for name, tensor in first[rank].items())
    assert lost.exists()
    assert kept.stat().st_ino == written
    reports = [
        json.loads((place / "model" / "guidedquant_report.json").read_text())["reconstruction"]
        for place in (before, folder)
    ]
    assert reports[0] == reports[1]
    assert all(block["trained"] < block["solved"] for block in reports[0]["blocks"])


def test_two_processes_end_with_the_same_trained_layers(tmp_path):
    training = {"batch_tokens": 64, "learning_rate": 0.01}
    folder, states = quantized_by(tmp_path, distill=training, reconstruct={**training, "latent_learning_rate": 0.01})
    report = json.loads((folder / "model" / "guidedquant_report.json").read_text())
    assert report["distillation"]["best_epoch"] > 0
    assert any(block["trained"] < block["solved"] for block in report["reconstruction"]["blocks"])
    assert all(torch.equal(states[1][name], tensor) for name, tensor in states[0].items())
    loaded = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in states[0].items())
