"""Families of models that no other test has: what of them is quantized; they are saved, loaded, and generate."""

import copy

import pytest
import torch
from conftest import VOCABULARY, token_rows
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
)

import hf_guidedquant
from hf_guidedquant import GuidedQuantConfig
from hf_guidedquant.errors import NoLinearLayersError
from hf_guidedquant.linears import is_linear
from hf_guidedquant.nn import quantized_modules

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
GROUPED = SIZES | {"intermediate_size": 96, "num_key_value_heads": 2}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
OPT = SIZES | {"ffn_dim": 96, "dropout": 0.0}
# Linear layers of a block, and beside the blocks.
FAMILIES = {
    "llama3": (LlamaConfig(**GROUPED, rope_parameters=LLAMA3_ROPE), 7, 0),
    "qwen2": (Qwen2Config(**GROUPED), 7, 0),
    "gemma2": (Gemma2Config(**GROUPED, head_dim=16, sliding_window=8), 7, 0),
    "mistral": (MistralConfig(**GROUPED, sliding_window=8), 7, 0),
    "phi": (PhiConfig(**GROUPED), 6, 0),
    "phi3": (Phi3Config(**GROUPED), 4, 0),
    "opt": (OPTConfig(**OPT, word_embed_proj_dim=64), 6, 0),
    # As OPT-350M: normalised after each part, embeddings narrower than the hidden states.
    "opt-post-norm": (OPTConfig(**OPT, word_embed_proj_dim=32, do_layer_norm_before=False), 6, 2),
}
PROMPT = token_rows(1, 24, seed=1)[0][None]


@pytest.fixture(params=list(FAMILIES))
def family(request):
    return FAMILIES[request.param]


def dense_model(config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=PROMPT).logits


def test_all_linears_are_quantized_saved_and_loaded(family, tmp_path):
    config, inside, beside = family
    dense = dense_model(config)
    linears = {name for name, module in dense.named_modules() if is_linear(module)} - {"lm_head"}
    assert len(linears) == config.num_hidden_layers * inside + beside
    dense.save_pretrained(tmp_path / "dense")
    settings = GuidedQuantConfig(bits=3, outliers=0.02, dataset=token_rows())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=settings)
    assert quantized_modules(model).keys() == linears
    assert all(layer.fallback is None and layer.tokens for layer in model.quantization_report.layers)
    hf_guidedquant.save(model, tmp_path / "quantized")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    expected = logits(model)
    assert torch.isfinite(expected).all() and torch.equal(logits(again), expected)
    told = again.generate(PROMPT, max_new_tokens=8, do_sample=False)
    assert torch.equal(told, model.generate(PROMPT, max_new_tokens=8, do_sample=False))


def test_with_a_codeword_per_weight_the_logits_are_those_of_rounded_weights(family):
    """128 codewords are more than a row has weights, so only fp16 takes something away: 2^-11 of a weight at most.

    The logits therefore move less than where every weight is moved by all of that, up or down at random.
    """
    config, *_ = family
    dense, moved = dense_model(config), dense_model(config)
    model = hf_guidedquant.quantize(
        dense_model(config), GuidedQuantConfig(bits=7, method="gptvq1d", dataset=token_rows())
    )
    generator = torch.Generator().manual_seed(0)
    for name in quantized_modules(model):
        weight = moved.get_submodule(name).weight.data
        signs = torch.randint(2, weight.shape, generator=generator) * 2 - 1
        weight.mul_(1 + signs * 2**-11)
    distance, allowed = ((logits(other) - logits(dense)).norm() for other in (model, moved))
    assert 0 < distance < allowed


@pytest.mark.parametrize("method", ["squeezellm", "rtn"])
def test_layers_that_are_never_called_stay_as_they_are(method, caplog, tmp_path):
    """Mamba multiplies with the weights of ``dt_proj`` itself."""
    dense = dense_model(MambaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=VOCABULARY, state_size=8))
    own = [f"backbone.layers.{block}.mixer.dt_proj" for block in range(2)]
    # On a CPU Mamba goes from token to token.
    settings = GuidedQuantConfig(bits=4, method=method, dataset=token_rows(2, length=16), seq_len=16)
    forecast = hf_guidedquant.plan(dense, settings, probe=False)
    caplog.clear()
    model = hf_guidedquant.quantize(copy.deepcopy(dense), settings)
    assert f"Not quantized: {', '.join(own)}. MambaForCausalLM never calls these layers" in caplog.text
    layers = {f"backbone.layers.{block}.mixer.{name}_proj" for block in range(2) for name in ("in", "x", "out")}
    assert quantized_modules(model).keys() == layers == {layer.name for layer in forecast.layers}
    assert {f"{name}.weight" for name in own} <= forecast.skipped.keys() == model.quantization_report.skipped.keys()
    for name in own:
        assert torch.equal(model.get_submodule(name).weight, dense.get_submodule(name).weight)
    hf_guidedquant.save(model, tmp_path / "quantized")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    assert torch.isfinite(logits(model)).all() and torch.equal(logits(again), logits(model))


def test_a_model_that_calls_no_layer_is_refused():
    dense = dense_model(MambaConfig(hidden_size=64, num_hidden_layers=1, vocab_size=VOCABULARY, state_size=8))
    settings = GuidedQuantConfig(bits=4, dataset=token_rows(), modules_to_not_convert=["in_proj", "x_proj", "out_proj"])
    with pytest.raises(NoLinearLayersError, match="calls no linear layer"):
        hf_guidedquant.quantize(dense, settings)
