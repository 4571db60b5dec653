"""Quantize real model classes, save, reload, generate: what a user does."""

import copy
import json
import warnings

import pytest
import torch
from conftest import ARCHITECTURES, memory_for, tiny_model, token_rows
from transformers import AutoModelForCausalLM

import hf_guidedquant
from hf_guidedquant import GuidedLinear, GuidedQuantConfig
from hf_guidedquant.errors import (
    AlreadyQuantizedError,
    ModelError,
    NoLinearLayersError,
    NonFiniteWeightError,
    OutputFolderError,
    TokenizerMissingError,
)
from hf_guidedquant.solvers import SOLVERS

PROMPT = torch.arange(2, 10)[None]


def config(**changes):
    return GuidedQuantConfig(**{"bits": 2, "dataset": token_rows(), "num_groups": 3, **changes})


def logits(model, ids=PROMPT):
    with torch.no_grad():
        return model(input_ids=ids.to(model.device)).logits


def generate(model, **options):
    return model.generate(PROMPT, max_new_tokens=12, do_sample=False, **options)


def weights_file(folder):
    return (folder / "model.safetensors").read_bytes()


def test_quantize_save_reload_generate(any_model, tmp_path):
    any_model.save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config())
    layers = hf_guidedquant.nn.quantized_modules(model)
    assert len(layers) == {"GPT2LMHeadModel": 8}.get(type(model).__name__, 14)
    assert not torch.equal(logits(model), logits(any_model))
    model.save_pretrained(tmp_path / "quantized")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    assert torch.equal(logits(again), logits(model))
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    dynamic = generate(again)
    assert torch.equal(generate(again, cache_implementation="static"), dynamic)
    assert torch.equal(generate(model), dynamic)


def test_in_memory_and_from_pretrained_give_the_same_bytes(llama, tmp_path):
    llama.save_pretrained(tmp_path / "dense")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config())
    loaded.save_pretrained(tmp_path / "loaded")
    settings = config()
    hf_guidedquant.quantize(llama, settings).save_pretrained(tmp_path / "in_memory")
    assert weights_file(tmp_path / "loaded") == weights_file(tmp_path / "in_memory")
    saved = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("loaded", "in_memory")]
    assert saved[0]["quantization_config"] == saved[1]["quantization_config"]
    assert settings.modules == {}  # the user's object is not changed


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    for name in ("first", "second"):
        hf_guidedquant.quantize(tiny_model(), config()).save_pretrained(tmp_path / name)
    assert weights_file(tmp_path / "first") == weights_file(tmp_path / "second")
    assert (tmp_path / "first" / "config.json").read_text() == (tmp_path / "second" / "config.json").read_text()


@pytest.mark.parametrize("method", list(SOLVERS))
@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_every_method_and_width_survives_a_reload(method, guided, bits, tmp_path):
    model = hf_guidedquant.quantize(tiny_model(), config(method=method, guided=guided, bits=bits, lnq_iterations=1))
    model.save_pretrained(tmp_path / "m")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "m")), logits(model))


def test_more_bits_are_closer_to_the_original(llama):
    original = logits(llama, torch.stack(token_rows()))
    distances = []
    for bits in (2, 3, 4, 8):
        model = hf_guidedquant.quantize(copy.deepcopy(llama), config(bits=bits))
        distances.append((logits(model, torch.stack(token_rows())) - original).square().mean().item())
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-3 * distances[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype, tmp_path):
    tiny_model().save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=dtype, quantization_config=config())
    assert logits(model).dtype == dtype
    model.save_pretrained(tmp_path / "m")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert again.dtype == dtype
    assert all(layer.lut.dtype == torch.float16 for layer in hf_guidedquant.nn.quantized_modules(again).values())
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("device_map", [None, "auto", "cpu", {"": "cpu"}])
def test_device_maps(device_map, tmp_path):
    tiny_model().save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", device_map=device_map, quantization_config=config()
    )
    model.save_pretrained(tmp_path / "m")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m", device_map=device_map)
    assert torch.equal(logits(again), logits(model))


def test_accelerate_hooks_move_to_the_new_layer():
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = tiny_model()
    old = model.model.layers[0].mlp.up_proj
    hook = AlignDevicesHook(execution_device="cpu")
    add_hook_to_module(old, hook)
    hf_guidedquant.quantize(model, config())
    new = model.model.layers[0].mlp.up_proj
    assert isinstance(new, GuidedLinear)
    assert new._hf_hook is hook
    assert not hasattr(old, "_hf_hook")
    assert logits(model).isfinite().all()


def test_compiles_without_graph_breaks(llama):
    model = hf_guidedquant.quantize(llama, config())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled), logits(model), rtol=0, atol=0)


@pytest.mark.parametrize("guided", [True, False])
def test_little_memory_does_not_change_the_result(guided, caplog):
    settings = config(guided=guided)
    whole = hf_guidedquant.quantize(tiny_model(blocks=4), settings)
    caplog.clear()
    settings.max_memory = memory_for(tiny_model(blocks=4), settings, blocks=2)
    divided = hf_guidedquant.quantize(tiny_model(blocks=4), settings)
    assert "in 2 segments" in caplog.text
    for name, tensor in whole.state_dict().items():
        assert torch.equal(divided.state_dict()[name], tensor), name


def test_too_little_memory_is_refused_before_any_work(llama):
    settings = config()
    settings.max_memory = 0.99 * memory_for(llama, settings)
    with pytest.raises(ModelError, match=r"Quantizing model\.layers\.1 takes .* Raise max_memory"):
        hf_guidedquant.quantize(llama, settings)
    assert not hf_guidedquant.nn.quantized_modules(llama)


def test_overrides_and_exclusions():
    model = hf_guidedquant.quantize(
        tiny_model(),
        config(
            overrides={"*.down_proj": {"bits": 4}, "layers.1.mlp": {"method": "rtn"}}, modules_to_not_convert=["k_proj"]
        ),
    )
    layers = hf_guidedquant.nn.quantized_modules(model)
    assert {layer.bits for name, layer in layers.items() if name.endswith("down_proj")} == {4}
    assert not any(name.endswith("k_proj") or "lm_head" in name for name in layers)
    methods = {entry.plan.name: entry.plan.method for entry in model.quantization_report.layers}
    assert methods["model.layers.1.mlp.up_proj"] == "rtn"
    assert methods["model.layers.0.mlp.up_proj"] == "lnq"


def test_casting_keeps_codes_and_codebooks(llama):
    model = hf_guidedquant.quantize(llama, config())
    layer = model.model.layers[0].mlp.up_proj
    before = layer.weight.clone(), layer.lut.clone()
    for cast in (layer.half, layer.bfloat16, layer.double, lambda: layer.to(torch.float32), lambda: layer.to("cpu")):
        cast()
        assert torch.equal(layer.weight, before[0]) and layer.weight.dtype == torch.int32
        assert torch.equal(layer.lut, before[1]) and layer.lut.dtype == torch.float16


def test_dense_cache_gives_the_same_output_and_is_not_saved(llama, tmp_path):
    model = hf_guidedquant.quantize(llama, config(cache_dequantized=True))
    cached = logits(model)
    assert model.model.layers[0].mlp.up_proj._dense is not None
    model.save_pretrained(tmp_path / "m")
    hf_guidedquant.cache_dequantized(model, False)
    assert model.model.layers[0].mlp.up_proj._dense is None
    assert torch.equal(logits(model), cached)
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", quantization_config=GuidedQuantConfig(cache_dequantized=True)
    )
    assert again.model.layers[0].mlp.up_proj._caching
    assert not AutoModelForCausalLM.from_pretrained(tmp_path / "m").model.layers[0].mlp.up_proj._caching


def test_a_dense_cache_is_of_the_weights_as_they_are(llama):
    model = hf_guidedquant.quantize(llama, config(cache_dequantized=True))
    other = hf_guidedquant.quantize(tiny_model(), config(seed=1, guided=False))
    logits(model)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(logits(model), logits(other))
    layer = model.model.layers[0].mlp.down_proj
    x = torch.randn(3, 96)
    with torch.no_grad():
        before = layer(x) - layer.bias
        layer.lut.mul_(2)
        torch.testing.assert_close(layer(x) - layer.bias, 2 * before)
        doubled = torch.func.functional_call(layer, {"lut": 2 * layer.lut}, (x,))
        torch.testing.assert_close(doubled - layer.bias, 4 * before)
        torch.testing.assert_close(layer(x) - layer.bias, 2 * before)
    layer.cache_dequantized()
    with torch.inference_mode():
        torch.compile(layer, backend="aot_eager")(x)
    assert layer(x.requires_grad_()).requires_grad


def test_gradients_reach_the_input_as_through_the_dense_layer(llama):
    model = hf_guidedquant.quantize(llama, config())
    layer = model.model.layers[0].mlp.up_proj.double()
    x = torch.randn(3, 5, 64, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(3, 5, 96, dtype=torch.float64)
    (grad,) = torch.autograd.grad(layer(x), x, upstream)
    torch.testing.assert_close(grad, upstream @ layer.dequantize(torch.float64))
    assert not any(parameter.requires_grad for parameter in layer.parameters())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_dequantize_gives_an_ordinary_model(architecture, tmp_path):
    original = tiny_model(architecture)
    classes = {name: type(module) for name, module in original.named_modules()}
    model = hf_guidedquant.quantize(original, config())
    expected = logits(model)
    model.dequantize()
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert all(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(logits(model), expected)
    model.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), logits(model))


def test_what_is_offloaded_cannot_be_made_dense(llama, tmp_path):
    hf_guidedquant.save(hf_guidedquant.quantize(llama, config()), tmp_path / "m")
    places = dict.fromkeys(["lm_head", *(f"model.{name}" for name, _ in llama.model.named_children())], "cpu")
    del places["model.layers"]
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", device_map=places, offload_folder=tmp_path / "o")
    before = logits(model)
    with pytest.raises(ModelError, match=r"model\.layers\.1.* is offloaded"):
        model.dequantize()
    assert torch.equal(logits(model), before)


def test_large_weights_get_fp32_codebooks(llama, tmp_path):
    llama.model.layers[0].mlp.up_proj.weight.data *= 1e7
    model = hf_guidedquant.quantize(llama, config())
    assert model.model.layers[0].mlp.up_proj.lut.dtype == torch.float32
    model.save_pretrained(tmp_path / "m")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert torch.equal(logits(again), logits(model))


def test_report_and_card_lie_beside_the_model(llama, tmp_path):
    model = hf_guidedquant.quantize(llama, config())
    hf_guidedquant.save(model, tmp_path / "m")
    report = json.loads((tmp_path / "m" / "guidedquant_report.json").read_text())
    assert [layer["name"] for layer in report["layers"]] == list(hf_guidedquant.nn.quantized_modules(model))
    for layer in report["layers"]:
        assert 0 < layer["objectives"]["lnq"] <= layer["objectives"]["kmeans"] < 1
    saved = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert report["quantized_bytes"] == saved
    assert "import hf_guidedquant" in (tmp_path / "m" / "README.md").read_text()
    for line in ("up_proj", "14 layers at", "time: data"):
        assert line in model.quantization_report.table()
    with pytest.raises(OutputFolderError, match="not an empty folder"):
        hf_guidedquant.save(model, tmp_path / "m")


@pytest.mark.parametrize("outliers", [0.0, 0.02])
def test_outputs_bettered_together_are_saved_and_reported(llama, outliers, tmp_path):
    dense = copy.deepcopy(llama)
    changes = {"output_curvature": True, "outliers": outliers, "overrides": {"o_proj": {"method": "squeezellm"}}}
    model = hf_guidedquant.quantize(llama, config(**changes))
    plain = hf_guidedquant.quantize(dense, config(**{**changes, "output_curvature": False}))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert again.config.quantization_config.output_curvature is True
    reports = (each.quantization_report.layers for each in (model, plain))
    for one, other in zip(*reports, strict=True):
        if one.plan.name.endswith("o_proj"):
            assert (one.joint_left, one.objectives) == (None, other.objectives)
            continue
        assert 0 < one.joint_left < 1 and other.joint_left is None
        assert [*one.objectives][:3] == ["kmeans", "lnq", "curvature"]
        assert one.objectives["lnq"] == other.objectives["lnq"]
    assert "output curvature: the joint error" in model.quantization_report.table()


def test_a_users_readme_is_kept(llama, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    hf_guidedquant.quantize(llama, config()).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_plan_works_on_meta_and_lists_everything(llama):
    with torch.device("meta"):
        empty = type(llama)(llama.config)
    planned = hf_guidedquant.plan(empty, config())
    assert len(planned.layers) == 14
    assert set(planned.skipped.values()) == {"embedding", "output head"}
    hf_guidedquant.quantize(llama, config())
    assert planned.quantized_bytes == sum(tensor.nbytes for tensor in llama.state_dict().values())


def test_shared_weights_are_left_alone():
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    planned = hf_guidedquant.plan(model, config())
    assert sum("is shared with" in reason for reason in planned.skipped.values()) == 2


def test_nan_weights_are_named_and_nothing_changes(llama):
    llama.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    with pytest.raises(NonFiniteWeightError, match=r"model\.layers\.1\.mlp\.up_proj"):
        hf_guidedquant.quantize(llama, config())
    assert not hf_guidedquant.nn.quantized_modules(llama)


def test_a_model_without_linears_is_refused(llama):
    with pytest.raises(NoLinearLayersError, match="modules_to_not_convert"):
        hf_guidedquant.quantize(llama, config(modules_to_not_convert=["*"]))


def test_quantizing_twice_is_refused(llama):
    model = hf_guidedquant.quantize(llama, config())
    with pytest.raises(AlreadyQuantizedError):
        hf_guidedquant.quantize(model, config())


def test_texts_without_a_tokenizer_beside_the_model(llama, tmp_path):
    llama.save_pretrained(tmp_path / "dense")
    with pytest.raises(TokenizerMissingError, match="Pass GuidedQuantConfig"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config(dataset=["some text"] * 9))


def test_inference_mode_is_refused_and_no_grad_is_not(llama, tmp_path):
    llama.save_pretrained(tmp_path / "dense")
    with torch.inference_mode(), pytest.raises(ModelError, match="inference_mode"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config())
    with torch.no_grad():
        AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config())


def test_offloaded_device_maps_are_refused(llama, tmp_path):
    llama.save_pretrained(tmp_path / "dense")
    device_map = {"model": "cpu", "lm_head": "disk"}
    with pytest.raises(ModelError, match='device_map="cpu"'):
        AutoModelForCausalLM.from_pretrained(tmp_path / "dense", device_map=device_map, quantization_config=config())


def test_the_callers_settings_and_random_state_are_untouched(llama):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    hf_guidedquant.quantize(llama, config())
    assert torch.equal(torch.rand(1), expected)
    assert not torch.are_deterministic_algorithms_enabled()


def test_no_warnings_in_a_normal_run(llama, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hf_guidedquant.save(hf_guidedquant.quantize(llama, config()), tmp_path / "m")


def test_architectures_of_the_fixture_cover_ties_biases_and_transposed_weights():
    models = {name: tiny_model(name) for name in ARCHITECTURES}
    assert models["llama-tied"].lm_head.weight is models["llama-tied"].model.embed_tokens.weight
    assert models["llama"].model.layers[0].mlp.up_proj.bias is not None
    assert type(models["gpt2"].transformer.h[0].mlp.c_fc).__name__ == "Conv1D"
