"""Pictures show the numbers of the report."""

import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model, token_rows

import hf_guidedquant
from hf_guidedquant import GuidedQuantConfig
from hf_guidedquant.errors import CheckpointError, EvaluationError, HessianError, PackageMissingError
from hf_guidedquant.linears import dense_weight
from hf_guidedquant.pictures import (
    check_picture,
    fisher_blocks,
    fisher_map,
    objective_map,
    objectives,
    perplexity_curves,
    row_histogram,
)


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


def test_perplexity_stands_over_its_bits(tmp_path):
    pytest.importorskip("matplotlib")
    points = {"a": {"rtn": [(3.1, 20.0), (2.1, 50.0)], "lnq": [(2.1, 30.0)]}, "b": {"lnq": [(2.1, 40.0)]}}
    figure = perplexity_curves(points, {"a": 12.0, "b": 13.0})
    for panel, (text, curves) in zip(figure.axes, points.items(), strict=True):
        assert panel.get_title() == text and panel.get_yscale() == "log"
        *lines, original = panel.lines
        drawn = {line.get_label(): sorted(zip(*line.get_data(), strict=True)) for line in lines}
        assert drawn == {name: sorted(at) for name, at in curves.items()}
        assert set(original.get_ydata()) == {{"a": 12.0, "b": 13.0}[text]}
    assert list(lines[0].get_xdata()) == sorted(lines[0].get_xdata())
    assert len(perplexity_curves({"a": points["a"]}).axes[0].lines) == 2
    figure.savefig(tmp_path / "curves.png")


@pytest.mark.parametrize("name", ["picture.nothing", "picture", "none/picture.png"])
def test_a_file_that_no_picture_can_be_written_to_is_refused(name, tmp_path):
    pytest.importorskip("matplotlib")
    check_picture(tmp_path / "picture.png")
    with pytest.raises(EvaluationError, match="cannot be written"):
        check_picture(tmp_path / name)


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


def token_gradients(model, module, rows):
    """What autograd says of a weight of its own for every token, ``[T, N, K]``, in the model's dtype."""
    found = []
    for row in rows:
        weight = dense_weight(module).expand(row.numel(), -1, -1).clone().requires_grad_()

        def own_weights(_, args, output, weight=weight):
            own = torch.einsum("tnk,tk->tn", weight, args[0][0])
            return output + (own - own.detach())  # zero, with gradients

        hook = module.register_forward_hook(own_weights)
        logits = model(input_ids=row[None]).logits[0, :-1]
        hook.remove()
        (gradients,) = torch.autograd.grad(F.cross_entropy(logits, row[1:], reduction="sum"), weight)
        found.append(gradients)
    return torch.cat(found)


@pytest.mark.parametrize(
    ("architecture", "layer", "groups"),
    [("llama", "model.layers.0.mlp.up_proj", 1), ("llama", "model.layers.1.self_attn.q_proj", 5),
     ("gpt2", "transformer.h.0.mlp.c_fc", 3)],
)  # fmt: skip
def test_fisher_blocks_are_sums_over_the_gradients_of_tokens(architecture, layer, groups):
    model, rows, outputs, inputs = tiny_model(architecture).double(), token_rows(3), (1, 40), 24
    fisher, approximation = fisher_blocks(model, layer, rows, outputs, inputs, groups)
    gradients = token_gradients(model, model.get_submodule(layer), rows)
    flat = gradients[:, outputs, :inputs].flatten(1)
    # Both sums are of some hundred terms, in two orders.
    bound = 1e-11 * (flat.abs().T @ flat.abs())
    assert ((fisher - flat.T @ flat).abs() <= bound + 1e-18).all()
    count = gradients.shape[1]
    members = torch.arange(count).split(-(-count // groups))
    for number, output in enumerate(outputs):
        (group,) = [group for group in members if output in group]
        own = gradients[:, group, :inputs]
        expected = torch.einsum("tnk,tnl->kl", own, own) / len(group)
        at = slice(number * inputs, (number + 1) * inputs)
        torch.testing.assert_close(approximation[at, at], expected, rtol=1e-9, atol=1e-14 * float(expected.abs().max()))
    assert not approximation[:inputs, inputs:].any() and not approximation[inputs:, :inputs].any()
    assert approximation.abs().max() > 0 and fisher[:inputs, inputs:].abs().max() > 0


def test_a_group_of_one_channel_is_its_own_fisher_block():
    model = tiny_model().double()
    fisher, approximation = fisher_blocks(model, "model.layers.0.mlp.up_proj", token_rows(2), (3, 7), 500, 96)
    assert fisher.shape == (128, 128)
    for block in (slice(0, 64), slice(64, 128)):
        torch.testing.assert_close(approximation[block, block], fisher[block, block])


def test_looking_leaves_the_model_as_it_was():
    model = tiny_model().train()
    fisher_blocks(model, "model.layers.1.mlp.down_proj", token_rows(1))
    assert model.training and all(
        parameter.requires_grad and parameter.grad is None for parameter in model.parameters()
    )
    assert not any(module._forward_hooks for module in model.modules())


def test_the_fisher_map_shows_both_matrices_in_one_scale(tmp_path):
    pytest.importorskip("matplotlib")
    arguments = (tiny_model(), "model.layers.0.mlp.up_proj", token_rows(2), (2, 5), 16)
    figure = fisher_map(*arguments)
    left, right, _ = figure.axes
    for panel, matrix in zip((left, right), fisher_blocks(*arguments), strict=True):
        assert torch.equal(torch.from_numpy(panel.images[0].get_array().data), matrix)
        low, high = panel.images[0].get_clim()
        assert low == -high and (low, high) == left.images[0].get_clim()
    assert [label.get_text() for label in left.get_xticklabels()] == ["channel 2", "channel 5"]
    figure.savefig(tmp_path / "fisher.png")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"layer": "model.layers.0.mlp"}, "no linear layer of this LlamaForCausalLM"),
        ({"layer": "model.norm"}, "no linear layer"),
        ({"layer": "none"}, "no linear layer"),
        ({"outputs": (0, 96)}, "has 96 output channels"),
        ({"outputs": (4, 4)}, "two different ones"),
        ({"outputs": (-1, 4)}, "two different ones"),
        ({"inputs": 0}, "an input and a row"),
        ({"rows": []}, "0 rows"),
    ],
)
def test_what_has_no_fisher_matrix_is_refused(changes, problem):
    arguments = {"layer": "model.layers.0.mlp.up_proj", "rows": token_rows(1), **changes}
    with pytest.raises(EvaluationError, match=problem):
        fisher_blocks(tiny_model(), **arguments)


def test_a_quantized_layer_has_none(model):
    with pytest.raises(EvaluationError, match="Load the full-precision original"):
        fisher_blocks(model, "model.layers.0.mlp.up_proj", token_rows(1))


def test_nan_is_told_with_the_layer():
    model = tiny_model()
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(HessianError, match=r"model\.layers\.1\.mlp\.up_proj: NaN"):
        fisher_blocks(model, "model.layers.1.mlp.up_proj", token_rows(1))
