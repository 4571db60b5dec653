"""A distillation that is killed goes on behind the last epoch that was finished, and ends with the same bytes."""

import dataclasses
import math
import os
import shutil

import pytest
import torch
from conftest import tiny_model, token_rows
from test_run_folder import FEW, Crash, at_the, crash, in_a_killed_process, kill_at_the, layer_files, saved

import hf_guidedquant
from hf_guidedquant import GuidedQuantConfig, solving
from hf_guidedquant.distillation_folder import DistillationFolder
from hf_guidedquant.layer_folder import LayerFolder
from hf_guidedquant.training import DistilledEpochs, Divergence
from hf_guidedquant.training.steps import Steps

EPOCHS = 3
# They come twice, so that some that are held back are known.
ROWS = token_rows(4) * 2
# Writes of a run before the first epoch: its record, and a file per layer. Then one per epoch.
BEFORE = 4
# Steps of an epoch: a row of eight is held back, and two go together.
STEPS = 4
MOMENTS = ["before", "in the middle", "after"]


def quantize(run_dir, **changes):
    settings = {"bits": 2, "dataset": ROWS, "distill": {"batch_tokens": 64, "epochs": EPOCHS}, **FEW}
    return hf_guidedquant.quantize(tiny_model(), GuidedQuantConfig(run_dir=run_dir, **{**settings, **changes}))


def kept_file(run_dir):
    return LayerFolder(run_dir, "run.json", "run_dir").file("distilled codebooks")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a whole run, and the files of its model."""
    folder = tmp_path_factory.mktemp("finished")
    return folder / "run", saved(quantize(folder / "run"), folder / "model")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The files of a run without a folder, its report among them."""
    model = quantize(None)
    assert model.quantization_report.distillation.best_epoch > 0
    return saved(model, tmp_path_factory.mktemp("undisturbed") / "model")


@pytest.fixture
def run_dir(finished, tmp_path):
    """A copy of the folder of a whole run."""
    return shutil.copytree(finished[0], tmp_path / "run")


@pytest.fixture
def steps(monkeypatch):
    """Shares of the largest step that this process takes."""
    taken, step = [], Steps.step
    monkeypatch.setattr(Steps, "step", lambda self, rate, *items: taken.append(rate) or step(self, rate, *items))
    return taken


def test_a_folder_changes_nothing(finished, undisturbed):
    run_dir, files = finished
    assert files == undisturbed
    assert len(layer_files(run_dir)) == BEFORE


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("epoch", range(1, EPOCHS + 1))
def test_an_exception_at_any_commit_costs_no_epoch_that_was_kept(
    epoch, moment, undisturbed, tmp_path, steps, monkeypatch
):
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(os, "replace", at_the(BEFORE + epoch, moment, crash))
        quantize(tmp_path / "run")
    assert len(steps) == STEPS * epoch
    steps.clear()
    assert saved(quantize(tmp_path / "run"), tmp_path / "model") == undisturbed
    assert len(steps) == STEPS * (EPOCHS - epoch + (moment != "after"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_costs_no_epoch_that_was_kept(moment, undisturbed, tmp_path, steps):
    def run():
        os.replace = kill_at_the(BEFORE + 2, moment)
        quantize(tmp_path / "run")

    in_a_killed_process(run)
    assert saved(quantize(tmp_path / "run"), tmp_path / "model") == undisturbed
    assert len(steps) == STEPS * (EPOCHS - 2 + (moment != "after"))


def test_the_best_epoch_may_be_behind(tmp_path, monkeypatch):
    def run(said, **settings):
        figures = iter(said)
        monkeypatch.setattr(Divergence, "mean", lambda self, which: next(figures))
        return quantize(distill={"batch_tokens": 64, "epochs": 4}, **settings)

    expected = saved(run([5.0, 4.0, 3.0, 3.5, 4.5], run_dir=None), tmp_path / "model")
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(os, "replace", at_the(BEFORE + 3, "after", crash))
        run([5.0, 4.0, 3.0, 3.5], run_dir=tmp_path / "run")
    model = run([4.5], run_dir=tmp_path / "run")
    report = model.quantization_report.distillation
    assert (report.best_epoch, report.held_back) == (2, (5.0, 4.0, 3.0, 3.5, 4.5))
    assert saved(model, tmp_path / "model") == expected


def test_a_finished_run_trains_nothing(run_dir, undisturbed, tmp_path, steps, log, monkeypatch):
    monkeypatch.setattr(solving, "_solve_batch", lambda *args: pytest.fail("a layer was solved"))
    assert saved(quantize(run_dir), tmp_path / "model") == undisturbed
    assert not steps
    assert "3 of 3 epochs are distilled in " in log.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distill": {"batch_tokens": 64, "epochs": 4}}, "epochs was 3, is 4"),
        ({"reconstruct": {"batch_tokens": 64, "latent_learning_rate": 0.01}}, "layers was"),
    ],
)
def test_another_training_begins_anew(changes, message, run_dir, tmp_path, steps, log):
    expected = saved(quantize(None, **changes), tmp_path / "model")
    taken = len(steps)
    assert saved(quantize(run_dir, **changes), tmp_path / "model") == expected
    assert len(steps) == 2 * taken
    assert "The distillation in " in log.text
    assert message in log.text


def damaged(file):
    file.write_bytes(file.read_bytes()[:-5])


def of_other_codebooks(file):
    """As a folder that somebody else filled might have it, checksums and all."""
    folder = LayerFolder(file.parents[1], "run.json", "run_dir")
    folder.record()
    tensors, facts = folder.load("distilled codebooks")
    folder.save(
        "distilled codebooks",
        {name: tensor[..., :1] if tensor.dim() else tensor for name, tensor in tensors.items()},
        facts,
    )


@pytest.mark.parametrize("harm", [damaged, of_other_codebooks])
def test_what_cannot_be_used_is_done_again(harm, run_dir, undisturbed, tmp_path, steps, log):
    harm(kept_file(run_dir))
    assert saved(quantize(run_dir), tmp_path / "model") == undisturbed
    assert len(steps) == STEPS * EPOCHS
    assert "is done again" in log.text or "begins anew" in log.text


def epochs(**changes):
    one = {name: torch.rand(5, 4) for name in ("codebook", "best", "exp_avg", "exp_avg_sq")}
    layers = {"model.layers.0.mlp.up_proj": {**one, "step": torch.tensor(8.0)}}
    return dataclasses.replace(DistilledEpochs((0.4, 0.3), (0.5, math.nan, 0.45), 2, layers), **changes)


@pytest.fixture
def folder(tmp_path):
    folder = LayerFolder(tmp_path, "run.json", "run_dir")
    (tmp_path / "layers").mkdir()
    folder.write_record({"identity": {}})
    return folder


def test_epochs_come_back_as_they_were(folder):
    place, kept = DistillationFolder(folder, {"distill": {"epochs": 4}}), epochs()
    assert place.finished() is None
    place.commit(kept)
    found = place.finished()
    assert repr((found.trained, found.held_back, found.best_epoch)) == "((0.4, 0.3), (0.5, nan, 0.45), 2)"
    assert found.fits({"model.layers.0.mlp.up_proj": torch.zeros(5, 4)}, 4)
    (mine,), (theirs,) = found.layers.values(), kept.layers.values()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.items())


@pytest.mark.parametrize(
    "changes",
    [
        {"trained": ()},
        {"trained": (0.4,) * 5, "held_back": (0.5,) * 6},
        {"held_back": (0.5,)},
        {"best_epoch": 3},
        {"best_epoch": -1},
        {"layers": {}},
    ],
)
def test_epochs_that_do_not_fit(changes):
    codebooks = {"model.layers.0.mlp.up_proj": torch.zeros(5, 4)}
    assert epochs().fits(codebooks, 4)
    assert not epochs(**changes).fits(codebooks, 4)


@pytest.mark.parametrize(
    "facts",
    [
        None,
        [],
        {},
        {"trained": [0.4], "held_back": [0.5, 0.4], "best_epoch": 1},
        {"trained": [0.4], "held_back": [0.5, "low"], "best_epoch": 1, "distillation": {}},
        {"trained": 0.4, "held_back": [0.5, 0.4], "best_epoch": 1, "distillation": {}},
        {"trained": [0.4], "held_back": [0.5, 0.4], "best_epoch": True, "distillation": {}},
    ],
)
def test_facts_that_no_distillation_leaves(facts, folder, log):
    folder.save("distilled codebooks", {"a.codebook": torch.ones(2, 4)}, facts)
    assert DistillationFolder(folder, {}).finished() is None
    assert "holds no distillation" in log.text


@pytest.mark.parametrize("tensor", [torch.ones(2, 4).half(), torch.full((2, 4), math.inf)])
def test_tensors_that_no_distillation_leaves(tensor, folder, log):
    facts = {"trained": [0.4], "held_back": [0.5, 0.4], "best_epoch": 1, "distillation": {}}
    folder.save("distilled codebooks", {"a.codebook": tensor}, facts)
    assert DistillationFolder(folder, {}).finished() is None
    assert "holds no distillation" in log.text
