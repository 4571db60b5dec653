"""Pictures show the numbers of the report."""

import sys

import pytest
import torch
from conftest import tiny_model, token_rows

import hf_guidedquant
from hf_guidedquant import GuidedQuantConfig
from hf_guidedquant.errors import CheckpointError, PackageMissingError
from hf_guidedquant.pictures import objective_map, objectives, row_histogram


@pytest.fixture(scope="module")
def model():
    config = GuidedQuantConfig(bits=2, dataset=token_rows(), modules_to_not_convert=["layers.1.mlp.up_proj"])
    return hf_guidedquant.quantize(tiny_model(), config)


@pytest.mark.parametrize("saved", [False, True])
def test_objectives_stand_at_their_block_and_module(model, saved, tmp_path):
    source = hf_guidedquant.save(model, tmp_path / "m") if saved else model.quantization_report
    modules, blocks, stages = objectives(source)
    assert blocks == ["0", "1"] and len(modules) == 7
    assert {"kmeans", "lnq"} <= stages.keys()
    layers = {layer.plan.name: layer.objectives for layer in model.quantization_report.layers}
    assert len(layers) == 13
    for stage, values in stages.items():
        for i, block in enumerate(blocks):
            for j, module in enumerate(modules):
                expected = layers.get(f"model.layers.{block}.{module}", {}).get(stage)
                assert values[i, j].isnan() if expected is None else values[i, j] == expected
    assert int(stages["lnq"].isnan().sum()) == 1


def test_the_map_shows_the_first_stage_and_the_last(model, tmp_path):
    pytest.importorskip("matplotlib")
    modules, _, stages = objectives(model.quantization_report)
    figure = objective_map(model.quantization_report)
    first, last, _ = figure.axes
    for panel, stage in ((first, next(iter(stages))), (last, [*stages][-1])):
        shown = torch.from_numpy(panel.images[0].get_array().filled(float("nan")))
        assert torch.equal(shown.isnan(), stages[stage].isnan())
        assert torch.equal(shown.nan_to_num(), stages[stage].nan_to_num())
        assert [label.get_text() for label in panel.get_xticklabels()] == modules
    assert first.images[0].get_clim() == last.images[0].get_clim()
    figure.savefig(tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG"


def test_a_single_stage_is_a_single_map():
    pytest.importorskip("matplotlib")
    model = hf_guidedquant.quantize(tiny_model(), GuidedQuantConfig(bits=3, method="rtn"))
    assert len([panel for panel in objective_map(model.quantization_report).axes if panel.images]) == 1


def test_a_histogram_counts_every_weight_and_marks_every_codeword(model, tmp_path):
    pytest.importorskip("matplotlib")
    row = tiny_model().model.layers[0].mlp.down_proj.weight[3]
    codebook = model.model.layers[0].mlp.down_proj.lut[3]
    figure = row_histogram(row, codebook, bins=11)
    (panel,) = figure.axes
    assert sum(bar.get_height() for bar in panel.patches) == row.numel() and len(panel.patches) == 11
    assert [line.get_xdata()[0] for line in panel.lines] == codebook.float().tolist()
    figure.savefig(tmp_path / "row.png")


@pytest.mark.parametrize("content", [None, "[", "{}"])
def test_a_folder_without_a_report_is_refused(content, tmp_path):
    if content is not None:
        (tmp_path / "guidedquant_report.json").write_text(content)
    with pytest.raises(CheckpointError, match="no readable report"):
        objectives(tmp_path)


def test_without_matplotlib_the_error_says_what_to_install(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(PackageMissingError, match=r"hf-guidedquant\[pictures\]"):
        row_histogram(torch.zeros(4), torch.zeros(2))
