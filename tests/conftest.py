"""Tiny models and data that all tests share."""

import logging
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Tiny tensors: a second thread costs more than it does, above all on a busy machine.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hf_guidedquant.calibration import Footprint, outline
from hf_guidedquant.plan import plan_layers
from hf_guidedquant.resources import compute_device

VOCABULARY = 128
_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


def _llama(blocks: int, tied: bool = False) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**_SIZES, num_hidden_layers=blocks, tie_word_embeddings=tied, mlp_bias=True))


def _gpt2(blocks: int) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=64,
            n_layer=blocks,
            n_head=4,
            n_positions=64,
            vocab_size=VOCABULARY,
            bos_token_id=0,
            eos_token_id=1,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )


ARCHITECTURES = {
    "llama": _llama,
    "llama-tied": lambda blocks: _llama(blocks, tied=True),
    "qwen3": lambda blocks: Qwen3ForCausalLM(Qwen3Config(**_SIZES, num_hidden_layers=blocks)),
    "gemma3": lambda blocks: Gemma3ForCausalLM(Gemma3TextConfig(**_SIZES, num_hidden_layers=blocks, sliding_window=32)),
    "gpt2": _gpt2,
}


def tiny_model(architecture: str = "llama", seed: int = 0, blocks: int = 2):
    """A random model of the named architecture in fp32, the same for the same seed. The caller's RNG is untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ARCHITECTURES[architecture](blocks).eval()


def token_rows(count: int = 8, length: int = 33, seed: int = 0) -> list[torch.Tensor]:
    """Random token rows, int64 ``[length]`` each."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, VOCABULARY, (length,), generator=generator) for _ in range(count)]


def memory_for(model, config, blocks: int = 1) -> float:
    """The least ``max_memory`` with which so many decoder blocks make a segment."""

    def place(device):
        return compute_device(device, config.device)

    footprint = Footprint(model, plan_layers(model, config).layers, outline(model, 33, config.guided, place), place)
    needs = [footprint(start, start + blocks) for start in range(footprint.count - blocks + 1)]
    return max((need[device] + footprint.resident[device]) / 2**30 for need in needs for device in need)


def quantized_and_loaded(dense, config, dtype, folder, device_map="cuda:0"):
    """A model quantized as it is loaded, and what is loaded on ``cuda:0`` of the files that it is saved as."""
    dense.save_pretrained(folder / "dense")
    model = AutoModelForCausalLM.from_pretrained(
        folder / "dense", dtype=dtype, device_map=device_map, quantization_config=config
    )
    model.save_pretrained(folder / "quantized")
    return model, AutoModelForCausalLM.from_pretrained(folder / "quantized", device_map="cuda:0")


def assert_the_cpu_loads_the_same(model, folder):
    """The tensors of what :func:`quantized_and_loaded` has saved."""
    state, elsewhere = (m.state_dict() for m in (model, AutoModelForCausalLM.from_pretrained(folder / "quantized")))
    assert state.keys() == elsewhere.keys()
    assert all(torch.equal(tensor.cpu(), elsewhere[name]) for name, tensor in state.items())


@pytest.fixture(params=list(ARCHITECTURES))
def any_model(request):
    """A tiny random model of each architecture in turn."""
    return tiny_model(request.param)


@pytest.fixture
def llama():
    return tiny_model("llama")


@pytest.fixture
def rows():
    return token_rows()


@pytest.fixture
def log(caplog):
    """What the package logs, notices included."""
    logging.getLogger("hf_guidedquant").propagate = True
    caplog.set_level(logging.INFO, logger="hf_guidedquant")
    return caplog


@pytest.fixture
def dense_products_in_fp32(monkeypatch):
    """By default torch lets cuBLAS add up parts of 16-bit products in 16 bits."""
    for name in ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction"):
        monkeypatch.setattr(torch.backends.cuda.matmul, name, False)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
