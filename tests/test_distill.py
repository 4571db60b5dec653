"""Codebooks trained end to end: less KL, the best epoch, the same bytes every time."""

import copy
import os
import signal

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from conftest import ARCHITECTURES, tiny_model, token_rows
from test_divergence import capped_gemma3
from test_run_folder import FEW, in_a_killed_process, layer_files, saved
from trained_model import ROW, calibration_rows, held_out_ids, trained_model
from transformers import AutoModelForCausalLM

import hf_guidedquant
from hf_guidedquant import GuidedQuantConfig, pipeline, solving
from hf_guidedquant.config import DistillSpec
from hf_guidedquant.errors import CalibrationError, TokenizerMissingError
from hf_guidedquant.nn import TrainedLinear, quantized_modules
from hf_guidedquant.training import Divergence, distill, teacher_states
from hf_guidedquant.training.steps import Steps

MODELS = {**{name: lambda name=name: tiny_model(name) for name in ARCHITECTURES}, "capped": capped_gemma3}
PROMPT = torch.arange(2, 20)[None]


# Random rows teach nothing about other random rows: these come twice, so that some that are held back are known.
ROWS = token_rows(4) * 2


def config(**changes):
    return GuidedQuantConfig(**{"bits": 2, "dataset": ROWS, "distill": {"batch_tokens": 64}, **changes})


def states(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("method", ["lnq", "rtn"])
def test_divergence_falls_also_on_text_that_is_neither_trained_on_nor_held_back(method):
    original = trained_model()
    unseen = list(held_out_ids().view(-1, ROW))
    found = {}
    for wanted in (False, {"batch_tokens": 512}):
        settings = GuidedQuantConfig(bits=3, method=method, dataset=calibration_rows(), distill=wanted)
        model = hf_guidedquant.quantize(copy.deepcopy(original), settings)
        found[bool(wanted)] = Divergence(model, unseen, teacher_states(original, unseen)).mean(range(len(unseen)))
    report = model.quantization_report.distillation
    assert report.held_back_rows == 4
    assert report.best_epoch > 0
    assert report.held_back[report.best_epoch] == min(report.held_back) < report.held_back[0]
    assert found[True] < found[False]


@pytest.mark.parametrize("name", MODELS)
def test_a_distilled_model_is_saved_and_reloaded(name, tmp_path):
    plain = hf_guidedquant.quantize(MODELS[name](), config(distill=False))
    model = hf_guidedquant.quantize(MODELS[name](), config())
    assert model.quantization_report.distillation.best_epoch > 0
    for module, (path, layer) in zip(quantized_modules(plain).values(), quantized_modules(model).items(), strict=True):
        assert not torch.equal(layer.lut, module.lut), path
        assert (layer.lut.diff(dim=-1) >= 0).all()
    hf_guidedquant.save(model, tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(again(input_ids=PROMPT).logits, model(input_ids=PROMPT).logits)
    assert again.config.quantization_config.distill == config().distill
    card = (tmp_path / "model" / "README.md").read_text()
    assert "codebooks distilled" in card
    line = model.quantization_report.distillation.describe()
    assert f"| distilled | {line} |" in card
    assert f"distilled: {line}" in model.quantization_report.table()
    assert model.quantization_report.seconds["distillation"] > 0
    # All that is not quantized, the tied embeddings among it, is the original's.
    layers = set(quantized_modules(model))
    original, distilled = (
        {key: tensor for key, tensor in m.state_dict().items() if key.rpartition(".")[0] not in layers}
        for m in (MODELS[name](), model)
    )
    assert same(original, distilled)


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    first, second, other = (
        saved(hf_guidedquant.quantize(tiny_model(), config(seed=seed)), tmp_path / "model") for seed in (3, 3, 4)
    )
    assert first == second
    assert first["model.safetensors"] != other["model.safetensors"]


def test_the_codebooks_of_the_best_epoch_are_kept(monkeypatch):
    """Whatever the rows held back say: here that the third of five epochs is the best."""
    said, seen = iter([5.0, 4.0, 3.0, 2.0, 2.5, 2.0]), []

    def mean(self, which):
        layers = {name: m for name, m in self.model.named_modules() if isinstance(m, TrainedLinear)}
        seen.append({name: layer.quantized().dequantize() for name, layer in layers.items()})
        return next(said)

    monkeypatch.setattr(Divergence, "mean", mean)
    model = hf_guidedquant.quantize(tiny_model(), config(distill={"epochs": 5, "batch_tokens": 64}))
    report = model.quantization_report.distillation
    assert (report.best_epoch, report.held_back, len(report.trained)) == (3, (5.0, 4.0, 3.0, 2.0, 2.5, 2.0), 5)
    found = {name: layer.dequantize() for name, layer in quantized_modules(model).items()}
    assert [same(found, one) for one in seen] == [False, False, False, True, False, False]


def test_training_that_does_harm_is_not_kept():
    plain = hf_guidedquant.quantize(copy.deepcopy(trained_model()), GuidedQuantConfig(dataset=calibration_rows()))
    wild = {"epochs": 2, "learning_rate": 1.0, "batch_tokens": 512}
    model = hf_guidedquant.quantize(
        copy.deepcopy(trained_model()), GuidedQuantConfig(dataset=calibration_rows(), distill=wild)
    )
    report = model.quantization_report.distillation
    assert min(report.held_back[1:]) > report.held_back[0]
    assert report.best_epoch == 0
    assert "none of 2 epochs was better than that, a smaller learning_rate may be" in report.describe()
    assert same(model.state_dict(), plain.state_dict())


def test_rows_held_back_are_not_trained_on(monkeypatch):
    trained, measured = set(), set()
    add, mean = Steps.add, Divergence.mean
    text = lambda rows: {tuple(row.tolist()) for row in rows}  # noqa: E731
    monkeypatch.setattr(Steps, "add", lambda self, rows, states: trained.update(text(rows)) or add(self, rows, states))
    monkeypatch.setattr(
        Divergence, "mean", lambda self, which: measured.update(text(self.of(which)[0])) or mean(self, which)
    )
    rows = token_rows(8)
    hf_guidedquant.quantize(tiny_model(), config(dataset=rows, distill={"held_back": 0.4, "batch_tokens": 64}))
    assert len(measured) == 3
    assert trained | measured == text(rows)
    assert not trained & measured


def test_an_interrupted_training_leaves_the_model_as_it_was(monkeypatch):
    spec = DistillSpec(batch_tokens=64)
    original = teacher_states(tiny_model(), ROWS)
    model = hf_guidedquant.quantize(tiny_model(), config(distill=False)).train()
    before, layers = states(model), quantized_modules(model)
    calls = iter(range(10))
    add = Steps.add

    def failing(self, *inputs):
        if next(calls) == 2:
            raise MemoryError
        add(self, *inputs)

    monkeypatch.setattr(Steps, "add", failing)
    with pytest.raises(MemoryError):
        distill(model, ROWS, original, spec)
    assert same(before, model.state_dict())
    assert all(module is layers[name] for name, module in quantized_modules(model).items())
    monkeypatch.undo()
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    distill(model, ROWS, original, spec)
    assert not same(before, model.state_dict())
    assert all(module.training for module in model.modules())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_accelerate_hooks_stay_with_their_layers():
    model = tiny_model()
    hook = AlignDevicesHook(execution_device="cpu")
    add_hook_to_module(model.model.layers[0].mlp.up_proj, hook)
    expected = hf_guidedquant.quantize(tiny_model(), config()).state_dict()
    hf_guidedquant.quantize(model, config())
    assert model.model.layers[0].mlp.up_proj._hf_hook is hook
    assert same(expected, model.state_dict())
    assert model(input_ids=PROMPT).logits.isfinite().all()


def test_what_cannot_be_distilled_is_refused_before_anything_is_solved(monkeypatch):
    monkeypatch.setattr(solving, "_solve_batch", lambda *args: pytest.fail("a layer was solved"))
    model = tiny_model()
    before = states(model)
    with pytest.raises(CalibrationError, match="two calibration rows"):
        hf_guidedquant.quantize(model, config(dataset=token_rows(1)))
    with pytest.raises(TokenizerMissingError):
        hf_guidedquant.quantize(model, config(method="rtn", dataset="builtin"))
    assert same(before, model.state_dict())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return saved(hf_guidedquant.quantize(tiny_model(), config(**FEW)), tmp_path_factory.mktemp("undisturbed") / "model")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("step", [1, 5])
def test_a_run_that_is_killed_while_it_distills_ends_with_the_same_bytes(step, undisturbed, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"

    def run():
        calls, take = iter(range(1, 100)), Steps.step

        def kill(*args):
            if next(calls) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            take(*args)

        Steps.step = kill
        hf_guidedquant.quantize(tiny_model(), config(run_dir=run_dir, **FEW))

    in_a_killed_process(run)
    # Four steps are an epoch.
    assert len(layer_files(run_dir)) == (3 if step < 5 else 4)
    monkeypatch.setattr(solving, "_solve_batch", lambda *args: pytest.fail("a layer was solved"))
    model = hf_guidedquant.quantize(tiny_model(), config(run_dir=run_dir, **FEW))
    assert saved(model, tmp_path / "model") == undisturbed


@pytest.mark.parametrize("method", ["lnq", "rtn"])
def test_solved_layers_serve_any_distillation(method, tmp_path, monkeypatch):
    expected = {
        wanted: saved(
            hf_guidedquant.quantize(tiny_model(), config(method=method, distill=wanted, **FEW)), tmp_path / "model"
        )
        for wanted in (False, True)
    }
    assert expected[False]["model.safetensors"] != expected[True]["model.safetensors"]
    settings = {"method": method, "run_dir": tmp_path / "run", **FEW}
    hf_guidedquant.quantize(tiny_model(), config(distill={"epochs": 1}, **settings))
    monkeypatch.setattr(solving, "_solve_batch", lambda *args: pytest.fail("a layer was solved"))
    for wanted in (False, True):
        model = hf_guidedquant.quantize(tiny_model(), config(distill=wanted, **settings))
        assert saved(model, tmp_path / "model") == expected[wanted]


def test_a_model_that_visits_a_gpu_comes_back_from_an_error(monkeypatch):
    model, moves = tiny_model(), []
    monkeypatch.setattr(pipeline, "place_for", lambda config: lambda home: torch.device("cuda:0"))
    monkeypatch.setattr(pipeline, "free_memory", lambda device: 2**40)
    monkeypatch.setattr(model, "to", lambda device: moves.append(str(device)))
    with pytest.raises(KeyError), pipeline._where_work_is_done(model, GuidedQuantConfig()):
        raise KeyError
    assert moves == ["cuda:0", "cpu"]
