"""Blocks trained one after the other: less error where it was not trained, never a worse block, the same bytes."""

import copy
import os
import signal

import pytest
import torch
from conftest import ARCHITECTURES, memory_for, tiny_model, token_rows
from test_run_folder import FEW, in_a_killed_process, layer_files, saved
from trained_model import ROW, calibration_rows, held_out_ids, trained_model
from transformers import AutoModelForCausalLM

import hf_guidedquant
from hf_guidedquant import GuidedQuantConfig, solving
from hf_guidedquant.calibration import Outline, outline
from hf_guidedquant.errors import ModelError
from hf_guidedquant.nn import LatentLinear, quantized_modules
from hf_guidedquant.training import Divergence, reconstruction, teacher_states
from hf_guidedquant.training.steps import Steps
from hf_guidedquant.triton_kernels import unpack_codes

GENTLE = {"batch_tokens": 64, "epochs": 8, "learning_rate": 0.02, "latent_learning_rate": 0.01}
PROMPT = torch.arange(2, 20)[None]
# Rows of two lengths; they come twice, so that some that are held back are known.
ROWS = (token_rows(4) + token_rows(4, length=20, seed=1)) * 2


def config(**changes):
    return GuidedQuantConfig(**{"bits": 2, "dataset": ROWS, "reconstruct": GENTLE, **changes})


def trained_config(**changes):
    return GuidedQuantConfig(**{"bits": 2, "dataset": calibration_rows(), **changes})


def states(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def leaving(model, rows):
    """Hidden states that leave the decoder blocks: of every block those of all rows."""
    found = [[] for _ in model.model.layers]
    hooks = [
        block.register_forward_hook(lambda module, args, output, kept=kept: kept.append(output))
        for block, kept in zip(model.model.layers, found, strict=True)
    ]
    with torch.no_grad():
        for row in rows:
            model(input_ids=row[None])
    for hook in hooks:
        hook.remove()
    return [torch.cat(kept, dim=1).double() for kept in found]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("method", ["lnq", "rtn"])
def test_divergence_falls_on_text_that_was_never_seen(bits, method):
    original = trained_model()
    unseen = list(held_out_ids().view(-1, ROW))
    found = {}
    for wanted in (False, {"batch_tokens": 512, "latent_learning_rate": 0.01}):
        settings = trained_config(bits=bits, method=method, reconstruct=wanted)
        model = hf_guidedquant.quantize(copy.deepcopy(original), settings)
        found[bool(wanted)] = Divergence(model, unseen, teacher_states(original, unseen)).mean(range(len(unseen)))
    assert found[True] < found[False]


def test_the_errors_told_are_those_of_the_blocks():
    """Without a step that helps, every block keeps the solved layers: the model is the one that was solved."""
    original, rows = trained_model(), calibration_rows()
    plain = hf_guidedquant.quantize(copy.deepcopy(original), trained_config(bits=4))
    wild = {"batch_tokens": 512, "latent_learning_rate": 1.0, "learning_rate": 1.0}
    model = hf_guidedquant.quantize(copy.deepcopy(original), trained_config(bits=4, reconstruct=wild))
    assert same(model.state_dict(), plain.state_dict())
    generator = torch.Generator().manual_seed(0)
    held_back = [rows[index] for index in torch.randperm(len(rows), generator=generator)[:4].tolist()]
    reports = model.quantization_report.reconstruction.blocks
    assert [report.name for report in reports] == ["model.layers.0", "model.layers.1"]
    for report, wanted, found in zip(reports, leaving(original, held_back), leaving(plain, held_back), strict=True):
        assert not report.kept
        assert report.trained > report.solved
        error = float((found - wanted).square().sum() / wanted.square().sum())
        assert report.solved == pytest.approx(error, rel=1e-4)
        assert report.result == report.solved
    mean = sum(report.solved for report in reports) / 2
    line = model.quantization_report.reconstruction.describe()
    assert line == f"error of a block {mean:.4f} -> {mean:.4f} on rows held back (0 of 2 blocks are better)"


@pytest.mark.parametrize("bits", [2, 3])
def test_codebooks_alone_are_trained(bits):
    """Weights that shared a codeword still do, and divergence falls on text that was never seen."""
    original = trained_model()
    unseen = list(held_out_ids().view(-1, ROW))
    plain, model = (
        hf_guidedquant.quantize(copy.deepcopy(original), trained_config(bits=bits, reconstruct=how))
        for how in (False, {"codes": False, "batch_tokens": 512})
    )
    solved, trained = quantized_modules(plain), quantized_modules(model)
    for name, layer in solved.items():
        codes = unpack_codes(layer.bit_planes(), layer.in_features).long()
        weight = trained[name].dequantize()
        codewords = torch.zeros(len(weight), 2**bits, dtype=weight.dtype).scatter(1, codes, weight)
        assert torch.equal(codewords.gather(1, codes), weight), name
        assert not torch.equal(weight, layer.dequantize()), name
        assert (trained[name].lut.diff(dim=-1) >= 0).all()
    report = model.quantization_report.reconstruction
    assert all(block.kept and block.moved == 0 for block in report.blocks)
    assert "codes" not in report.describe()
    before, after = (
        Divergence(m, unseen, teacher_states(original, unseen)).mean(range(len(unseen))) for m in (plain, model)
    )
    assert after < before


def test_a_block_reads_what_the_trained_block_before_it_gives():
    plain, model = (hf_guidedquant.quantize(tiny_model(), config(reconstruct=how)) for how in (False, GENTLE))
    first, second = model.quantization_report.reconstruction.blocks
    assert first.kept
    held_back = [ROWS[torch.randperm(len(ROWS), generator=torch.Generator().manual_seed(0))[0]]]
    wanted = leaving(tiny_model(), held_back)[1]

    def error():
        return float((leaving(plain, held_back)[1] - wanted).square().sum() / wanted.square().sum())

    assert second.solved != pytest.approx(error(), rel=1e-2)
    plain.model.layers[0] = model.model.layers[0]
    assert second.solved == pytest.approx(error(), rel=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_reconstructed_model_is_saved_and_reloaded(name, tmp_path):
    plain = hf_guidedquant.quantize(tiny_model(name), config(reconstruct=False))
    model = hf_guidedquant.quantize(tiny_model(name), config())
    report = model.quantization_report.reconstruction
    assert len(report.blocks) == 2
    assert all(block.kept and 0 < block.moved < 1 for block in report.blocks)
    for module, (path, layer) in zip(quantized_modules(plain).values(), quantized_modules(model).items(), strict=True):
        assert not torch.equal(layer.dequantize(), module.dequantize()), path
        assert (layer.lut.diff(dim=-1) >= 0).all()
    hf_guidedquant.save(model, tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(again(input_ids=PROMPT).logits, model(input_ids=PROMPT).logits)
    assert again.config.quantization_config.reconstruct == config().reconstruct
    card = (tmp_path / "model" / "README.md").read_text()
    assert "blocks reconstructed" in card
    assert f"| reconstructed | {report.describe()} |" in card
    assert f"reconstructed: {report.describe()}" in model.quantization_report.table()
    assert model.quantization_report.seconds["reconstruction"] > 0
    layers = set(quantized_modules(model))
    original, other = (
        {key: tensor for key, tensor in m.state_dict().items() if key.rpartition(".")[0] not in layers}
        for m in (tiny_model(name), model)
    )
    assert same(original, other)


@pytest.mark.parametrize("distill", [False, {"batch_tokens": 64}])
def test_the_same_seed_gives_the_same_bytes(distill, tmp_path):
    first, second, other = (
        saved(hf_guidedquant.quantize(tiny_model(), config(seed=seed, distill=distill)), tmp_path / "model")
        for seed in (3, 3, 4)
    )
    assert first == second
    assert first["model.safetensors"] != other["model.safetensors"]


def test_segments_change_nothing():
    """However the model is divided for calibration; its statistics are the same, and so is all that follows."""
    whole = hf_guidedquant.quantize(tiny_model(), config())
    divided = hf_guidedquant.quantize(tiny_model(), config(max_memory=memory_for(tiny_model(), config())))
    assert same(whole.state_dict(), divided.state_dict())


def test_layers_that_are_left_out_stay_as_they_are():
    changes = {"modules_to_not_convert": ["model.layers.0", "down_proj"]}
    model = hf_guidedquant.quantize(tiny_model(), config(**changes))
    assert [block.name for block in model.quantization_report.reconstruction.blocks] == ["model.layers.1"]
    assert set(quantized_modules(model)) == set(
        quantized_modules(hf_guidedquant.quantize(tiny_model(), config(reconstruct=False, **changes)))
    )


def test_a_run_of_layers_outside_of_the_blocks_has_nothing_to_train():
    settings = config(modules_to_not_convert=["model.layers.0", "model.layers.1"], embedding_bits=4)
    report = hf_guidedquant.quantize(tiny_model(), settings).quantization_report
    assert report.reconstruction.describe() == "no decoder block has quantized layers"
    assert report.reconstruction.describe() in report.table()


def test_rows_held_back_are_not_trained_on(monkeypatch):
    trained, measured = set(), set()
    add, error = Steps.add, reconstruction._Block._error

    def adding(self, rows, *states):
        trained.update(tuple(row.tolist()) for row in rows)
        add(self, rows, *states)

    monkeypatch.setattr(Steps, "add", adding)
    monkeypatch.setattr(
        reconstruction._Block, "_error", lambda self, which: measured.update(which) or error(self, which)
    )
    rows = token_rows(16)
    hf_guidedquant.quantize(tiny_model(), config(dataset=rows, reconstruct={"held_back": 0.3, "batch_tokens": 64}))
    assert len(measured) == 5
    assert trained == {tuple(row.tolist()) for number, row in enumerate(rows) if number not in measured}


def test_an_interrupted_training_leaves_the_model_as_it_was(monkeypatch):
    model = tiny_model().train()
    before, modules = states(model), dict(model.named_modules())
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    calls = iter(range(100))
    settle = LatentLinear.settle

    def failing(self):
        if next(calls) == 20:
            raise MemoryError
        settle(self)

    monkeypatch.setattr(LatentLinear, "settle", failing)
    with pytest.raises(MemoryError):
        hf_guidedquant.quantize(model, config())
    assert same(before, model.state_dict())
    assert dict(model.named_modules()) == modules
    assert all(module.training for module in model.modules())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_a_model_that_cannot_be_run_block_by_block_is_refused_before_anything_is_solved(monkeypatch):
    monkeypatch.setattr(solving, "_solve_batch", lambda *args: pytest.fail("a layer was solved"))
    monkeypatch.setitem(outline.__globals__, "GradientCheckpointingLayer", type("Nothing", (), {}))
    model = tiny_model()
    assert outline(model, 33, True, lambda device: device) != Outline()
    with pytest.raises(ModelError, match="reconstruct=False"):
        hf_guidedquant.quantize(model, config())
    assert same(tiny_model().state_dict(), model.state_dict())


def test_rows_that_are_not_finite_are_left_out():
    rows = token_rows(12) * 2
    model = tiny_model()
    model.model.embed_tokens.weight.data[5] = 1e38
    for row in rows:
        row[row == 5] = 6
    rows[3][7] = 5
    report = hf_guidedquant.quantize(model, config(dataset=rows)).quantization_report.reconstruction
    assert all(block.kept for block in report.blocks)
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values() if tensor.is_floating_point())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return saved(hf_guidedquant.quantize(tiny_model(), config(**FEW)), tmp_path_factory.mktemp("undisturbed") / "model")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("step", [1, 9])
def test_a_run_that_is_killed_while_it_trains_ends_with_the_same_bytes(step, undisturbed, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"

    def run():
        calls, settle = iter(range(1, 1000)), LatentLinear.settle

        def kill(self):
            if next(calls) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            settle(self)

        LatentLinear.settle = kill
        hf_guidedquant.quantize(tiny_model(), config(run_dir=run_dir, **FEW))

    in_a_killed_process(run)
    assert len(layer_files(run_dir)) == 3
    monkeypatch.setattr(solving, "_solve_batch", lambda *args: pytest.fail("a layer was solved"))
    model = hf_guidedquant.quantize(tiny_model(), config(run_dir=run_dir, **FEW))
    assert saved(model, tmp_path / "model") == undisturbed
