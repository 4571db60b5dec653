"""A training that is killed goes on with the first block that is not there, and ends with the same bytes."""

import logging
import math
import os
import shutil

import pytest
import torch
from conftest import tiny_model, token_rows
from safetensors import safe_open
from test_run_folder import Crash, at_the, crash, in_a_killed_process, kill_at_the, layer_files, saved

import hf_guidedquant
from hf_guidedquant import GuidedQuantConfig, solving
from hf_guidedquant.layer_folder import LayerFolder
from hf_guidedquant.trained_blocks import TrainedBlocks
from hf_guidedquant.training import BlockReport, TrainedBlock, reconstruction

BLOCKS = [f"model.layers.{number}" for number in range(3)]
TRAINING = {"batch_tokens": 32, "epochs": 4, "latent_learning_rate": 0.01}
# Rows of two lengths; they come twice, so that some that are held back are known.
ROWS = (token_rows(4) + token_rows(4, length=20, seed=1)) * 2
# Writes of a run before the first block: its record, and a file per layer. Then one per block.
BEFORE = 7
COMMITS = range(BEFORE + 1, BEFORE + 1 + len(BLOCKS))
MOMENTS = ["before", "in the middle", "after"]


def quantize(run_dir, architecture="llama", **changes):
    """Three blocks with two quantized layers each."""
    settings = {
        "bits": 2,
        "dataset": ROWS,
        "lnq_iterations": 1,
        "modules_to_not_convert": ["self_attn", "down_proj"],
        "reconstruct": TRAINING,
    }
    return hf_guidedquant.quantize(
        tiny_model(architecture, blocks=3), GuidedQuantConfig(run_dir=run_dir, **{**settings, **changes})
    )


def block_file(run_dir, number, architecture="llama"):
    name = f"transformer.h.{number}" if architecture == "gpt2" else BLOCKS[number]
    return LayerFolder(run_dir, "run.json", "run_dir").file(name)


def kept_blocks(run_dir):
    return [number for number in range(len(BLOCKS)) if block_file(run_dir, number).exists()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a whole run, and the files of its model."""
    folder = tmp_path_factory.mktemp("finished")
    return folder / "run", saved(quantize(folder / "run"), folder / "model")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The files of a run without a folder, its report among them."""
    model = quantize(None)
    assert all(block.kept for block in model.quantization_report.reconstruction.blocks)
    return saved(model, tmp_path_factory.mktemp("undisturbed") / "model")


@pytest.fixture
def run_dir(finished, tmp_path):
    """A copy of the folder of a whole run."""
    return shutil.copytree(finished[0], tmp_path / "run")


@pytest.fixture
def trained(monkeypatch):
    """The numbers of the blocks that this process trains, as it goes."""
    numbers, train = [], reconstruction._Block.train
    monkeypatch.setattr(
        reconstruction._Block,
        "train",
        lambda self, name, *rest: numbers.append(int(name.rpartition(".")[2])) or train(self, name, *rest),
    )
    return numbers


@pytest.fixture
def nothing_to_solve(monkeypatch):
    monkeypatch.setattr(solving, "_solve_batch", lambda *args: pytest.fail("a layer was solved"))


def test_a_folder_changes_nothing(finished, undisturbed):
    run_dir, files = finished
    assert files == undisturbed
    assert kept_blocks(run_dir) == [0, 1, 2]
    assert len(layer_files(run_dir)) == BEFORE - 1 + len(BLOCKS)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("count", COMMITS)
def test_an_exception_at_any_commit_costs_no_block_that_was_kept(
    count, moment, undisturbed, tmp_path, trained, monkeypatch
):
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(os, "replace", at_the(count, moment, crash))
        quantize(tmp_path / "run")
    there = list(range(count - BEFORE - (moment != "after")))
    assert kept_blocks(tmp_path / "run") == there
    trained.clear()
    monkeypatch.setattr(solving, "_solve_batch", lambda *args: pytest.fail("a layer was solved"))
    assert saved(quantize(tmp_path / "run"), tmp_path / "model") == undisturbed
    assert there + trained == [0, 1, 2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("count", COMMITS)
def test_a_kill_at_any_commit_costs_no_block_that_was_kept(count, moment, undisturbed, tmp_path, trained):
    def run():
        os.replace = kill_at_the(count, moment)
        quantize(tmp_path / "run")

    in_a_killed_process(run)
    there = list(range(count - BEFORE - (moment != "after")))
    assert kept_blocks(tmp_path / "run") == there
    assert saved(quantize(tmp_path / "run"), tmp_path / "model") == undisturbed
    assert there + trained == [0, 1, 2]
    assert not list((tmp_path / "run").rglob("*tmp*"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_again_and_again(undisturbed, tmp_path, trained):
    """Every process gets one write done."""

    def run():
        os.replace = kill_at_the(1, "after")
        quantize(tmp_path / "run")

    for _ in range(BEFORE + len(BLOCKS)):
        in_a_killed_process(run)
    assert saved(quantize(tmp_path / "run"), tmp_path / "model") == undisturbed
    assert trained == []


def test_a_finished_run_needs_no_pass_at_all(run_dir, undisturbed, tmp_path, nothing_to_solve, monkeypatch):
    monkeypatch.setattr(reconstruction, "_through", lambda *args: pytest.fail("a pass"))
    assert saved(quantize(run_dir), tmp_path / "model") == undisturbed


def test_the_solved_layers_stay_as_they_are(run_dir, tmp_path, monkeypatch):
    expected = saved(quantize(None, reconstruct=False), tmp_path / "model")
    monkeypatch.setattr(solving, "_solve_batch", lambda *args: pytest.fail("a layer was solved"))
    assert saved(quantize(run_dir, reconstruct=False), tmp_path / "model") == expected


@pytest.mark.parametrize("gap", [0, 1, 2])
def test_training_goes_on_from_the_first_gap(gap, run_dir, undisturbed, tmp_path, trained, nothing_to_solve):
    before = {number: block_file(run_dir, number).stat().st_ino for number in range(gap)}
    block_file(run_dir, gap).unlink()
    assert saved(quantize(run_dir), tmp_path / "model") == undisturbed
    assert trained == list(range(gap, 3))
    assert kept_blocks(run_dir) == [0, 1, 2]
    assert {number: block_file(run_dir, number).stat().st_ino for number in before} == before


def test_what_is_behind_a_gap_does_not_count_once_it_is_filled(run_dir, undisturbed, tmp_path, trained, monkeypatch):
    """It was trained on what another block gave in its place."""
    block_file(run_dir, 0).unlink()
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(os, "replace", at_the(1, "after", crash))
        quantize(run_dir)
    assert kept_blocks(run_dir) == [0]
    assert saved(quantize(run_dir), tmp_path / "model") == undisturbed
    assert trained == [0, 1, 2]


@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: data[:-7], lambda data: data[:-9] + b"12345" + data[-4:]]
)
def test_a_damaged_block_counts_as_a_gap(damage, run_dir, undisturbed, tmp_path, trained, nothing_to_solve, log):
    file = block_file(run_dir, 1)
    file.write_bytes(damage(file.read_bytes()))
    assert saved(quantize(run_dir), tmp_path / "model") == undisturbed
    assert trained == [1, 2]
    assert f"{file} cannot be used" in log.text
    assert f"1 of 3 blocks are trained in {run_dir}." in log.text


def test_another_training_starts_anew_from_the_same_layers(
    run_dir, undisturbed, tmp_path, trained, nothing_to_solve, log
):
    other = {**TRAINING, "epochs": 2}
    log.clear()
    changed = saved(quantize(run_dir, reconstruct=other), tmp_path / "model")
    assert trained == [0, 1, 2]
    assert "model.layers.0 was trained otherwise (epochs was 4, is 2); training starts there." in log.text
    assert not [record for record in log.records if record.levelno > logging.INFO]
    assert saved(quantize(run_dir, reconstruct=other), tmp_path / "model") == changed
    assert trained == [0, 1, 2]
    assert saved(quantize(run_dir), tmp_path / "model") == undisturbed
    assert trained == 2 * [0, 1, 2]


def test_a_training_that_was_given_up_early_spoils_nothing_behind_it(
    run_dir, undisturbed, tmp_path, trained, monkeypatch
):
    """Settings are changed, one block is trained, and settings are changed back."""
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(os, "replace", at_the(1, "before", crash))
        quantize(run_dir, reconstruct={**TRAINING, "epochs": 2})
    assert kept_blocks(run_dir) == [0]
    trained.clear()
    assert saved(quantize(run_dir), tmp_path / "model") == undisturbed
    assert trained == [1, 2]


def test_other_data_train_other_blocks_of_layers_that_need_none(tmp_path, trained, log):
    quantize(tmp_path / "run", method="rtn")
    other = saved(quantize(tmp_path / "run", method="rtn", dataset=ROWS[::-1]), tmp_path / "model")
    assert "model.layers.0 was trained otherwise (calibration data was" in log.text
    assert trained == 2 * [0, 1, 2]
    assert other == saved(quantize(None, method="rtn", dataset=ROWS[::-1]), tmp_path / "model")


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [("gpt2", {}), ("llama-tied", {"embedding_bits": 4}), ("llama", {"outliers": 0.05}), ("llama", {"bits": 2.5})],
)
def test_other_models_and_settings(architecture, changes, tmp_path, trained):
    changes = {"modules_to_not_convert": [], **changes}
    expected = saved(quantize(tmp_path / "run", architecture, **changes), tmp_path / "model")
    block_file(tmp_path / "run", 1, architecture).unlink()
    trained.clear()
    assert saved(quantize(tmp_path / "run", architecture, **changes), tmp_path / "model") == expected
    assert trained == [1, 2]


def test_distillation_follows_as_ever(run_dir, tmp_path, trained, nothing_to_solve):
    block_file(run_dir, 1).unlink()
    distill = {"batch_tokens": 64}
    resumed = saved(quantize(run_dir, distill=distill), tmp_path / "model")
    assert trained == [1, 2]
    trained.clear()
    assert resumed == saved(quantize(run_dir, distill=distill), tmp_path / "model")
    assert trained == []


def test_a_block_that_training_did_not_help_is_kept_as_that(tmp_path, trained):
    changes = {
        "modules_to_not_convert": ["self_attn", "gate_proj", "up_proj"],
        "reconstruct": {**TRAINING, "batch_tokens": 64, "epochs": 8},
    }
    model = quantize(tmp_path / "run", **changes)
    helped = [block.kept for block in model.quantization_report.reconstruction.blocks]
    assert False in helped
    for number, kept in enumerate(helped):
        with safe_open(block_file(tmp_path / "run", number), "pt") as file:
            assert (len(file.keys()) > 0) == kept
    expected = saved(model, tmp_path / "model")
    block_file(tmp_path / "run", 2).unlink()
    trained.clear()
    assert saved(quantize(tmp_path / "run", **changes), tmp_path / "model") == expected
    assert trained == [2]


def test_the_bar_starts_at_what_is_done(run_dir, monkeypatch):
    bars, tqdm = [], reconstruction.tqdm
    monkeypatch.setattr(
        reconstruction, "tqdm", lambda **settings: bars.append((tqdm(**settings), settings)) or bars[-1][0]
    )
    block_file(run_dir, 1).unlink()
    quantize(run_dir)
    ((bar, settings),) = bars
    assert 3 * settings["initial"] == settings["total"] == bar.n


SOLVED = {"a.x": {"weight": torch.zeros(2, 3, 1, dtype=torch.int32), "lut": torch.zeros(3, 4).half()}}
BETTER = {"a.x": {"weight": torch.ones(2, 3, 1, dtype=torch.int32), "lut": torch.ones(3, 4).half()}}
FACTS = {"solved": 0.5, "trained": 0.25, "moved": 0.125, "training": {"seed": 1}}


@pytest.fixture
def folder(tmp_path):
    folder = LayerFolder(tmp_path, "run.json", "run_dir")
    with folder.locked():
        folder.write_record({"identity": {}})
        yield folder


@pytest.mark.parametrize(
    ("figures", "layers"),
    [((0.5, 0.25, 0.125), BETTER), ((0.25, 0.5, 1.0), {}), ((0.25, math.nan, 0.5), {}), ((0.25, math.inf, 0.5), {})],
)
def test_a_block_comes_back_as_it_was(figures, layers, folder):
    blocks = TrainedBlocks(folder, {"seed": 1}, {"a": SOLVED})
    blocks.commit(TrainedBlock(BlockReport("a", *figures), layers))
    (block,) = blocks.finished()
    assert repr(block.report) == repr(BlockReport("a", *figures))
    assert block.layers.keys() == layers.keys()
    assert all(
        torch.equal(block.layers[name][key], tensors[key]) for name, tensors in layers.items() for key in tensors
    )


@pytest.mark.parametrize(
    "facts",
    [
        None,
        [],
        {},
        {key: value for key, value in FACTS.items() if key != "training"},
        {**FACTS, "more": 0},
        {**FACTS, "solved": "0.5"},
        {**FACTS, "solved": True},
        {**FACTS, "trained": -math.inf},
        {**FACTS, "trained": None},
        {**FACTS, "moved": 1.5},
        {**FACTS, "moved": math.nan},
        {**FACTS, "trained": 0.75},
    ],
)
def test_facts_that_no_training_leaves_count_as_a_gap(facts, folder, log):
    folder.save("a", {"a.x.weight": BETTER["a.x"]["weight"], "a.x.lut": BETTER["a.x"]["lut"]}, facts)
    assert TrainedBlocks(folder, {"seed": 1}, {"a": SOLVED}).finished() == []
    assert "does not hold this block" in log.text


@pytest.mark.parametrize(
    "changes",
    [
        {"lut": torch.ones(3, 8).half()},
        {"lut": torch.ones(3, 4)},
        {"lut": torch.full((3, 4), math.inf).half()},
        {"weight": torch.ones(3, 3, 1, dtype=torch.int32)},
        {"weight": torch.ones(2, 3, 1)},
        {"more": torch.ones(1)},
    ],
)
def test_tensors_that_no_training_leaves_count_as_a_gap(changes, folder, log):
    tensors = {f"a.x.{key}": tensor for key, tensor in {**BETTER["a.x"], **changes}.items()}
    folder.save("a", tensors, FACTS)
    assert TrainedBlocks(folder, {"seed": 1}, {"a": SOLVED}).finished() == []
    assert "does not hold this block" in log.text


def test_a_block_of_another_training_is_told_by_what_differs(folder, log):
    blocks = TrainedBlocks(folder, {"seed": 2}, {"a": SOLVED})
    for kept, difference in (({"seed": 1}, "seed was 1, is 2"), (None, "the record was absent, is")):
        folder.save("a", {f"a.x.{key}": tensor for key, tensor in BETTER["a.x"].items()}, {**FACTS, "training": kept})
        assert blocks.finished() == []
        assert f"a was trained otherwise ({difference}" in log.text
