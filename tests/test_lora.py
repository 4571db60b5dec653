"""LoRA adapters of peft on quantized layers: trained, saved, loaded, generated with; never merged into codes."""

import copy
import subprocess
import sys

import pytest
import torch
from conftest import tiny_model, token_rows
from test_docs import snippets
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import hf_guidedquant
from hf_guidedquant import GuidedLinear, GuidedQuantConfig
from hf_guidedquant.errors import AdapterError
from hf_guidedquant.nn import dequantize_model, guided_linear, quantized_modules

peft = pytest.importorskip("peft")

BATCH = torch.stack(token_rows(2, 12))
DTYPES = [torch.float32, torch.bfloat16]
TARGETS = [["q_proj", "v_proj"], "all-linear"]


def quantized(dtype=torch.float32, architecture="llama", **changes):
    return hf_guidedquant.quantize(
        tiny_model(architecture).to(dtype), GuidedQuantConfig(bits=3, method="rtn", **changes)
    )


def settings(targets="all-linear", **changes):
    return peft.LoraConfig(**{"r": 4, "target_modules": targets, "task_type": "CAUSAL_LM", **changes})


def randomize(model, seed=0):
    """Adapters that do something; peft lets them begin with B = 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def adapted(targets="all-linear", dtype=torch.float32, **changes):
    return randomize(peft.get_peft_model(quantized(dtype), settings(targets, **changes)))


def logits(model):
    with torch.no_grad():
        return model(input_ids=BATCH).logits


def base_tensors(model):
    """Everything but adapters, under the names that it has without them."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor.clone()
        for name, tensor in model.state_dict().items()
        if "lora_" not in name
    }


def train(model, steps=6):
    """Losses before each step and after the last."""
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=BATCH, labels=BATCH).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [*losses, float(model.eval()(input_ids=BATCH, labels=BATCH).loss.detach())]


def gradients(model, **inputs):
    model.zero_grad()
    model(**inputs, labels=BATCH).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("targets", TARGETS)
def test_training_lowers_the_loss_and_changes_adapters_only(targets, dtype):
    model = quantized(dtype)
    before, answers = base_tensors(model), logits(model)
    names = [name for name in quantized_modules(model) if targets == "all-linear" or name.endswith(tuple(targets))]
    model = peft.get_peft_model(model, settings(targets))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    expected = {f"base_model.model.{name}.lora_{part}.default.weight" for name in names for part in "AB"}
    assert trained == expected
    assert torch.equal(logits(model), answers)  # B begins as zero
    losses = train(model)
    assert losses[-1] < losses[0] - 0.1
    assert_same(base_tensors(model), before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_products_and_gradients_of_a_layer(bias, dtype):
    targets = ["gate_proj"] if bias else ["o_proj"]
    block = adapted(targets, dtype).base_model.model.model.layers[0]
    layer = block.mlp.gate_proj if bias else block.self_attn.o_proj
    out_features, in_features = layer.out_features, layer.in_features
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, in_features, generator=generator).to(dtype).requires_grad_()
    G = torch.randn(5, out_features, generator=generator).to(dtype)
    y = layer(x)
    y.backward(G)

    # The truth in float64; `size` sums absolute values, so that eps * size bounds the error of a rounding on the way.
    scale = layer.scaling["default"]
    A, B = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    base = layer.base_layer

    def truth(of):
        X, W, a, b, g = (of(t.detach().double()) for t in (x, base.dequantize(dtype), A, B, G))
        return {
            "y": X @ W.mT + (of(base.bias.double()) if bias else 0) + scale * (X @ a.mT) @ b.mT,
            "x": g @ W + scale * (g @ b) @ a,
            "A": scale * (g @ b).mT @ X,
            "B": scale * g.mT @ (X @ a.mT),
        }

    found = {"y": y, "x": x.grad, "A": A.grad, "B": B.grad}
    expected, size = truth(lambda t: t), truth(torch.abs)
    # Sums in fp32 round once a term. Adding the bias and the adapter, or two gradients, rounds to dtype thrice at most.
    terms = in_features + out_features + 5 + 4
    for name, tensor in found.items():
        assert tensor.dtype == (dtype if name in "xy" else torch.float32)
        bound = terms * torch.finfo(torch.float32).eps * size[name]
        if name in "xy":
            bound = bound + 3 * torch.finfo(dtype).eps * size[name]
        assert bool(((tensor.double() - expected[name]).abs() <= bound).all()), name


def test_gradients_of_a_model_are_those_of_a_dense_one():
    model = adapted().double()
    dense = copy.deepcopy(model)
    dequantize_model(dense, torch.float64)
    assert not quantized_modules(dense)
    found = []
    for each in (model, dense):
        embeddings = each.get_input_embeddings()(BATCH).detach().requires_grad_()
        found.append({**gradients(each, inputs_embeds=embeddings), "inputs": embeddings.grad})
    assert len(found[0]) == 2 * 14 + 1
    for name, expected in found[1].items():
        # Of float64's 52 bits a model of two blocks loses a few; half of them are enough to tell formulas apart.
        atol = 2**-26 * float(expected.abs().max())
        assert float(expected.abs().max()) > 0
        torch.testing.assert_close(found[0][name], expected, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("targets", TARGETS)
def test_adapters_are_saved_and_loaded_on_a_loaded_base(targets, dtype, tmp_path):
    quantized(dtype).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    without = logits(base)
    model = peft.get_peft_model(base, settings(targets))
    train(model, steps=2)
    expected = logits(model)
    assert not torch.equal(expected, without)
    options = {"input_ids": BATCH, "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    tokens = model.generate(**options)
    model.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(logits(again), expected)
    assert torch.equal(again.generate(**options), tokens)
    with again.disable_adapter():
        assert torch.equal(logits(again), without)
    assert torch.equal(logits(again), expected)
    assert torch.equal(logits(again.unload()), without)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")), expected)


def test_adapters_of_transformers_itself(tmp_path):
    quantized().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    without = logits(model)
    model.add_adapter(settings(["q_proj", "down_proj"]), adapter_name="first")
    losses = train(model, steps=4)
    assert losses[-1] < losses[0]
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    # The adapter is no quantized model, so nothing is said as if it were.
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files
    assert not files & {"README.md", "guidedquant_report.json", "model.safetensors"}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again.load_adapter(str(tmp_path / "adapter"), adapter_name="first")
    assert torch.equal(logits(again), expected)
    again.add_adapter(settings(), adapter_name="second")
    randomize(again, seed=1)
    again.set_adapter("second")
    # Adapters lie beside each other, not on top of each other.
    assert sum(parameter.requires_grad for parameter in again.parameters()) == 2 * 14
    assert not any("base_layer" in name for name in again.peft_config["second"].target_modules)
    assert not torch.equal(logits(again), expected)
    again.disable_adapters()
    assert torch.equal(logits(again), without)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(reentrant):
    model = quantized(torch.bfloat16)
    before = base_tensors(model)
    expected = gradients(randomize(peft.get_peft_model(copy.deepcopy(model), settings())).train(), input_ids=BATCH)
    model = peft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert model.is_gradient_checkpointing
    assert_same(base_tensors(model), before)
    model = randomize(peft.get_peft_model(model, settings())).train()
    assert_same(gradients(model, input_ids=BATCH), expected)


def test_fused_layers_stay_fused_when_some_have_adapters(monkeypatch):
    monkeypatch.setattr(guided_linear, "backend_for", lambda device: "tensor_core")
    model = quantized().to("cpu")
    without = logits(model)
    model = peft.get_peft_model(model, settings(["q_proj", "up_proj"]))
    fusions = {module.fusion for module in quantized_modules(model).values() if module.fusion is not None}
    assert len(fusions) == 4
    assert torch.equal(logits(model), without)
    randomize(model)
    together = logits(model)
    assert all(fusion.ready and fusion._latest is None for fusion in fusions)  # every share was fetched
    hf_guidedquant.unfuse(model)
    assert torch.equal(logits(model), together)
    assert not torch.equal(together, without)


@pytest.mark.parametrize("merge", ["merge_and_unload", "merge_adapter"])
def test_merging_into_codes_is_refused_before_anything_is_merged(merge):
    # The embeddings are dense, and come first.
    model = adapted(["embed_tokens", "q_proj"])
    before, answers = {k: t.clone() for k, t in model.state_dict().items()}, logits(model)
    with pytest.raises(AdapterError, match=r"model\.dequantize\(\)"):
        getattr(model, merge)()
    with pytest.raises(AdapterError, match=r"model\.dequantize\(\)"):
        model.base_model.model.model.layers[0].self_attn.q_proj.merge()
    assert_same(model.state_dict(), before)
    assert torch.equal(logits(model), answers)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_adapters_of_a_dequantized_model_can_be_merged(architecture):
    config = settings(fan_in_fan_out=architecture == "gpt2")
    model = randomize(peft.get_peft_model(quantized(architecture=architecture), config)).double()
    expected = logits(model)
    model.dequantize()
    merged = model.merge_and_unload()
    assert not any(isinstance(module, GuidedLinear | peft.tuners.lora.LoraLayer) for module in merged.modules())
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=2**-26 * float(expected.abs().max()))


@pytest.mark.parametrize(
    "changes",
    [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"init_lora_weights": "mica"}, {"use_dora": True}],
    ids=lambda changes: "-".join(map(str, *changes.items())),
)
def test_what_needs_dense_weights_is_refused_and_changes_nothing(changes):
    model = quantized()
    before, modules = base_tensors(model), len(list(model.modules()))
    with pytest.raises(AdapterError, match=next(iter(changes))):
        peft.get_peft_model(model, settings(**changes))
    assert len(list(model.modules())) == modules
    assert_same(base_tensors(model), before)


@pytest.mark.parametrize("changes", [{"use_rslora": True}, {"init_lora_weights": "gaussian"}, {"lora_dropout": 0.5}])
def test_other_kinds_of_lora_are_trained(changes):
    model = peft.get_peft_model(quantized(), settings(**changes))
    losses = train(model, steps=10)
    assert losses[-1] < losses[0] - 0.1


def test_dense_models_get_what_peft_gives_them():
    quantized()
    model = peft.get_peft_model(tiny_model(), settings(use_dora=True))
    layers = [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    assert {type(layer) for layer in layers} == {peft.tuners.lora.Linear}
    assert len(layers) == 14
    model.merge_and_unload()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("own", [True, False], ids=["PeftModel", "add_adapter"])
def test_the_trainer_trains_adapters(own, dtype, tmp_path):
    model = quantized(dtype)
    before = base_tensors(model)
    if own:
        model = peft.get_peft_model(model, settings())
    else:
        model.add_adapter(settings())
    options = {"learning_rate": 1e-2, "max_steps": 4, "per_device_train_batch_size": 2, "use_cpu": True, "seed": 0}
    options |= {"report_to": [], "save_strategy": "no", "logging_steps": 1, "gradient_checkpointing": True}
    arguments = TrainingArguments(tmp_path, bf16=dtype == torch.bfloat16, **options)
    rows = [{"input_ids": row, "labels": row} for row in BATCH]
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert_same(base_tensors(model), before)


def test_the_recipe_trains_and_loads_an_adapter(tmp_path, monkeypatch):
    snippet = next(snippet for snippet in snippets("docs/recipes.md") if "get_peft_model" in snippet)
    monkeypatch.chdir(tmp_path)
    quantized().save_pretrained("SmolLM2-3bit")
    names = {}
    exec(snippet, names)
    assert isinstance(names["model"], peft.PeftModel)
    assert len(list((tmp_path / "my-adapter").glob("*.safetensors"))) == 1


def test_peft_is_imported_with_the_first_quantized_model_if_it_can_be(monkeypatch):
    code = "import sys, hf_guidedquant; sys.exit('peft' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    quantized()
    monkeypatch.delattr(hf_guidedquant, "lora")
    monkeypatch.delitem(sys.modules, "hf_guidedquant.lora")
    monkeypatch.setitem(sys.modules, "peft", None)
    assert logits(quantized()).isfinite().all()
