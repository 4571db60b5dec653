"""Quantized embeddings and output heads: looked up, multiplied, tied, saved, trained around."""

import copy
import importlib
import json
import logging
import os
import pickle

import pytest
import torch
from conftest import (
    ARCHITECTURES,
    VOCABULARY,
    assert_the_cpu_loads_the_same,
    quantized_and_loaded,
    tiny_model,
    token_rows,
)
from safetensors.torch import load_file
from test_layers import Tensorcores
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import hf_guidedquant
from hf_guidedquant import GuidedQuantConfig
from hf_guidedquant.codes import Codes
from hf_guidedquant.decoding import GraphedDecode
from hf_guidedquant.errors import AdapterError, ConfigError, ModelError
from hf_guidedquant.evaluate.measurement import bits_per_weight
from hf_guidedquant.formats import lut as lut_format
from hf_guidedquant.inspection import inspect
from hf_guidedquant.nn import GuidedEmbedding, GuidedLinear, quantized_modules
from hf_guidedquant.plan import plan_layers
from hf_guidedquant.triton_kernels import TILED_BITS, pack_tiles

PROMPT = torch.arange(2, 12)[None]
TIED = ["llama-tied", "gemma3", "gpt2"]


def config(**changes):
    return GuidedQuantConfig(**{"bits": 3, "embedding_bits": 4, "dataset": token_rows(), **changes})


def quantized(architecture="llama-tied", dtype=torch.float32, **changes):
    return hf_guidedquant.quantize(tiny_model(architecture).to(dtype), config(**changes))


def logits(model, ids=PROMPT):
    with torch.no_grad():
        return model(input_ids=ids.to(model.device)).logits


def head_and_embeddings(model):
    return model.get_output_embeddings(), model.get_input_embeddings()


def odd_model(tied=True):
    """Sizes that fill neither words nor tiles, and a padding token."""
    settings = {"hidden_size": 45, "intermediate_size": 37, "num_attention_heads": 3, "head_dim": 16}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(**settings, vocab_size=131, num_hidden_layers=2, pad_token_id=5, tie_word_embeddings=tied)
        ).eval()


def embedding(bits, rows=37, inputs=45, dtype=torch.float32, scale=1.0, lut_dtype=torch.float16):
    """A module, and the float64 matrix that it looks up, scaled."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (rows, inputs), generator=generator).to(torch.uint8)
    lut = torch.randn(rows, 2**bits, generator=generator).to(lut_dtype)
    dense = nn.Embedding(rows, inputs, dtype=dtype)
    module = GuidedEmbedding.replacing(dense, lut_format.encode(Codes(codes, lut)))
    module.scale.data.fill_(scale)
    return module, lut.double().gather(1, codes.long()) * module.scale.double()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", range(1, 9))
def test_rows_are_those_of_the_float64_matrix(bits, dtype):
    module, truth = embedding(bits, dtype=dtype, scale=5.3)
    layouts = [module]
    if bits in TILED_BITS:
        tiled = copy.deepcopy(module)
        tiled.weight = nn.Parameter(pack_tiles(module.weight, 45), requires_grad=False)
        tiled._tiled = True
        layouts.append(tiled)
    # The codebook is rounded to dtype, and the product with the scale once more.
    unit = torch.finfo(dtype).eps / 2
    for ids in (torch.tensor(36), torch.tensor([[4, 4, 0], [36, 1, 17]]), torch.zeros(2, 0, dtype=torch.int32)):
        expected = truth[ids.long()]
        for layout in layouts:
            found = layout(ids)
            assert found.dtype == dtype
            assert found.shape == (*ids.shape, 45)
            error = (found.double() - expected).abs()
            assert (error <= 2.01 * unit * expected.abs() + torch.finfo(dtype).smallest_normal).all()


def test_ids_outside_of_the_vocabulary_are_errors_as_for_dense_embeddings():
    module, _ = embedding(4)
    for ids in (torch.tensor([37]), torch.tensor([-1])):
        with pytest.raises((IndexError, RuntimeError)):
            module(ids)


def test_casting_changes_what_is_looked_up_and_not_what_is_stored():
    module, truth = embedding(4)
    lut = module.lut.clone()
    ids = torch.arange(37)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        module.to(dtype)
        assert module(ids).dtype == dtype
        assert module.lut.dtype == torch.float16
        assert torch.equal(module.lut, lut)
    assert torch.equal(module(ids).double(), truth)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_tied_head_multiplies_with_the_rows_that_are_looked_up(dtype):
    head, embeddings = head_and_embeddings(quantized(embedding_bits=5).to(dtype))
    rows = embeddings(torch.arange(VOCABULARY))
    x = torch.randn(7, 64, dtype=dtype, generator=torch.Generator().manual_seed(0))
    truth, largest = x.double() @ rows.double().T, x.double().abs() @ rows.double().abs().T
    error = (head(x).double() - truth).abs()
    # Every partial sum of 64 products is rounded.
    assert (error <= 65 * torch.finfo(dtype).eps * largest).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_quantize_save_reload_generate(architecture, tmp_path):
    tiny_model(architecture).save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config())
    head, embeddings = head_and_embeddings(model)
    assert (type(head), type(embeddings)) == (GuidedLinear, GuidedEmbedding)
    tied = architecture in TIED
    assert (head.weight is embeddings.weight) == (head.lut is embeddings.lut) == tied
    assert model.dtype == torch.float32
    model.save_pretrained(tmp_path / "quantized")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    assert torch.equal(logits(again), logits(model))
    head, embeddings = head_and_embeddings(again)
    assert (head.weight is embeddings.weight) == (head.lut is embeddings.lut) == tied
    assert not any(parameter.requires_grad for module in (head, embeddings) for parameter in module.parameters())
    options = {"max_new_tokens": 12, "do_sample": False}
    expected = model.generate(PROMPT, **options)
    assert torch.equal(again.generate(PROMPT, **options), expected)
    assert torch.equal(again.generate(PROMPT, cache_implementation="static", **options), expected)
    assert torch.equal(again.generate(PROMPT, custom_generate=GraphedDecode(), **options), expected)
    again.save_pretrained(tmp_path / "again")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("quantized", "again")]
    assert files[0] == files[1]


@pytest.mark.parametrize("architecture", TIED)
def test_tied_weights_are_one_copy_in_memory_and_on_the_disk(architecture, tmp_path):
    model = tiny_model(architecture)
    planned = plan_layers(model, config())
    own = model.get_input_embeddings().weight.nbytes
    without = plan_layers(model, config(embedding_bits=None))
    packed = 4 * VOCABULARY * 64 // 8 + 2 * 16 * VOCABULARY
    scale = 4
    assert without.quantized_bytes - planned.quantized_bytes == own - packed - scale
    model = hf_guidedquant.quantize(model, config())
    stored = {t.data_ptr(): t.nbytes for t in model.state_dict().values()}
    assert sum(p.nbytes for p in model.parameters()) == planned.quantized_bytes
    assert sum(stored.values()) == planned.quantized_bytes
    assert model.quantization_report.quantized_bytes == planned.quantized_bytes
    assert bits_per_weight(model) == pytest.approx(planned.bits_per_weight)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert not any("lm_head" in name for name in tensors)
    assert sum(t.nbytes for t in tensors.values()) == planned.quantized_bytes
    assert inspect(tmp_path, verify=True).bits_per_weight == pytest.approx(planned.bits_per_weight)
    assert "and the embeddings" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("tied", [True, False])
def test_odd_sizes_and_a_padding_row(tied, tmp_path):
    model = odd_model(tied)
    model.model.embed_tokens.weight.data[5] = 0
    model = hf_guidedquant.quantize(model, config(dataset=token_rows(), embedding_bits=3))
    embeddings = model.get_input_embeddings()
    assert (embeddings.num_embeddings, embeddings.embedding_dim, embeddings.padding_idx) == (131, 45, 5)
    assert embeddings.weight.shape == (3, 131, 2)
    assert not embeddings(torch.tensor([5])).any()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.get_input_embeddings().padding_idx == 5
    assert torch.equal(logits(again), logits(model))


def test_a_scale_is_applied_to_what_is_looked_up_only(tmp_path):
    dense = tiny_model("gemma3")
    ids = torch.arange(VOCABULARY)
    model = hf_guidedquant.quantize(copy.deepcopy(dense), config(embedding_bits=5))
    head, embeddings = head_and_embeddings(model)
    assert float(embeddings.scale) == 8.0  # the square root of the hidden size
    assert torch.equal(embeddings(ids), head.dequantize(torch.float32) * 8)
    half = hf_guidedquant.quantize(copy.deepcopy(dense).bfloat16(), config())
    half.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == half.dtype == torch.bfloat16
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert torch.equal(again.get_input_embeddings()(ids), half.get_input_embeddings()(ids))


class NormedEmbedding(nn.Embedding):
    def forward(self, ids):
        return nn.functional.normalize(super().forward(ids), dim=-1)


@pytest.mark.parametrize("tied", [True, False])
def test_other_embeddings_are_left_alone_by_name(tied, caplog):
    model = odd_model(tied)
    model.model.embed_tokens.__class__ = NormedEmbedding
    with caplog.at_level(logging.WARNING):
        planned = plan_layers(model, config())
    assert "NormedEmbedding" in planned.skipped["model.embed_tokens.weight"]
    # A head that has the same weights stays with them.
    assert ("lm_head.weight" in planned.skipped) == tied
    assert "model.embed_tokens.weight [131, 45]" in caplog.text
    model.model.embed_tokens.embed_scale = 2.0
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ModelError, match="NormedEmbedding does more"):
        hf_guidedquant.quantize(model, config())
    assert not quantized_modules(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("value", [0, 9, True, "4", 4.0])
def test_bits_outside_of_their_range(value):
    with pytest.raises(ConfigError, match="embedding_bits"):
        GuidedQuantConfig(embedding_bits=value)


def test_codebooks_that_save_nothing_are_refused():
    with pytest.raises(ConfigError, match=r"embedding_bits = 6 .* at most 5"):
        plan_layers(tiny_model(), config(embedding_bits=6))


def test_the_plan_by_default_with_overrides_and_with_exclusions():
    model, tied = tiny_model("llama"), tiny_model("llama-tied")

    def vocabulary(of, **changes):
        layers = plan_layers(of, config(**changes)).layers
        return {x.name: (x.bits, x.method) for x in layers if "layers" not in x.name}

    assert vocabulary(model, embedding_bits=None) == {}
    assert vocabulary(model) == {"model.embed_tokens": (4, "kmeans"), "lm_head": (4, "lnq")}
    assert vocabulary(tied) == {"lm_head": (4, "lnq")}
    assert vocabulary(model, method="rtn", guided=False)["model.embed_tokens"] == (4, "rtn")
    assert vocabulary(model, overrides={"lm_head": {"bits": 5}})["lm_head"] == (5, "lnq")
    assert vocabulary(model, modules_to_not_convert=["lm_head"]) == {"model.embed_tokens": (4, "kmeans")}
    for name in ("lm_head", "embed_tokens"):
        assert vocabulary(tied, modules_to_not_convert=[name]) == {}


def test_a_mean_number_of_bits_is_one_over_the_other_layers(tmp_path):
    model = quantized("llama", bits=2.5, embedding_bits=5)
    layers = [layer.plan for layer in model.quantization_report.layers]
    assert {x.bits for x in layers if "layers" not in x.name} == {5}
    body = [x for x in layers if "layers" in x.name]
    assert sum(x.bits * x.weights for x in body) <= 2.5 * sum(x.weights for x in body)


@pytest.mark.parametrize("architecture", ["llama", "llama-tied"])
def test_dense_again(architecture, tmp_path):
    model = quantized(architecture)
    model.save_pretrained(tmp_path / "quantized")
    expected = logits(model)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized").dequantize()
    head, embeddings = head_and_embeddings(dense)
    assert (head.weight is embeddings.weight) == (architecture in TIED)
    # The same weights, multiplied in another order.
    torch.testing.assert_close(logits(dense), expected, rtol=1e-5, atol=1e-5)
    dense.save_pretrained(tmp_path / "dense")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(logits(again), logits(dense))
    assert model.dequantize() is model  # of one that was saved, too
    again.resize_token_embeddings(VOCABULARY + 8)
    model.resize_token_embeddings(VOCABULARY + 8)
    assert logits(model).shape[-1] == VOCABULARY + 8


@pytest.mark.parametrize("assign", [False, True])
def test_tied_tensors_that_a_file_holds_once_are_taken_up(assign, tmp_path):
    model, other = quantized("llama-tied"), quantized("llama-tied", seed=1, guided=False)
    assert not torch.equal(logits(model), logits(other))
    other.save_pretrained(tmp_path)
    model.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False, assign=assign)
    assert torch.equal(logits(model), logits(other))
    head, embeddings = head_and_embeddings(model)
    assert head.weight is embeddings.weight


def test_resizing_says_why_it_cannot():
    model = quantized()
    embeddings = model.get_input_embeddings()
    assert model.resize_token_embeddings() is embeddings
    assert model.resize_token_embeddings(VOCABULARY) is embeddings
    for arguments in ({"new_num_tokens": VOCABULARY + 1}, {"pad_to_multiple_of": 64}):
        with pytest.raises(ModelError, match="Resize the original"):
            model.resize_token_embeddings(**arguments)
    assert pickle.loads(pickle.dumps(model)).get_input_embeddings().num_embeddings == VOCABULARY


def test_a_bare_body_and_back(tmp_path):
    model = quantized()
    model.save_pretrained(tmp_path / "whole")
    body = AutoModel.from_pretrained(tmp_path / "whole")
    with torch.no_grad():
        expected = model.model(PROMPT).last_hidden_state
        assert torch.equal(body(PROMPT).last_hidden_state, expected)
    body.save_pretrained(tmp_path / "body")
    assert torch.equal(AutoModel.from_pretrained(tmp_path / "body")(PROMPT).last_hidden_state, expected)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "body")
    assert torch.equal(logits(whole), logits(model))


@pytest.fixture
def device(monkeypatch):
    return Tensorcores("cpu", monkeypatch)


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_the_layout_of_a_tied_head_is_that_of_the_embeddings(bits, device, tmp_path):
    model = quantized(embedding_bits=bits)
    expected, answers = {n: t.clone() for n, t in model.state_dict().items()}, logits(model)
    model.save_pretrained(tmp_path / "planes")
    device.there(model)
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        head, embeddings = head_and_embeddings(other)
        assert head.tiled == embeddings.tiled == (bits in TILED_BITS)
        assert head.weight is embeddings.weight
        assert head.lut is embeddings.lut
        assert torch.equal(logits(other), answers)
        state = other.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    model.save_pretrained(tmp_path / "tiles")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("planes", "tiles")]
    assert files[0] == files[1]
    device.back(model)
    head, embeddings = head_and_embeddings(model)
    assert not head.tiled
    assert head.weight is embeddings.weight
    assert torch.equal(head.weight, expected["lm_head.weight"])
    assert torch.equal(logits(model), answers)


def test_embeddings_that_are_not_tied_keep_their_bit_planes(device):
    model = quantized("llama")
    answers = logits(model)
    device.there(model)
    head, embeddings = head_and_embeddings(model)
    assert (head.tiled, embeddings.tiled) == (True, False)
    assert torch.equal(logits(model), answers)


def test_the_state_dict_of_another_tied_model_is_taken_up(device):
    first, second = device.there(quantized()), device.there(quantized(seed=1, guided=False))
    assert not torch.equal(logits(first), logits(second))
    state = second.state_dict()
    first.load_state_dict(state)
    assert torch.equal(logits(first), logits(second))
    # The embeddings' tensors alone are the head's as well.
    third = device.there(quantized(method="rtn"))
    third.load_state_dict({n: t for n, t in state.items() if "lm_head" not in n}, strict=False)
    assert torch.equal(logits(third), logits(second))
    head, embeddings = head_and_embeddings(third)
    assert head.weight is embeddings.weight
    assert head.tiled


@pytest.mark.parametrize("tiles", [False, True])
def test_compiled_whole(tiles, device):
    torch._dynamo.reset()
    module, _ = embedding(4)
    if tiles:
        module.weight = nn.Parameter(pack_tiles(module.weight, 45), requires_grad=False)
        module._tiled = True
    ids = torch.tensor([[3, 36, 0, 3]])
    assert torch.equal(torch.compile(module, fullgraph=True)(ids), module(ids))
    model = quantized()
    if tiles:
        device.there(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        found = compiled(input_ids=PROMPT, use_cache=False).logits
    torch.testing.assert_close(found, logits(model), rtol=1e-5, atol=1e-5)


def test_an_interrupted_run_goes_on_with_the_embeddings(tmp_path):
    folder = tmp_path / "run"
    first = quantized("llama", run_dir=folder, statistics=tmp_path / "statistics")
    kept = sorted(os.listdir(folder / "layers"))
    removed = [name for name in kept if name.startswith(("lm_head", "model.embed_tokens", "model.layers.0.mlp.up"))]
    assert len(removed) == 3
    for name in removed:
        (folder / "layers" / name).unlink()
    again = quantized("llama", run_dir=folder, statistics=tmp_path / "statistics")
    for name, tensor in first.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    other = quantized("llama", embedding_bits=3, statistics=tmp_path / "statistics")
    assert other.get_output_embeddings().bits == 3


@pytest.mark.parametrize("architecture", ["llama", "llama-tied"])
def test_distilling_compares_with_the_original_head(architecture):
    rows = token_rows(4) * 2
    original = tiny_model(architecture)
    solved = hf_guidedquant.quantize(copy.deepcopy(original), config(dataset=rows, embedding_bits=2))
    settings = {"epochs": 1, "batch_tokens": 64, "learning_rate": 1e-12, "held_back": 0.5}
    model = hf_guidedquant.quantize(copy.deepcopy(original), config(dataset=rows, embedding_bits=2, distill=settings))
    for name in ("weight", "lut"):
        for ours, before in zip(head_and_embeddings(model), head_and_embeddings(solved), strict=True):
            assert torch.equal(getattr(ours, name), getattr(before, name))
    # Which rows are held back is up to the seed; all of them come twice, and the whole is the mean of both halves.
    report = model.quantization_report.distillation
    ids = torch.stack(rows)
    theirs, ours = (logits(m, ids).log_softmax(-1) for m in (original, solved))
    by_row = (theirs.exp() * (theirs - ours)).sum(-1).mean(-1)
    assert float(by_row.min()) < report.held_back[0] < float(by_row.max())
    assert (report.held_back[0] + report.trained[0]) / 2 == pytest.approx(float(by_row.mean()), rel=1e-4)


def test_reconstructed_blocks_read_from_quantized_embeddings():
    changes = {"dataset": token_rows(4) * 2, "reconstruct": {"epochs": 1, "batch_tokens": 64}}
    solved = [
        quantized(embedding_bits=bits, **changes).quantization_report.reconstruction.blocks[0].solved
        for bits in (None, 5, 1)
    ]
    assert solved[0] < solved[1] < solved[2]


def test_push_like_saving_in_shards(tmp_path):
    model = quantized()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


@pytest.mark.parametrize("method", ["lnq", "gptq", "kmeans"])
def test_many_rows_are_solved_some_at_a_time(method, monkeypatch):
    """Each row by itself, so only products of another size may round otherwise."""
    changes = {"method": method, "num_groups": 3, "modules_to_not_convert": ["layers"]}
    whole = quantized("llama", **changes).quantization_report.layers
    planned = plan_layers(tiny_model("llama"), config(**changes)).layers[-1]
    before = planned.solver_bytes(torch.device("cpu"))
    monkeypatch.setattr(importlib.import_module("hf_guidedquant.plan"), "_MOST_ROWS", 10)
    parts = quantized("llama", **changes).quantization_report.layers
    assert planned.rows_at_once == 10
    assert planned.solver_bytes(torch.device("cpu")) < before
    for one, other in zip(whole, parts, strict=True):
        assert one.plan == other.plan
        for stage, value in one.objectives.items():
            assert other.objectives[stage] == pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize("architecture", ["llama", "llama-tied"])
def test_adapters_beside_quantized_embeddings(architecture):
    peft = pytest.importorskip("peft")

    def adapted(targets):
        return peft.get_peft_model(quantized(architecture), peft.LoraConfig(r=2, target_modules=targets))

    model = adapted("all-linear")
    adapters = [name for name, _ in model.named_parameters() if "lora_" in name]
    assert len(adapters) == 28
    assert not any("lm_head" in name or "embed_tokens" in name for name in adapters)
    model(input_ids=PROMPT, labels=PROMPT).loss.backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "lora_B" in n)
    model = adapted(["lm_head"])
    model(input_ids=PROMPT, labels=PROMPT).loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is not None and p.grad.any() and "lm_head" in n]
    with pytest.raises(AdapterError, match="Quantized embeddings take no adapters"):
        adapted(["q_proj", "embed_tokens"])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", *TIED])
def test_quantized_saved_and_loaded_on_a_gpu(architecture, dtype, tmp_path):
    model, again = quantized_and_loaded(tiny_model(architecture), config(), dtype, tmp_path)
    assert isinstance(again.get_input_embeddings(), GuidedEmbedding)
    assert torch.equal(logits(again), logits(model))
    assert_the_cpu_loads_the_same(again, tmp_path)


def test_a_run_that_goes_on_saves_the_same_files(tmp_path):
    """Three groups do not divide the vocabulary, so the head's codebooks are part of larger ones."""
    files = []
    for name in ("first", "second"):
        settings = config(bits=2, embedding_bits=5, num_groups=3, run_dir=tmp_path / "run")
        hf_guidedquant.save(hf_guidedquant.quantize(tiny_model("llama-tied"), settings), tmp_path / name)
        files.append((tmp_path / name / "model.safetensors").read_bytes())
    assert files[0] == files[1]
