"""A mean number of bits: kept to, spent where it pays, the same for layers that are multiplied together."""

import copy
import gc

import pytest
import torch
from conftest import memory_for, tiny_model, token_rows
from test_run_folder import saved
from trained_model import ROW, calibration_rows, held_out_ids, trained_model
from transformers import AutoModelForCausalLM

import hf_guidedquant
from hf_guidedquant import GuidedQuantConfig, budget, pipeline, solving
from hf_guidedquant.calibration import LayerStatistics, Relay
from hf_guidedquant.errors import FolderMismatchError, ModelError
from hf_guidedquant.nn import quantized_modules
from hf_guidedquant.training import Divergence, teacher_states

PROMPT = torch.arange(2, 20)[None]


def config(**changes):
    return GuidedQuantConfig(**{"bits": 2.5, "dataset": token_rows(), "num_groups": 3, **changes})


def mean_bits(layers):
    layers = list(layers)
    weights = [layer.in_features * layer.out_features for layer in layers]
    return sum(layer.bits * size for layer, size in zip(layers, weights, strict=True)) / sum(weights)


@pytest.mark.parametrize("method", ["lnq", "squeezellm"])
@pytest.mark.parametrize("bits", [2.5, 3.0])
def test_the_mean_is_kept_to_and_layers_multiplied_together_share_a_width(bits, method, any_model, tmp_path):
    model = hf_guidedquant.quantize(any_model, config(bits=bits, method=method))
    layers = quantized_modules(model)
    # A step of the largest group of layers would not have fitted any more.
    assert bits - 0.5 < mean_bits(layers.values()) <= bits
    assert len({layer.bits for layer in layers.values()}) > 1
    for name, layer in layers.items():
        for one, others in (("q_proj", ("k_proj", "v_proj")), ("gate_proj", ("up_proj",))):
            if name.endswith(one):
                assert {layers[name.replace(one, other)].bits for other in others} == {layer.bits}
    model.save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert again.config.quantization_config.bits == bits
    with torch.no_grad():
        assert torch.equal(again(input_ids=PROMPT).logits, model(input_ids=PROMPT).logits)


def test_bits_go_where_the_predicted_loss_falls_most(llama, monkeypatch):
    """With all to be gained in one place: the o_proj of the second block."""
    wanted = "model.layers.1.self_attn.o_proj"
    monkeypatch.setattr(
        budget, "_predicted_loss", lambda weight, h, bits, layer, c: 1 / bits if layer.name == wanted else 1e-3 / bits
    )
    layers = quantized_modules(hf_guidedquant.quantize(llama, config(bits=2.1)))
    # A tenth of a bit for all is a bit and a half for this one, and less than a bit for any other.
    assert {name: layer.bits for name, layer in layers.items() if layer.bits != 2} == {wanted: 3}


def test_the_predicted_loss_is_what_weighted_kmeans_leaves():
    """The report's relative objective times ``Σ h w²``, from the diagonals themselves."""
    model = tiny_model()
    settings = config(bits=2, method="squeezellm", num_groups=1)
    seen = {}
    solve = solving._solve_batch

    def spy(model, batch, statistics, config):
        for layer in batch:
            weight = model.get_submodule(layer.name).weight.detach()
            diagonal = statistics[layer.name].hessian.clone()
            unit = float((weight.double().square() * diagonal.double()).sum())
            seen[layer.name] = budget._predicted_loss(weight, diagonal, 2, layer, config), unit
        return solve(model, batch, statistics, config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solving, "_solve_batch", spy)
        report = hf_guidedquant.quantize(model, settings).quantization_report
    assert len(seen) == 14
    for layer in report.layers:
        loss, unit = seen[layer.plan.name]
        # Products of three fp32 roundings each, of the same codes.
        assert loss == pytest.approx(layer.objectives["kmeans"] * unit, rel=16 * torch.finfo(torch.float32).eps)


def test_overrides_keep_their_width_and_do_not_count(llama):
    layers = quantized_modules(hf_guidedquant.quantize(llama, config(overrides={"*.down_proj": {"bits": 8}})))
    others = {name: layer for name, layer in layers.items() if not name.endswith("down_proj")}
    assert {layer.bits for name, layer in layers.items() if name not in others} == {8}
    assert 2 < mean_bits(others.values()) <= 2.5


def test_the_same_seed_gives_the_same_bytes_and_a_run_goes_on(tmp_path, monkeypatch):
    expected = saved(hf_guidedquant.quantize(tiny_model(), config()), tmp_path / "model")
    folders = {"run_dir": tmp_path / "run", "statistics": tmp_path / "statistics"}
    assert saved(hf_guidedquant.quantize(tiny_model(), config(**folders)), tmp_path / "model") == expected
    monkeypatch.setattr(solving, "_solve_batch", lambda *args: pytest.fail("a layer was solved"))
    assert saved(hf_guidedquant.quantize(tiny_model(), config(**folders)), tmp_path / "model") == expected


@pytest.fixture
def passes(monkeypatch):
    """The layers of every pass over the rows."""
    found, collect = [], Relay.collect

    def counted(self, number, statistics):
        found.append(sorted(statistics))
        return collect(self, number, statistics)

    monkeypatch.setattr(Relay, "collect", counted)
    return found


def test_one_pass_serves_the_choice_and_the_solver(passes, tmp_path):
    settings = config(distill={"epochs": 1, "held_back": 0.25})
    expected = saved(hf_guidedquant.quantize(tiny_model(), settings), tmp_path / "model")
    assert [len(layers) for layers in passes] == [14]
    passes.clear()
    # A block at a time: first for the diagonals, then for the Hessians.
    settings.max_memory = memory_for(tiny_model(), settings)
    assert saved(hf_guidedquant.quantize(tiny_model(), settings), tmp_path / "model") == expected
    assert [len(layers) for layers in passes] == [7, 7, 7, 7]


def test_what_a_folder_of_statistics_holds_is_not_gathered(passes, tmp_path, monkeypatch):
    read, fingerprint = [], pipeline.model_fingerprint
    monkeypatch.setattr(pipeline, "model_fingerprint", lambda model: read.append(model) or fingerprint(model))
    for bits in (2, 2.5, 3.0):
        expected = saved(hf_guidedquant.quantize(tiny_model(), config(bits=bits)), tmp_path / "model")
        passes.clear()
        again = config(bits=bits, statistics=tmp_path / "statistics", run_dir=tmp_path / f"run-{bits}")
        assert saved(hf_guidedquant.quantize(tiny_model(), again), tmp_path / "model") == expected
        assert len(passes) == (1 if bits == 2 else 0)
        assert len(read) == 1
        read.clear()
        # A block at a time, diagonals are gathered anew.
        again.run_dir, again.max_memory = None, memory_for(tiny_model(), config())
        passes.clear()
        assert saved(hf_guidedquant.quantize(tiny_model(), again), tmp_path / "model") == expected
        assert len(passes) == (0 if bits == 2 else 2)
        read.clear()


def test_hessians_are_let_go_where_nothing_is_left_to_solve(tmp_path, monkeypatch):
    alive, train = [], pipeline.reconstruct

    def counted(*args, **kwargs):
        gc.collect()
        alive.append(sum(isinstance(each, LayerStatistics) for each in gc.get_objects()))
        return train(*args, **kwargs)

    monkeypatch.setattr(pipeline, "reconstruct", counted)
    for _ in range(2):
        hf_guidedquant.quantize(tiny_model(), config(run_dir=tmp_path / "run", reconstruct={"epochs": 1}))
    assert alive == [0, 0]


def test_too_little_memory_and_other_folders_are_told_before_the_original_reads_the_rows(tmp_path, monkeypatch):
    hf_guidedquant.quantize(tiny_model(), config(statistics=tmp_path / "statistics"))
    monkeypatch.setattr(pipeline, "teacher_states", lambda *args: pytest.fail("the original read the rows"))
    with pytest.raises(ModelError, match="max_memory"):
        hf_guidedquant.quantize(tiny_model(), config(distill=True, max_memory=1e-4))
    with pytest.raises(FolderMismatchError):
        hf_guidedquant.quantize(tiny_model(seed=1), config(distill=True, statistics=tmp_path / "statistics"))


def test_layers_whose_method_needs_no_data_get_a_width_too(passes):
    layers = quantized_modules(hf_guidedquant.quantize(tiny_model(), config(method="kmeans")))
    assert 2 < mean_bits(layers.values()) <= 2.5
    assert [len(names) for names in passes] == [14]


def test_bits_where_they_pay_are_closer_to_the_original_than_the_same_for_all():
    original = trained_model()
    unseen = list(held_out_ids().view(-1, ROW))
    states = teacher_states(original, unseen)
    found = []
    for bits in (3, 3.0):
        settings = GuidedQuantConfig(bits=bits, dataset=calibration_rows())
        model = hf_guidedquant.quantize(copy.deepcopy(original), settings)
        assert mean_bits(quantized_modules(model).values()) <= 3
        found.append(Divergence(model, unseen, states).mean(range(len(unseen))))
    assert found[0] > found[1]


@pytest.mark.parametrize(
    ("mean", "widths"),
    [(2.0, [2, 3, 4]), (2.5, [2, 3, 4]), (4.0, [2, 3, 4]), (1.0, [1, 2]), (4.5, [3, 4, 5, 6]), (8.0, [7, 8])],
)
def test_widths_to_choose_from(mean, widths):
    assert list(budget.widths_near(mean)) == widths


def test_the_plan_shows_the_next_larger_width_before_there_are_data(llama):
    assert {layer.bits for layer in hf_guidedquant.plan(llama, config()).layers} == {3}
