"""Models with outliers beside the codes: sizes, files, training and everything else that models without them do."""

import json
import os

import pytest
import torch
from conftest import ARCHITECTURES, tiny_model, token_rows
from test_run_folder import FEW, in_a_killed_process, kill_at_the, saved
from transformers import AutoModelForCausalLM

import hf_guidedquant
from hf_guidedquant import GuidedLinear, GuidedQuantConfig, solving
from hf_guidedquant.cli import main
from hf_guidedquant.errors import ConfigError, FolderMismatchError, OverlayError
from hf_guidedquant.evaluate import bits_per_weight
from hf_guidedquant.formats import lut as lut_format
from hf_guidedquant.inspection import inspect
from hf_guidedquant.layer_folder import LayerFolder
from hf_guidedquant.nn import LatentLinear, TrainedLinear, quantized_modules
from hf_guidedquant.solvers import SOLVERS
from hf_guidedquant.triton_kernels import pack_codes, unpack_codes

SHARE = 0.03  # 2 of 64 inputs, 3 of 96
BATCH = torch.stack(token_rows(2, 12))


def config(**changes):
    return GuidedQuantConfig(**{"bits": 2, "dataset": token_rows(), "outliers": SHARE, **changes})


def quantized(architecture="llama", **changes):
    return hf_guidedquant.quantize(tiny_model(architecture), config(**changes))


def logits(model):
    with torch.no_grad():
        return model(input_ids=BATCH).logits


def layer(bits=3, outliers=4, lut_dtype=torch.float16) -> tuple[GuidedLinear, torch.Tensor]:
    """A layer with an overlay, and the weight that it stands for."""
    generator = torch.Generator().manual_seed(bits)
    new = GuidedLinear(70, 9, bits, bias=True, lut_dtype=lut_dtype, outliers=outliers)
    new.weight.data = pack_codes(torch.randint(2**bits, (9, 70), generator=generator).to(torch.uint8), bits)
    new.lut.data = torch.randn(9, 2**bits, generator=generator).sort(dim=-1).values.to(lut_dtype)
    new.bias.data = torch.randn(9, generator=generator)
    if outliers:
        new.overlay_values.data = 5 * torch.randn(9, outliers, generator=generator).to(lut_dtype)
        places = torch.rand(9, 70, generator=generator).argsort(dim=-1)[:, :outliers].sort(dim=-1).values
        new.overlay_columns.data = places.short()
    return new, new.dequantize(torch.float32)


@pytest.mark.parametrize(
    ("inputs", "share", "count"),
    [(64, 0, 0), (64, 0.0045, 1), (576, 0.0045, 3), (4096, 0.0045, 19), (1, 0.1, 0), (2, 0.1, 1), (100, 0.1, 10)],
)
def test_so_many_of_every_row(inputs, share, count):
    assert lut_format.outliers_per_row(inputs, share) == count


@pytest.mark.parametrize(("inputs", "dtype"), [(2**15, torch.int16), (2**15 + 1, torch.int32)])
def test_columns_are_as_small_as_they_can_be(inputs, dtype):
    specs = lut_format.declare(4, inputs, 2, torch.float32, 3)
    assert specs["overlay_columns"] == lut_format.TensorSpec((4, 3), dtype)
    assert specs["overlay_values"] == lut_format.TensorSpec((4, 3), torch.float32)
    assert inputs - 1 <= torch.iinfo(dtype).max


@pytest.mark.parametrize("share", [-0.01, 0.11, float("nan"), float("inf"), True, "0.01", None])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(ConfigError, match=r"outliers = .* a number from 0 to 0\.1"):
        GuidedQuantConfig(outliers=share)


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_saved_and_loaded_it_says_the_same(architecture, tmp_path):
    model = quantized(architecture)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert {m.outliers for m in quantized_modules(loaded).values()} <= {2, 3, 8}
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
        assert loaded.state_dict()[name].dtype == tensor.dtype
    dense = loaded.dequantize()
    assert not quantized_modules(dense)
    torch.testing.assert_close(logits(dense), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", [name for name, method in SOLVERS.items() if method.statistics != "hessian"])
def test_outliers_come_back_as_they_were(method):
    """Where no others' errors are to be made good for, to one rounding of what the codeword lacks."""
    original, model = tiny_model(), quantized(method=method)
    for name, module in quantized_modules(model).items():
        places, values = module.overlay_columns.long(), module.overlay_values.float()
        weight = original.get_submodule(name).weight.gather(1, places)
        error = module.dequantize(torch.float32).gather(1, places) - weight
        assert (error.abs() <= 2**-11 * values.abs() + 2**-22 * weight.abs() + 2**-25).all()


@pytest.mark.parametrize("method", list(SOLVERS))
def test_every_method_gets_nearer_to_the_original(method):
    answers, distances = logits(tiny_model()), []
    for share in (0, 0.1):
        distances.append(float((logits(quantized(method=method, outliers=share)) - answers).square().sum()))
    assert distances[1] < distances[0]


@pytest.mark.parametrize(
    "changes", [{}, {"method": "rtn"}, {"bits": 2.5}, {"overrides": {"mlp": {"bits": 3}}}], ids=str
)
def test_the_plan_and_the_files_tell_the_same_size(changes, tmp_path):
    tiny_model().save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "model.safetensors").unlink()
    forecast = hf_guidedquant.plan(tmp_path / "dense", config(**changes), probe=False)
    model = quantized(**changes)
    model.save_pretrained(tmp_path / "model")
    found, report = inspect(tmp_path / "model", verify=True), model.quantization_report
    assert bits_per_weight(model) == found.bits_per_weight == report.bits_per_weight
    assert report.quantized_bytes == sum(parameter.nbytes for parameter in model.parameters())
    if changes.get("bits") != 2.5:  # what layers get of a mean is known from data only
        assert forecast.bits_per_weight == report.bits_per_weight
        assert forecast.quantized_bytes == report.quantized_bytes
    overlays = sum(t.nbytes for name, t in model.state_dict().items() if "overlay" in name)
    modules = quantized_modules(model).values()
    assert overlays == sum(m.out_features * m.outliers * 4 for m in modules) > 0
    assert "outliers a row" in forecast.table()
    assert "outliers a row" in found.table()
    assert "3.00% of the weights kept beside the codes" in (tmp_path / "model" / "README.md").read_text()


def test_models_without_outliers_are_as_they_were(tmp_path):
    model = quantized(outliers=0)
    names = {name for module in quantized_modules(model).values() for name in module.state_dict()}
    assert names == {"weight", "lut", "bias"}
    model.save_pretrained(tmp_path)
    # As older versions have written it.
    settings = json.loads((tmp_path / "config.json").read_text())
    del settings["quantization_config"]["outliers"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_weights_that_fp16_cannot_hold_have_overlays_in_fp32(tmp_path):
    model = tiny_model()
    name = "model.layers.0.mlp.up_proj"
    model.get_submodule(name).weight.data *= 1e7
    hf_guidedquant.quantize(model, config(method="rtn"))
    dtypes = {n: m.overlay_values.dtype for n, m in quantized_modules(model).items()}
    assert dtypes.pop(name) == torch.float32
    assert set(dtypes.values()) == {torch.float16}
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.get_submodule(name).overlay_values, model.get_submodule(name).overlay_values)


def test_casting_leaves_the_overlay_alone():
    module, dense = layer()
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.float32):
        module.to(dtype)
        assert (module.overlay_values.dtype, module.overlay_columns.dtype) == (torch.float16, torch.int16)
    assert torch.equal(module.dequantize(torch.float32), dense)


def test_dense_copies_hold_the_overlay():
    module, dense = layer()
    x = torch.randn(5, 70, generator=torch.Generator().manual_seed(0))
    module.cache_dequantized()
    assert torch.equal(module(x), torch.nn.functional.linear(x, dense, module.bias))


def test_a_whole_model_compiles_without_graph_breaks():
    torch._dynamo.reset()
    model = quantized()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(logits(compiled), logits(model))


def test_adapters_get_the_gradients_that_they_get_on_the_dense_model(tmp_path):
    peft = pytest.importorskip("peft")
    quantized().save_pretrained(tmp_path)
    gradients = []
    for dense in (False, True):
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
        model = model.dequantize() if dense else model
        settings = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        torch.manual_seed(0)
        model = peft.get_peft_model(model, settings)
        model(input_ids=BATCH, labels=BATCH).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if "lora_" in n})
    assert len(gradients[0]) == 8
    for name, gradient in gradients[0].items():
        largest = float(gradients[1][name].abs().max())
        assert largest > 0
        torch.testing.assert_close(gradient, gradients[1][name], rtol=0, atol=1e-4 * largest)


@pytest.mark.parametrize("method", ["rtn", "lnq"])
def test_statistics_serve_models_with_and_without(method, tmp_path):
    direct = quantized(method=method).state_dict()
    quantized(method="lnq", outliers=0, statistics=tmp_path)
    for name, tensor in quantized(method=method, statistics=tmp_path).state_dict().items():
        assert torch.equal(tensor, direct[name])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path):
    expected = saved(quantized(**FEW), tmp_path / "model")

    def run():
        os.replace = kill_at_the(3, "after")
        quantized(run_dir=tmp_path / "run", **FEW)

    in_a_killed_process(run)
    assert saved(quantized(run_dir=tmp_path / "run", **FEW), tmp_path / "model") == expected


def test_a_run_with_another_share_is_refused_by_name(tmp_path):
    quantized(run_dir=tmp_path, **FEW)
    with pytest.raises(FolderMismatchError, match=r"outliers was 0\.03, is 0\.04"):
        quantized(run_dir=tmp_path, outliers=0.04, **FEW)


def test_an_overlay_in_a_run_folder_that_no_run_has_written_is_done_again(tmp_path, monkeypatch):
    expected = quantized(run_dir=tmp_path, **FEW).state_dict()
    folder = LayerFolder(tmp_path, "run.json", "run_dir")
    folder.record()
    name = "model.layers.0.mlp.up_proj"
    tensors, facts = folder.load(name)
    for change in (
        {"overlay_columns": tensors["overlay_columns"] + 64},
        {"overlay_values": tensors["overlay_values"] * float("nan")},
        {"overlay_columns": tensors["overlay_columns"].int()},
    ):
        folder.save(name, tensors | change, facts)
        solved, solve = [], solving._solve_batch
        monkeypatch.setattr(solving, "_solve_batch", lambda *a, kept=solved, do=solve: kept.append(a) or do(*a))
        for key, tensor in quantized(run_dir=tmp_path, **FEW).state_dict().items():
            assert torch.equal(tensor, expected[key])
        assert len(solved) == 1
        monkeypatch.undo()


def test_layers_in_training_start_as_they_were_solved_and_keep_their_overlay():
    module, dense = layer()
    x = torch.randn(5, 70, generator=torch.Generator().manual_seed(0))
    for trained in (TrainedLinear(module), LatentLinear(module, dense + 0.01)):
        assert torch.equal(trained(x), module(x))
        back = trained.quantized()
        for name, tensor in module.state_dict().items():
            assert torch.equal(back.state_dict()[name], tensor), name


def test_codewords_of_outliers_get_their_gradients_too():
    """``∂ℓ/∂c`` of the product is that of the dense matrix, in which an outlier is its codeword plus a constant."""
    module, _ = layer()
    x = torch.randn(5, 70, generator=torch.Generator().manual_seed(0))
    codes = unpack_codes(module.weight, 70).long()
    codebook = module.lut.detach().double().requires_grad_()
    weight = codebook.gather(1, codes).scatter_add(1, module.overlay_columns.long(), module.overlay_values.double())
    (x.double() @ weight.mT + module.bias.double()).square().sum().backward()
    for trained in (TrainedLinear(module), LatentLinear(module, module.dequantize(torch.float32))):
        trained(x).square().sum().backward()
        # Some 5 x 70 products and sums in fp32, of numbers up to the largest.
        bound = 350 * torch.finfo(torch.float32).eps * float(codebook.grad.abs().max())
        assert float((trained.codebook.grad - codebook.grad).abs().max()) <= bound


@pytest.mark.parametrize(
    "training",
    [
        {"distill": {"epochs": 1}},
        {"reconstruct": {"epochs": 2, "batch_tokens": 64}},
        {"reconstruct": {"epochs": 2, "batch_tokens": 64, "codes": False}},
    ],
    ids=str,
)
def test_training_goes_around_the_overlay(training):
    solved, trained = quantized(), quantized(**training)
    after, moved = trained.state_dict(), 0
    for name, tensor in solved.state_dict().items():
        if "overlay" in name:
            assert torch.equal(after[name], tensor), name
        moved += not torch.equal(after[name], tensor)
    report = trained.quantization_report
    kept = report.distillation.best_epoch if report.distillation else any(b.kept for b in report.reconstruction.blocks)
    assert bool(kept) == bool(moved)


@pytest.mark.parametrize(
    "change",
    [
        lambda columns: columns.fill_(70),
        lambda columns: columns.fill_(-1),
        lambda columns: columns.flip(1),
        lambda columns: columns.fill_(3),
        lambda columns: columns.int() + 2**15,
        lambda columns: columns / 100,
    ],
)
def test_a_state_dict_with_columns_that_are_none_is_refused(change):
    module, dense = layer()
    state = module.state_dict()
    state["overlay_columns"] = change(state["overlay_columns"].clone())
    with pytest.raises(OverlayError, match="ascending order"):
        module.load_state_dict(state)
    assert torch.equal(module.dequantize(torch.float32), dense)


def test_the_command_line_takes_a_share(tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path)
    arguments = ["plan", str(tmp_path), "--no-probe", "--json", "--bits", "2", "--outliers"]
    told = []
    for share in ("0", "0.03"):
        assert main([*arguments, share]) == 0
        told.append(json.loads(capsys.readouterr().out))
    assert told[1]["quantized_bytes"] > told[0]["quantized_bytes"]
    assert {entry["outliers"] for entry in told[1]["layers"]} == {2, 3}
