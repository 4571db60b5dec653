"""Run folders and statistics that somebody else has filled, checksums and all: the same model, or a refusal by name."""

import hashlib
import json
import os
import shutil
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from hypothesis import given
from hypothesis import strategies as st
from mutation import EXAMPLES, bounded_memory, damage, header_end, join, json_values, mutate, split
from safetensors import safe_open
from safetensors.torch import save_file
from test_run_folder import FEW, config, layer_files
from victim import ESCAPE, logits, nothing_but_named_errors

import hf_guidedquant
from hf_guidedquant.calibration.store import StatisticsStore
from hf_guidedquant.errors import FolderMismatchError, FolderUnusableError
from hf_guidedquant.fingerprint import json_sha256, tensors_sha256
from hf_guidedquant.layer_folder import LayerFolder
from hf_guidedquant.plan import plan_layers
from hf_guidedquant.report import Report
from hf_guidedquant.run_folder import RunFolder

RECORDS = {"run_dir": "run.json", "statistics": "statistics.json"}
KINDS = pytest.mark.parametrize("kind", RECORDS)


def quantize(**folders):
    return hf_guidedquant.quantize(tiny_model(), config(**folders, **FEW))


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    return logits(quantize())


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> dict[str, Path]:
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in RECORDS}
    quantize(**folders)
    return folders


def copy(filled: dict[str, Path], kind: str, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(filled[kind], target))


@pytest.fixture(scope="module")
def plan():
    return plan_layers(tiny_model(), config(**FEW))


def seal_record(file: Path, record: dict) -> None:
    """Write a record with the checksum that it should have."""
    record.pop("sha256", None)
    file.write_text(json.dumps({**record, "sha256": json_sha256(record)}))


def reseal_layer(file: Path, change) -> None:
    """Let ``change`` edit tensors and facts of a layer's file, and write it with the right checksum."""
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
        about = json.loads(opened.metadata()["about"])
    change(tensors, about)
    text = json.dumps(about)
    sha256 = hashlib.sha256(f"{tensors_sha256(tensors)} {text}".encode()).hexdigest()
    save_file(tensors, file, {"about": text, "sha256": sha256})


@EXAMPLES
@KINDS
@given(data=st.data())
def test_any_record_is_that_of_the_run_or_is_refused_by_name(kind, data, filled, plan, tmp_path):
    folder = copy(filled, kind, tmp_path / "folder")
    record = json.loads((folder / RECORDS[kind]).read_text())
    identity = json.loads(json.dumps(record["identity"]))
    mutate(data, record, spared=["sha256", "about"])
    seal_record(folder / RECORDS[kind], record)
    opened = LayerFolder(folder, RECORDS[kind], kind)
    with bounded_memory(), nothing_but_named_errors(f"{kind}='{folder}'"), ExitStack() as stack:
        if kind == "statistics":
            StatisticsStore(opened, True, stack).begin(identity, {}, {}, plan.layers)
        else:
            batches = RunFolder(opened).batches(identity, plan)
            assert batches is None or {layer for batch in batches for layer in batch} == set(plan.layers)


@EXAMPLES
@KINDS
@given(data=st.data())
def test_any_file_of_a_layer_holds_what_was_kept_or_counts_as_absent(kind, data, filled, plan, tmp_path):
    folder = copy(filled, kind, tmp_path / "folder")
    opened = LayerFolder(folder, RECORDS[kind], kind)
    opened.record()
    layer = data.draw(st.sampled_from(plan.layers)).name
    tensors, facts = opened.load(layer)
    content = opened.file(layer).read_bytes()
    if data.draw(st.booleans()):
        opened.file(layer).write_bytes(damage(data, content, header_end(content)))
    else:
        header, rest = split(opened.file(layer))
        mutate(data, header)
        opened.file(layer).write_bytes(join(header, rest))
    with bounded_memory():
        found = opened.load(layer)
    if found is not None:
        assert found[1] == facts and found[0].keys() == tensors.keys()
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in found[0].items())


@EXAMPLES
@given(data=st.data())
def test_any_facts_of_a_layer_fit_its_report_or_count_as_absent(data, filled, plan, tmp_path):
    folder = copy(filled, "run_dir", tmp_path / "folder")

    def change(tensors, about):
        if data.draw(st.booleans()):
            about["facts"] = data.draw(json_values)
        else:
            mutate(data, about["facts"])

    reseal_layer(layer_files(folder)[0], change)
    opened = LayerFolder(folder, "run.json", "run_dir")
    opened.record()
    found = RunFolder(opened).finished(plan)
    assert len(found) >= len(plan.layers) - 1
    layers = [report for _, report in found.values()]
    assert Report("Model", layers, {}, 2, 1, 2.0, {}).table()
    json.dumps([asdict(layer) for layer in layers])


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.clear(),
        lambda tensors: tensors.update(more=torch.zeros(1)),
        lambda tensors: tensors.update(lut=tensors["lut"][:, :1].clone()),
        lambda tensors: tensors.update(lut=tensors["lut"].float()),
        lambda tensors: tensors.update(lut=tensors["lut"] * float("nan")),
        lambda tensors: tensors.update(weight=tensors["weight"].long()),
        lambda tensors: tensors.update(weight=tensors["weight"][:1].clone()),
    ],
)
def test_tensors_that_are_no_solved_layer_are_refused_and_the_layer_is_done_again(change, filled, expected, tmp_path):
    folder = copy(filled, "run_dir", tmp_path / "folder")
    for file in layer_files(folder):
        reseal_layer(file, lambda tensors, about: change(tensors))
    assert torch.equal(logits(quantize(run_dir=folder)), expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.update(hessian=tensors["hessian"].double()),
        lambda tensors: tensors.update(hessian=tensors["hessian"].int()),
        lambda tensors: tensors.update(hessian=tensors["hessian"][:1].clone()),
        lambda tensors: tensors.update(bad_rows=torch.zeros(2, dtype=torch.int64)),
        lambda tensors: tensors.update(bad_rows=torch.tensor(float("nan"))),
    ],
)
def test_tensors_that_are_no_statistics_are_refused_and_collected_again(change, filled, expected, tmp_path):
    folder = copy(filled, "statistics", tmp_path / "folder")
    for file in layer_files(folder):
        reseal_layer(file, lambda tensors, about: change(tensors))
    assert torch.equal(logits(quantize(statistics=folder)), expected)


@pytest.mark.parametrize(
    "batches",
    [None, 5, [], [[]], [["no such layer"]], [[["x"]]], "all together", "twice"],
    ids=str,
)
def test_batches_that_are_not_those_of_the_run_are_refused_and_it_starts_anew(batches, filled, expected, tmp_path):
    folder = copy(filled, "run_dir", tmp_path / "folder")
    record = json.loads((folder / "run.json").read_text())
    names = [name for batch in record["batches"] for name in batch]
    record["batches"] = {"all together": [names], "twice": [names[:1], *record["batches"]]}.get(str(batches), batches)
    seal_record(folder / "run.json", record)
    assert torch.equal(logits(quantize(run_dir=folder)), expected)


@KINDS
def test_a_record_nested_without_end_counts_as_absent(kind, filled, expected, tmp_path):
    folder = copy(filled, kind, tmp_path / "folder")
    (folder / RECORDS[kind]).write_text('{"a":' * 10**5)
    assert torch.equal(logits(quantize(**{kind: folder})), expected)


@KINDS
@pytest.mark.parametrize("name", ["lock", "layers"])
def test_a_link_to_elsewhere_is_refused_and_what_it_points_to_is_unharmed(kind, name, tmp_path):
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (elsewhere / ".tmpABCDEF").write_text("somebody's")
    target = elsewhere if name == "layers" else elsewhere / ".tmpABCDEF"
    (folder / name).symlink_to(target)
    with pytest.raises(FolderUnusableError, match=f"{name} in it is a link"):
        quantize(**{kind: folder})
    assert (elsewhere / ".tmpABCDEF").read_text() == "somebody's"
    assert len([*elsewhere.iterdir()]) == 1


def test_links_under_temporary_names_are_not_written_through(filled, expected, tmp_path):
    folder = copy(filled, "run_dir", tmp_path / "folder")
    victim = tmp_path / "victim"
    victim.write_text("somebody's")
    for file in [folder / "run.json", *layer_files(folder)]:
        file.unlink()
        file.with_name(file.name + ".tmp").symlink_to(victim)
    assert torch.equal(logits(quantize(run_dir=folder)), expected)
    assert victim.read_text() == "somebody's"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
@pytest.mark.timeout(60)
@KINDS
def test_a_pipe_in_the_place_of_a_file_does_not_block(kind, filled, expected, tmp_path):
    folder = copy(filled, kind, tmp_path / "folder")
    for file in [folder / RECORDS[kind], layer_files(folder)[0]]:
        file.unlink()
        os.mkfifo(file)
    assert torch.equal(logits(quantize(**{kind: folder})), expected)


@KINDS
def test_a_record_of_other_conditions_is_refused_without_control_characters(kind, filled, tmp_path):
    folder = copy(filled, kind, tmp_path / "folder")
    record = json.loads((folder / RECORDS[kind]).read_text())
    record["identity"][ESCAPE] = ESCAPE
    seal_record(folder / RECORDS[kind], record)
    with pytest.raises(FolderMismatchError) as refused:
        quantize(**{kind: folder})
    assert str(refused.value).isprintable() and "gone" in str(refused.value)
