"""Mixtures of experts: each expert is quantized with the tokens that are routed to it."""

import copy
import json
import logging
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import VOCABULARY, assert_the_cpu_loads_the_same, memory_for, quantized_and_loaded, token_rows
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

import hf_guidedquant
from hf_guidedquant import GuidedQuantConfig
from hf_guidedquant.calibration import LayerStatistics, lend, outline
from hf_guidedquant.calibration.collector import end_loss
from hf_guidedquant.calibration.relay import Relay
from hf_guidedquant.errors import AdapterError, CheckpointError, NonFiniteWeightError
from hf_guidedquant.experts import Experts, fused_experts, unfuse, unfused, unfused_experts
from hf_guidedquant.inspection import inspect
from hf_guidedquant.nn import quantized_modules
from hf_guidedquant.solvers import SOLVERS, SolverSpec
from hf_guidedquant.solvers.hessian import condition

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "num_experts_per_tok": 2,
}


def _mixtral(blocks):
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_hidden_layers=blocks, num_local_experts=4))


def _qwen3(blocks):
    kind = {"num_experts": 5, "moe_intermediate_size": 24}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **kind, num_hidden_layers=blocks))


def _qwen2(blocks):
    """With an expert that all tokens share, and a gate of its own."""
    kind = {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**SIZES, **kind, num_hidden_layers=blocks))


def _gpt_oss(blocks):
    """Transposed, with biases, gate and up interleaved; no token is routed to the first expert."""
    rope = {"rope_type": "default", "rope_theta": 1e4}
    config = GptOssConfig(**SIZES, num_hidden_layers=blocks, num_local_experts=4, rope_parameters=rope)
    model = GptOssForCausalLM(config)
    for block in model.model.layers:
        for name, parameter in block.mlp.experts.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
        block.mlp.router.bias.data[0] = -1e4
    return model


MIXTURES = {"mixtral": _mixtral, "qwen3": _qwen3, "qwen2": _qwen2, "gpt-oss": _gpt_oss}
UNROUTED = "model.layers.0.mlp.experts.0."


def mixture(kind="qwen3", blocks=1):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MIXTURES[kind](blocks).eval()


def config(**changes):
    return GuidedQuantConfig(**{"bits": 3, "method": "squeezellm", "dataset": token_rows(), "device": "cpu", **changes})


def logits(model):
    with torch.no_grad():
        return model(torch.stack(token_rows(2, seed=1))).logits


@pytest.fixture(params=list(MIXTURES))
def any_mixture(request):
    return mixture(request.param)


FUSED = {"gated": MixtralExperts, "transposed-biased-interleaved": GptOssExperts, "ungated": NemotronHExperts}


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("kind", list(FUSED))
def test_linear_experts_give_what_fused_ones_give(kind, count):
    names = ("num_local_experts", "n_routed_experts")
    sizes = {"hidden_size": 24, "intermediate_size": 40, "moe_intermediate_size": 40, "moe_latent_size": None}
    others = {"hidden_act": "silu", "mlp_hidden_act": "relu2", "swiglu_alpha": 1.7, "swiglu_limit": 7.0}
    settings = SimpleNamespace(**dict.fromkeys(names, count), **sizes, **others, _experts_implementation="eager")
    fused = FUSED[kind](settings)
    generator = torch.Generator().manual_seed(0)
    for parameter in fused.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    k = min(2, count)
    index = torch.stack([torch.randperm(count, generator=generator)[:k] for _ in range(99)])
    x, weights = torch.randn(99, 24, generator=generator), torch.rand(99, k, generator=generator)
    assert set(index.flatten().tolist()) == set(range(count))
    experts = Experts(fused)
    torch.testing.assert_close(experts(x, index, weights), fused(x, index, weights), atol=1e-5, rtol=1e-5)
    # A choice that is none of them gives what a weight of zero does.
    nothing = torch.rand(99, k, generator=generator) < 0.3
    found = experts(x, index.masked_fill(nothing, count), weights)
    torch.testing.assert_close(found, experts(x, index, weights.masked_fill(nothing, 0.0)), atol=1e-6, rtol=1e-5)


def test_a_model_of_linear_experts_gives_what_it_gave(any_mixture):
    expected = logits(any_mixture)
    assert unfuse(any_mixture).keys() == unfused_experts(any_mixture).keys() != set()
    torch.testing.assert_close(logits(any_mixture), expected, atol=1e-5, rtol=1e-5)


def test_linear_experts_take_no_memory_of_their_own():
    model = mixture()
    places = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    unfuse(model)
    assert {parameter.untyped_storage().data_ptr() for parameter in model.parameters()} == places


def _statistics(model, guided):
    """Of all experts' layers, by a pass over the rows."""
    layers = {
        f"{name}.{part}": experts.get_submodule(part)
        for name, experts in unfused_experts(model).items()
        for part, layer in experts.named_modules()
        if isinstance(layer, torch.nn.Linear)
    }
    found = {
        n: LayerStatistics.empty((1, x.in_features, x.in_features), torch.device("cpu")) for n, x in layers.items()
    }
    drawn = outline(model, 33, guided, lambda device: device)
    assert len(drawn.blocks) == 1
    assert drawn.reads.keys() >= layers.keys()
    Relay(model, drawn, [(0, 1)], token_rows(), guided=guided).collect(0, found)
    return layers, found


@pytest.mark.parametrize("guided", [True, False])
def test_an_experts_hessian_is_of_its_own_tokens(any_mixture, guided):
    unfuse(any_mixture)
    layers, found = _statistics(any_mixture, guided)
    expected = {name: torch.zeros(x.in_features, x.in_features, dtype=torch.float64) for name, x in layers.items()}
    tokens = dict.fromkeys(layers, 0)
    model = any_mixture.double()
    chosen = []
    experts = next(iter(unfused_experts(model).values()))
    experts.register_forward_pre_hook(lambda module, args: chosen.append(args[1]))
    seen = {}

    def keep(name, module, args, output):
        output.retain_grad()
        seen[name] = args[0].detach(), output

    for name, layer in layers.items():
        layer.register_forward_hook(partial(keep, name))
    for row in token_rows():
        seen.clear()
        end_loss(model(row[None]), row).backward()
        for name, (x, output) in seen.items():
            weights = output.grad.square().mean(dim=-1, keepdim=True) if guided else 1.0
            expected[name] += (x * weights).mT @ x
            tokens[name] += len(x)
    counts = torch.bincount(torch.cat([index.flatten() for index in chosen]), minlength=experts.num_experts)
    for name, statistics in found.items():
        number = int(name.split(".")[-2])
        assert int(statistics.tokens) == tokens[name] == counts[number], name
        scale = expected[name].abs().max().item() or 1.0
        torch.testing.assert_close(
            statistics.hessian[0].double(), expected[name], atol=1e-4 * scale, rtol=1e-3, msg=name
        )


def test_experts_with_few_tokens_borrow_what_they_lack():
    model = mixture()
    unfuse(model)
    experts = next(iter(unfused_experts(model)))
    generator = torch.Generator().manual_seed(0)
    tokens = [0, 3, 200, 31, 100]
    found, before = {}, {}
    for part, inputs in (("gate_up_proj", 32), ("down_proj", 24)):
        for number, count in enumerate(tokens):
            x = torch.randn(count, inputs, generator=generator)
            statistics = LayerStatistics.empty((1, inputs, inputs), torch.device("cpu"))
            statistics.add(x, None, torch.tensor(True))
            statistics.add_up(SimpleNamespace(add_up=lambda tensor: None))
            found[f"{experts}.{number}.{part}"] = statistics
    before = {name: statistics.hessian.double().clone() for name, statistics in found.items()}
    lend(model, found)
    for part, inputs in (("gate_up_proj", 32), ("down_proj", 24)):
        mean = sum(before[f"{experts}.{number}.{part}"] for number in range(5)) / sum(tokens)
        if part == "down_proj":
            mean = torch.eye(inputs, dtype=torch.float64)[None] * mean.diagonal(dim1=-2, dim2=-1).mean()
        for number, count in enumerate(tokens):
            statistics = found[f"{experts}.{number}.{part}"]
            missing = max(0, inputs - count)
            assert statistics.borrowed == missing
            expected = before[f"{experts}.{number}.{part}"] + missing * mean
            torch.testing.assert_close(statistics.hessian.double(), expected, atol=1e-4, rtol=1e-5)
            assert torch.linalg.eigvalsh(statistics.hessian)[0, 0] > 0


def test_curvatures_are_borrowed_too_the_other_way_round():
    """Hidden units are an expert's own outputs on the way up, and all experts write one space on the way down."""
    model = mixture()
    unfuse(model)
    experts = next(iter(unfused_experts(model)))
    generator = torch.Generator().manual_seed(0)
    tokens, found, before = [0, 3, 200, 31, 100], {}, {}
    shapes = {"gate_up_proj": (32, 48), "down_proj": (24, 32)}
    for part, (inputs, outputs) in shapes.items():
        for number, count in enumerate(tokens):
            x, grad = (torch.randn(count, size, generator=generator) for size in (inputs, outputs))
            statistics = LayerStatistics.empty(
                (1, inputs, inputs), torch.device("cpu"), curvature_shape=(outputs, outputs)
            )
            statistics.add(x, torch.ones(count, 1), torch.tensor(True), grad)
            found[f"{experts}.{number}.{part}"] = statistics
            before[f"{experts}.{number}.{part}"] = statistics.curvature.double().clone()
    lend(model, found)
    for part, (inputs, outputs) in shapes.items():
        mean = sum(before[f"{experts}.{number}.{part}"] for number in range(5)) / sum(tokens)
        if part == "gate_up_proj":
            mean = torch.eye(outputs, dtype=torch.float64) * mean.diagonal().mean()
        for number, count in enumerate(tokens):
            name = f"{experts}.{number}.{part}"
            expected = before[name] + max(0, inputs - count) * mean
            torch.testing.assert_close(found[name].curvature.double(), expected, atol=1e-4, rtol=1e-5)


def test_an_expert_without_tokens_knows_the_size_of_its_gradients_only():
    model = hf_guidedquant.quantize(mixture("gpt-oss"), config(method="lnq", output_curvature=True))
    layers = [layer for layer in model.quantization_report.layers if ".experts." in layer.plan.name]
    assert len(layers) == 8 and all(0 < layer.joint_left <= 1 for layer in layers)


def test_borrowed_diagonals_are_the_diagonals_of_what_hessians_borrow():
    model = mixture()
    unfuse(model)
    full, diagonal = {}, {}
    for number in range(5):
        for part, inputs in (("gate_up_proj", 32), ("down_proj", 24)):
            name = f"model.layers.0.mlp.experts.{number}.{part}"
            x = torch.randn(8 * number, inputs, generator=torch.Generator().manual_seed(number))
            for found, shape in ((full, (1, inputs, inputs)), (diagonal, (1, inputs))):
                found[name] = LayerStatistics.empty(shape, torch.device("cpu"))
                found[name].add(x, None, torch.tensor(True))
    lend(model, full)
    lend(model, diagonal)
    for name, statistics in full.items():
        assert statistics.borrowed == diagonal[name].borrowed
        torch.testing.assert_close(statistics.hessian.diagonal(dim1=-2, dim2=-1), diagonal[name].hessian)


@pytest.mark.parametrize("part", ["gate_up_proj", "down_proj"])
def test_what_is_borrowed_lowers_the_error_on_other_tokens(part):
    model = mixture()
    unfuse(model)
    generator = torch.Generator().manual_seed(0)
    inputs = 32 if part == "gate_up_proj" else 24
    # Experts read one space on the way up, each with a mean of its own; on the way down each has its own.
    spectrum = torch.arange(1, inputs + 1) ** -0.5
    spaces = [torch.linalg.qr(torch.randn(inputs, inputs, generator=generator))[0] * spectrum for _ in range(5)]
    means = 0.3 * torch.randn(5, inputs, generator=generator)

    def tokens(number, count):
        z = torch.randn(count, inputs, generator=generator) + means[number]
        return z @ spaces[0 if part == "gate_up_proj" else number].mT

    found = {}
    for number in range(5):
        found[number] = LayerStatistics.empty((1, inputs, inputs), torch.device("cpu"))
        found[number].add(tokens(number, 6 if number == 0 else 500), None, torch.tensor(True))
        found[number].hessian = found[number].hessian.tril() + found[number].hessian.tril(-1).mT
    weight, others = torch.randn(1, 64, inputs, generator=generator), tokens(0, 2000)

    def error():
        hessian, _ = condition(found[0].hessian.clone(), "expert")
        solution = SOLVERS["lnq"].solve(weight, hessian, SolverSpec(2))
        quantized = solution.codebook.float().gather(-1, solution.codes.long())
        return ((quantized - weight) @ others.mT).square().sum().item()

    alone = error()
    lend(model, {f"model.layers.0.mlp.experts.{number}.{part}": one for number, one in found.items()})
    assert error() < 0.75 * alone


def test_an_expert_without_tokens_is_quantized_and_flagged(caplog):
    logging.getLogger("hf_guidedquant").propagate = True
    with caplog.at_level(logging.WARNING, logger="hf_guidedquant"):
        model = hf_guidedquant.quantize(mixture("gpt-oss"), config(method="lnq"))
    report = model.quantization_report
    layers = {layer.plan.name: layer for layer in report.layers if ".experts." in layer.plan.name}
    assert len(layers) == 8
    alone = {name: layer for name, layer in layers.items() if layer.tokens == 0}
    assert alone.keys() == {UNROUTED + "gate_up_proj", UNROUTED + "down_proj"}
    assert all(layer.borrowed_tokens == layer.plan.in_features and not layer.fallback for layer in alone.values())
    assert sum(layer.tokens for name, layer in layers.items() if name.endswith("down_proj")) == 8 * 33 * 2
    assert all(name in quantized_modules(model) for name in layers)
    assert "2 no tokens at all (experts)" in report.table()
    assert "of which 2 got none" in caplog.text
    assert UNROUTED + "gate_up_proj 0" in caplog.text


def test_quantized_experts_come_back_and_generate(any_mixture, tmp_path):
    any_mixture.save_pretrained(tmp_path / "dense")
    planned = hf_guidedquant.plan(tmp_path / "dense", config(seq_len=33), probe=False)
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config(method="lnq"))
    experts = [layer for layer in planned.layers if ".experts." in layer.name]
    assert len(experts) == 2 * next(iter(unfused_experts(before).values())).num_experts
    assert quantized_modules(before).keys() == {layer.name for layer in planned.layers}
    assert planned.quantized_bytes == sum(tensor.nbytes for tensor in before.state_dict().values())
    assert {reason for name, reason in planned.skipped.items() if "mlp" in name} == {"router"}
    before.save_pretrained(tmp_path / "quantized")
    for _ in range(2):
        after = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
        assert torch.equal(logits(after), logits(before))
        assert after.state_dict().keys() == before.state_dict().keys()
        prompt = {"input_ids": torch.stack(token_rows(2, 5)), "attention_mask": torch.ones(2, 5), "do_sample": False}
        assert torch.equal(after.generate(**prompt, max_new_tokens=4), before.generate(**prompt, max_new_tokens=4))
        assert len(inspect(tmp_path / "quantized", verify=True).layers) == len(planned.layers)
        card = (tmp_path / "quantized" / "README.md").read_text()
        assert f"in {len(planned.layers)} linear layers" in card
        after.save_pretrained(tmp_path / "quantized")


def test_dequantized_experts_are_fused_again_and_saved_like_the_original(any_mixture, tmp_path):
    any_mixture.save_pretrained(tmp_path / "dense")
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    hf_guidedquant.quantize(any_mixture, config()).save_pretrained(tmp_path / "quantized")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    expected = logits(model)
    model = model.dequantize()
    assert not unfused_experts(model)
    assert fused_experts(model)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path / "dequantized")
    files = [(tmp_path / name / "model.safetensors") for name in ("dense", "dequantized")]
    names, others = (hf_guidedquant.checkpoint.read_headers([file]) for file in files)
    assert {name: spec.shape for name, spec in names.items()} == {name: spec.shape for name, spec in others.items()}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dequantized")
    assert torch.equal(logits(again), logits(model))
    assert type(again) is type(original)


def test_planning_and_failing_leave_the_model_as_it_was():
    model = mixture()
    modules = {name: type(module) for name, module in model.named_modules()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hf_guidedquant.plan(model, config(), probe=False)
    assert {name: type(module) for name, module in model.named_modules()} == modules
    model.model.layers[0].self_attn.q_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(NonFiniteWeightError):
        hf_guidedquant.quantize(model, config())
    assert {name: type(module) for name, module in model.named_modules()} == modules
    del state["model.layers.0.self_attn.q_proj.weight"]
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("excluded", ["mlp.experts", "experts.1", "*.down_proj"])
def test_excluded_experts_stay_dense_and_come_back(excluded, tmp_path):
    mixture(blocks=2).save_pretrained(tmp_path / "dense")
    settings = config(modules_to_not_convert=[excluded])
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=settings)
    assert bool(unfused_experts(before)) == (excluded != "mlp.experts")
    assert len([n for n in quantized_modules(before) if ".experts." in n]) == {"mlp.experts": 0, "experts.1": 16}.get(
        excluded, 10
    )
    # What stays dense does not keep the fused weights in memory.
    parameters = [p for experts in unfused_experts(before).values() for p in experts.parameters()]
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in parameters)
    hf_guidedquant.save(before, tmp_path / "quantized")
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    assert after.state_dict().keys() == before.state_dict().keys()
    assert torch.equal(logits(after), logits(before))


def test_the_dense_model_loads_untouched_beside_a_quantized_one(tmp_path):
    model = mixture("mixtral")
    model.save_pretrained(tmp_path / "dense")
    hf_guidedquant.save(hf_guidedquant.quantize(copy.deepcopy(model), config()), tmp_path / "quantized")
    AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert fused_experts(again)
    assert torch.equal(logits(again), logits(model))


def test_a_config_with_more_experts_than_any_model_is_refused(tmp_path):
    hf_guidedquant.save(hf_guidedquant.quantize(mixture(), config(method="rtn")), tmp_path / "quantized")
    file = tmp_path / "quantized" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_local_experts": 10**6}))
    with pytest.raises(CheckpointError, match="1,000,000 experts"):
        inspect(tmp_path / "quantized")


def test_settings_of_single_experts():
    overrides = {"*.experts.*": {"bits": 2}, "experts.3": {"bits": 4}}
    model = hf_guidedquant.quantize(mixture(), config(method="rtn", overrides=overrides))
    bits = {name: module.bits for name, module in quantized_modules(model).items()}
    assert {bits[f"model.layers.0.mlp.experts.{k}.down_proj"] for k in (0, 1, 2, 4)} == {2}
    assert bits["model.layers.0.mlp.experts.3.gate_up_proj"] == 4
    assert bits["model.layers.0.self_attn.q_proj"] == 3


def test_experts_of_another_kind_are_named_loudly(caplog):
    kind = {"num_hidden_layers": 1, "num_local_experts": 2, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 1}
    model = Llama4ForCausalLM(Llama4TextConfig(**{**SIZES, **kind}))
    logging.getLogger("hf_guidedquant").propagate = True
    with caplog.at_level(logging.WARNING, logger="hf_guidedquant"):
        planned = hf_guidedquant.plan(model, config(), probe=False)
    experts = [name for name, reason in planned.skipped.items() if reason.startswith("unsupported")]
    assert len(experts) == 2
    assert all(name in caplog.text for name in experts)
    assert "Not quantized" in caplog.text
    assert planned.skipped["model.layers.0.feed_forward.router.weight"] == "router"


@pytest.mark.parametrize("guided", [True, False])
def test_segments_give_the_same_bytes(guided):
    settings = config(method="lnq", guided=guided, dataset=token_rows(4))
    whole = hf_guidedquant.quantize(mixture("gpt-oss", blocks=3), settings)
    model = mixture("gpt-oss", blocks=3)
    with unfused(model, settings, only_inside=True):
        settings.max_memory = memory_for(model, settings)
    assert hf_guidedquant.plan(model, settings, probe=False).segments > 1
    parts = hf_guidedquant.quantize(model, settings)
    assert parts.state_dict().keys() == whole.state_dict().keys()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(parts.state_dict()[name], tensor), name


def test_a_run_goes_on_with_what_solved_experts_would_have_lent(tmp_path):
    settings = config(method="lnq", run_dir=tmp_path)
    whole = hf_guidedquant.quantize(mixture("gpt-oss"), settings)
    files = sorted((tmp_path / "layers").glob("*experts.0.*"))
    assert len(files) == 2
    for file in files:
        file.unlink()
    again = hf_guidedquant.quantize(mixture("gpt-oss"), settings)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_kept_statistics_serve_experts(tmp_path):
    settings = config(method="lnq", statistics=tmp_path)
    first = hf_guidedquant.quantize(mixture("gpt-oss"), settings)
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "layers").iterdir()}
    second = hf_guidedquant.quantize(mixture("gpt-oss"), settings)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "layers").iterdir()} == times
    for one, other in zip(first.quantization_report.layers, second.quantization_report.layers, strict=True):
        assert (one.tokens, one.borrowed_tokens) == (other.tokens, other.borrowed_tokens)
    for name, tensor in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor), name


def test_training_reaches_experts():
    settings = config(reconstruct={"epochs": 1, "batch_tokens": 33}, distill={"epochs": 1, "batch_tokens": 66})
    model = hf_guidedquant.quantize(mixture("gpt-oss"), settings)
    report = model.quantization_report
    assert len(report.reconstruction.blocks) == 1
    assert report.reconstruction.blocks[0].trained < report.reconstruction.blocks[0].solved
    assert report.distillation.held_back[report.distillation.best_epoch] <= report.distillation.held_back[0]
    # An expert that no token is routed to is not trained, and not harmed.
    solved = hf_guidedquant.quantize(mixture("gpt-oss"), config())
    for part in ("gate_up_proj", "down_proj"):
        trained, left = model.get_submodule(UNROUTED + part), solved.get_submodule(UNROUTED + part)
        assert torch.equal(trained.weight, left.weight)
        torch.testing.assert_close(trained.lut.float(), left.lut.float(), rtol=1e-3, atol=1e-5)


def test_torch_compile_breaks_the_graph_and_gives_the_same(tmp_path):
    model = hf_guidedquant.quantize(mixture(), config(method="rtn"))
    expected = logits(model)
    assert not model.hf_quantizer.is_compileable
    model.forward = torch.compile(model.forward, backend="eager")
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)


def test_adapters_beside_experts_only():
    peft = pytest.importorskip("peft")
    model = hf_guidedquant.quantize(mixture(), config(method="rtn"))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    names = {name.split(".lora_")[0].rpartition(".")[2] for name, p in adapted.named_parameters() if p.requires_grad}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj"}
    model = hf_guidedquant.quantize(mixture(), config(method="rtn"))
    with pytest.raises(AdapterError, match=r"experts\.0\.down_proj"):
        peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", list(MIXTURES))
def test_quantized_saved_and_loaded_on_a_gpu(kind, dtype, tmp_path):
    model, again = quantized_and_loaded(mixture(kind), config(method="lnq", device=None), dtype, tmp_path)
    assert sum(".experts." in name for name in quantized_modules(again)) > 0
    ids = torch.stack(token_rows(2, seed=1)).cuda()
    with torch.no_grad():
        found = again(ids).logits
        assert torch.equal(found, model(ids).logits)
    assert found.isfinite().all()
    assert_the_cpu_loads_the_same(again, tmp_path)
