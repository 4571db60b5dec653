"""Which kernels run."""

import logging

import pytest
import torch
from conftest import tiny_model, token_rows

import hf_guidedquant
from hf_guidedquant import GuidedQuantConfig
from hf_guidedquant.nn import quantized_modules
from hf_guidedquant.triton_kernels import backend, backend_for, requested_backend, set_backend

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


@pytest.fixture(autouse=True)
def _as_before(monkeypatch):
    monkeypatch.setattr(backend, "_requested", None)
    monkeypatch.delenv(backend.ENVIRONMENT_VARIABLE, raising=False)
    backend._choose.cache_clear()
    yield
    backend._choose.cache_clear()


def test_a_wrong_name_is_refused_before_any_work(monkeypatch):
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "TRITON")
    model = tiny_model()
    with pytest.raises(ValueError, match="HF_GUIDEDQUANT_KERNELS is 'TRITON'; it must be one of auto, tensor_core"):
        hf_guidedquant.quantize(model, GuidedQuantConfig(dataset=token_rows()))
    assert not quantized_modules(model)
    with pytest.raises(ValueError, match="no kernels 'cuda'"):
        set_backend("cuda")


def test_an_empty_variable_is_none(monkeypatch):
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "")
    assert requested_backend() == "auto"
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "triton")
    assert requested_backend() == "triton"
    set_backend("torch")
    assert requested_backend() == "torch"


@pytest.mark.parametrize("asked", backend.BACKENDS)
def test_a_cpu_runs_torch_whatever_was_asked(asked):
    set_backend(asked)
    assert backend_for(CPU) == "torch"


@pytest.mark.parametrize(
    ("asked", "expected", "examined"),
    [
        ("auto", "tensor_core", True),
        ("tensor_core", "tensor_core", True),
        ("triton", "triton", False),
        ("torch", "torch", None),
    ],
)
def test_only_what_was_asked_is_tried_and_the_log_names_it(asked, expected, examined, monkeypatch, caplog):
    tried = []

    def best(device, tensor_cores):
        tried.append(tensor_cores)
        return ("tensor_core" if tensor_cores else "triton"), "some GPU"

    monkeypatch.setattr(backend, "_best", best)
    set_backend(asked)
    with caplog.at_level(logging.INFO):
        assert backend_for(GPU) == expected
        assert backend_for(GPU) == expected
    assert tried == ([] if examined is None else [examined])
    assert [record.getMessage().split(" (")[0] for record in caplog.records] == [f"Kernels on cuda:0: {expected}"]
