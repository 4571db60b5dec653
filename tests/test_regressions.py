"""Things that once went wrong, each by its symptom."""

import os
import pickle
import re

import numpy
import pytest
import torch
from conftest import tiny_model, token_rows
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    CTRLConfig,
    CTRLLMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
)

import hf_guidedquant
from hf_guidedquant import GuidedQuantConfig, pipeline, plan, solving
from hf_guidedquant.calibration import load_rows
from hf_guidedquant.errors import (
    CalibrationError,
    ConfigError,
    EvaluationError,
    ModelError,
    NonFiniteWeightError,
    SolverError,
    TokenizerMissingError,
)
from hf_guidedquant.evaluate import perplexity
from hf_guidedquant.formats.lut import codebook_dtype
from hf_guidedquant.nn import quantized_modules
from hf_guidedquant.plan import plan_layers
from hf_guidedquant.report import load_report
from hf_guidedquant.resources import reproducible
from hf_guidedquant.training.steps import Steps

PROMPT = torch.arange(2, 10)[None]


def config(**changes):
    return GuidedQuantConfig(**{"bits": 2, "dataset": token_rows(), **changes})


def test_a_pickled_model_comes_back_and_can_be_saved(llama, tmp_path):
    model = hf_guidedquant.quantize(llama, config())
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(PROMPT).logits, model(PROMPT).logits)
    again.save_pretrained(tmp_path)


def test_the_model_keeps_neither_texts_nor_tokenizer(llama):
    def tokenizer(text, **kwargs):
        return {"input_ids": [ord(c) % 64 for c in text]}

    model = hf_guidedquant.quantize(llama, config(dataset=["canary text " * 50], tokenizer=tokenizer))
    assert b"canary" not in pickle.dumps(model.config)


def test_a_local_folder_is_never_taken_for_a_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("owner/model")
    model = AutoModelForCausalLM.from_pretrained("owner/model")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    hf_guidedquant.quantize(model, config())
    assert "base_model" not in model.config.quantization_config.provenance


def test_a_row_of_tiny_weights_keeps_its_precision(llama):
    layer = llama.model.layers[0].mlp.up_proj
    layer.weight.data[5] *= 1e-6
    assert codebook_dtype(layer.weight) == torch.float32
    before = layer.weight.detach().clone()
    quantized = hf_guidedquant.quantize(llama, config(bits=4)).model.layers[0].mlp.up_proj.dequantize()
    errors = (quantized - before).norm(dim=1) / before.norm(dim=1)
    # The row is like the others but for its scale; in an fp16 codebook most of it would be lost.
    assert errors[5] < 3 * errors.median()
    saved = sum(tensor.nbytes for tensor in llama.state_dict().values())
    assert llama.quantization_report.quantized_bytes == saved


@pytest.mark.parametrize("field", [{"overrides": {"*.donw_proj": {"bits": 4}}}, {"modules_to_not_convert": ["typo"]}])
def test_a_pattern_that_matches_nothing_is_an_error(llama, field):
    with pytest.raises(ConfigError, match=r"donw_proj|typo"):
        hf_guidedquant.quantize(llama, config(**field))


@pytest.mark.parametrize(
    ("pattern", "changes", "reason"),
    [
        ("lm_head", {}, "lm_head is not: output head, without embedding_bits"),
        ("*.norm", {}, "like 'model.layers.0.self_attn.q_proj'"),
        ("embed_tokens", {"embedding_bits": None}, "embed_tokens is not: embedding, without embedding_bits"),
        ("embed_tokens", {"embedding_bits": 4}, "embed_tokens is not: tied to lm_head"),
        ("k_proj", {"modules_to_not_convert": ["k_proj"]}, "k_proj is not: modules_to_not_convert"),
    ],
)
def test_settings_of_layers_that_stay_as_they_are_are_an_error(pattern, changes, reason):
    settings = config(overrides={pattern: {"bits": 8}}, **changes)
    with pytest.raises(ConfigError, match=re.escape(reason)):
        plan_layers(tiny_model("llama-tied"), settings)


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"])
def test_nan_outside_the_linears_is_named_too(llama, name):
    llama.get_parameter(name).data.view(-1)[0] = float("nan")
    with pytest.raises(NonFiniteWeightError, match=name):
        hf_guidedquant.quantize(llama, config())


def test_token_rows_beyond_the_models_context_are_refused(llama):
    with pytest.raises(CalibrationError, match="65 tokens, but the model's context is 64"):
        hf_guidedquant.quantize(llama, config(dataset=token_rows(length=65)))
    with pytest.raises(EvaluationError, match="context=65 is longer"):
        perplexity(llama, None, torch.zeros(200, dtype=torch.int64), 65)


def test_a_wrong_dataset_name_is_found_before_the_model_is_read(tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path)
    monkeypatch.setattr(torch.nn.Module, "__init__", lambda *args, **kwargs: pytest.fail("the model was built"))
    with pytest.raises(CalibrationError, match="no known name and no file"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=GuidedQuantConfig(dataset="wikitxt"))


def test_splits_streams_and_missing_texts():
    datasets = pytest.importorskip("datasets")

    def tokenizer(text, **kwargs):
        return {"input_ids": list(text.encode())}

    def load(dataset):
        return load_rows(dataset, tokenizer, num_samples=4, seq_len=4, seed=0).rows

    table = datasets.Dataset.from_dict({"text": ["abcd", None, "efgh"]})
    assert len(load(table)) == 2
    with pytest.raises(CalibrationError, match=r"splits \['train'\]"):
        load(datasets.DatasetDict(train=table))
    stream = datasets.IterableDataset.from_generator(lambda: iter([{"text": "abcd"}]))
    assert len(load(stream)) == 1


def test_a_new_classification_head_can_be_left_out(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    settings = config(guided=False, modules_to_not_convert=["score"])
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, quantization_config=settings)
    assert type(model.score) is torch.nn.Linear
    with pytest.raises(ModelError, match=r"holds no score\.weight"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path, quantization_config=config(guided=False))


@pytest.mark.parametrize("absent", ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"])
def test_a_checkpoint_without_a_part_is_refused(tmp_path, absent):
    """Transformers makes up random values, which the end loss would depend on."""
    model = tiny_model()
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != absent}
    model.save_pretrained(tmp_path, state_dict=tensors)
    settings = {"dataset": token_rows(), "modules_to_not_convert": ["lm_head"]}
    with pytest.raises(ModelError, match=re.escape(f"holds no {absent}")):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=GuidedQuantConfig(**settings))


def test_a_head_whose_dtype_the_model_asks_for_keeps_its_weight():
    """Mamba casts hidden states to it; codes are integers."""
    settings = MambaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=128, state_size=8)
    model = MambaForCausalLM(settings).eval()
    expected = model(PROMPT).logits.detach()
    hf_guidedquant.quantize(model, GuidedQuantConfig(bits=8, method="rtn", embedding_bits=4))
    assert type(model.lm_head) is torch.nn.Linear
    torch.testing.assert_close(
        model(PROMPT).logits.detach(), expected, rtol=0.1, atol=0.01 * float(expected.abs().max())
    )


@pytest.mark.parametrize("settings", [{"reconstruct": True}, {"reconstruct": True, "preset": "fast"}])
def test_blocks_that_more_than_hidden_states_lead_through_are_not_trained_one_by_one(settings):
    """Without guidance there are no gradients to show it: Gemma 4's last blocks take keys and values of others."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4}
    shape = AutoConfig.for_model("gemma4_text", **sizes, num_key_value_heads=2, head_dim=16, vocab_size=128)
    settings = GuidedQuantConfig(bits=3, dataset=token_rows(), **settings)
    with pytest.raises(ModelError, match="cannot be run one decoder block at a time"):
        hf_guidedquant.quantize(AutoModelForCausalLM.from_config(shape).eval(), settings)


def test_a_model_in_float64_is_calibrated():
    model = hf_guidedquant.quantize(tiny_model().double(), config(guided=True))
    assert model(PROMPT).logits.dtype == torch.float64


def test_numbers_of_other_libraries_in_a_report_are_saved(llama, tmp_path):
    model = hf_guidedquant.quantize(llama, config())
    model.quantization_report.measured |= {"a": numpy.float32(2.5), "b": torch.tensor(3.0), "c": tmp_path}
    model.save_pretrained(tmp_path)
    assert load_report(tmp_path).measured == {"a": 2.5, "b": 3.0, "c": str(tmp_path)}


def test_the_folder_that_one_is_in_has_a_name_too(llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hf_guidedquant.quantize(llama, config()).save_pretrained(".")
    assert f"# {tmp_path.name}" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_a_plan_takes_a_dictionary_and_refuses_what_is_no_language_model(llama, tmp_path):
    assert plan(llama, {"bits": 3}, probe=False).layers[0].bits == 3
    T5Config(d_model=32, num_layers=1, num_heads=2, vocab_size=128).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no causal language model"):
        plan(tmp_path, {"bits": 3}, probe=False)


def test_training_says_which_steps_were_left_out():
    """Of a row whose states are finite and whose gradients are not, as of any batch with it."""
    parameter = torch.nn.Parameter(torch.ones(3))
    steps = Steps(lambda x: (x * parameter).sum(), [{"params": [parameter], "largest": 0.1}])
    for value in (1.0, float("inf"), 2.0):
        steps.add([torch.full((3,), value)])
        steps.step(1.0)
    assert steps.left_out().startswith("1 of 3 steps were left out")
    assert torch.isfinite(parameter).all()


def test_dense_copies_made_in_inference_mode_serve_training_too(llama):
    model = hf_guidedquant.quantize(llama, config(cache_dequantized=True))
    with torch.inference_mode():
        model(PROMPT)
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(2, 64, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None


def test_changes_by_from_dict_are_checked():
    with pytest.raises(ConfigError, match="bits"):
        GuidedQuantConfig.from_dict({"bits": 2}, bits=99)


def test_save_shards(llama, tmp_path):
    model = hf_guidedquant.quantize(llama, config())
    hf_guidedquant.save(model, tmp_path / "m", max_shard_size="20KB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1


def test_settings_as_a_dictionary(llama):
    assert hf_guidedquant.quantize(llama, {"bits": 3, "dataset": token_rows()}).model.layers[0].mlp.up_proj.bits == 3


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch has the old switch only")
@pytest.mark.parametrize("value", ["tf32", "ieee"])
def test_either_way_of_allowing_tf32_survives(value):
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = value
        with reproducible():
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == value
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("value", ["high", "highest"])
def test_the_old_way_of_allowing_tf32_survives(value):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(value)
        with reproducible():
            pass
        assert torch.get_float32_matmul_precision() == value
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("value", [None, ":16:8"])
def test_the_workspace_of_cublas_is_set_for_a_while_and_that_of_the_caller_stays(value, monkeypatch):
    name = "CUBLAS_WORKSPACE_CONFIG"
    monkeypatch.delenv(name, raising=False)
    if value is not None:
        monkeypatch.setenv(name, value)
    with reproducible():
        assert os.environ[name] == (value or ":4096:8")
    assert os.environ.get(name) == value


def test_a_quantized_model_loads_with_layers_on_disk(llama, tmp_path):
    model = hf_guidedquant.quantize(llama, config())
    model.save_pretrained(tmp_path / "m")
    places = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0"], "cpu")
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", device_map={**places, "model.layers.1": "disk"}, offload_folder=tmp_path / "offload"
    )
    assert again.model.layers[1].mlp.up_proj.weight.is_meta
    prompt = torch.arange(2, 10)[None]
    assert torch.equal(again(input_ids=prompt).logits, model(input_ids=prompt).logits)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_solution_that_is_not_finite_is_never_kept(llama, rows, monkeypatch, tmp_path, value):
    """Should a kernel or a device fail, the layer is named, and neither model nor folder gets it."""
    own = solving.solve

    def solve(method, weight, hessian, spec, factors):
        solution = own(method, weight, hessian, spec, factors)
        if weight.shape[-1] == 96:  # down_proj, the second layer's last group
            solution.codebook[-1, -1, 1] = value
        return solution

    monkeypatch.setattr(solving, "solve", solve)
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    with pytest.raises(SolverError, match=r"model\.layers\.1\.mlp\.down_proj on cpu"):
        hf_guidedquant.quantize(llama, GuidedQuantConfig(bits=2, dataset=rows, run_dir=tmp_path / "run"))
    assert before.keys() == llama.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in llama.state_dict().items())
    assert not list((tmp_path / "run" / "layers").glob("*down_proj*"))


def test_modules_with_two_names_keep_their_tensors(llama):
    llama.model.layers[1].input_layernorm = llama.model.layers[0].input_layernorm
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    hf_guidedquant.plan(llama, config(), probe=False)
    after = llama.state_dict()
    assert all(type(tensor) is torch.Tensor and torch.equal(tensor, before[name]) for name, tensor in after.items())
    model = hf_guidedquant.quantize(llama, config(reconstruct={"epochs": 1}, distill={"epochs": 1}))
    assert model(PROMPT).logits.isfinite().all()


@pytest.mark.parametrize("training", ["reconstruct", "distill"])
def test_one_row_is_too_few_to_train_on(training, llama):
    settings = config(dataset=token_rows(1), num_samples=1, **{training: True})
    for work in (hf_guidedquant.quantize, hf_guidedquant.plan):
        with pytest.raises(CalibrationError, match="two calibration rows"):
            work(llama, settings)
    assert not quantized_modules(llama)


def test_a_model_whose_distillation_fails_is_a_quantized_one(llama, tmp_path, monkeypatch):
    expected = hf_guidedquant.quantize(tiny_model(), config())(PROMPT).logits

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "distill", fail)
    with pytest.raises(KeyboardInterrupt):
        hf_guidedquant.quantize(llama, config(distill=True))
    assert torch.equal(llama(PROMPT).logits, expected)
    llama.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(PROMPT).logits, expected)


@pytest.mark.parametrize("settings", [{}, {"method": "squeezellm", "guided": False}, {"distill": True}], ids=str)
def test_the_callers_default_dtype_and_autocast_change_nothing(settings):
    rows = token_rows(4)
    expected = hf_guidedquant.quantize(tiny_model(), config(dataset=rows, **settings)).state_dict()
    model = tiny_model()
    with torch.autocast("cpu", torch.bfloat16):
        inside = hf_guidedquant.quantize(model, config(dataset=rows, **settings)).state_dict()
        assert torch.is_autocast_enabled("cpu")
    for dtype in (torch.bfloat16, torch.float64):
        model = tiny_model()
        torch.set_default_dtype(dtype)
        try:
            other = hf_guidedquant.quantize(model, config(dataset=rows, **settings)).state_dict()
            assert torch.get_default_dtype() == dtype
        finally:
            torch.set_default_dtype(torch.float32)
        for name, tensor in expected.items():
            assert torch.equal(tensor, inside[name]), name
            assert torch.equal(tensor, other[name]), name


def test_a_tokenizer_that_cannot_be_read_is_needed_for_texts_only(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "of a later version"}}')
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config())
    assert quantized_modules(model)
    with pytest.raises(TokenizerMissingError):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config(tokenizer=str(tmp_path)))


def test_embeddings_that_are_changed_in_place_can_be_guided():
    small = {"vocab_size": 128, "n_positions": 64, "n_embd": 32, "dff": 64, "n_layer": 2, "n_head": 2}
    model = hf_guidedquant.quantize(CTRLLMHeadModel(CTRLConfig(**small)).eval(), config())
    assert quantized_modules(model)
