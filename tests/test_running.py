"""Running a model another way for a while."""

import pytest
import torch
from conftest import tiny_model
from transformers import masking_utils

from hf_guidedquant.running import rows_of_their_own


@pytest.fixture
def capturing(monkeypatch):
    """As while a CUDA graph is captured."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


def masks(model) -> list:
    """What its attention layers are given."""
    given = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: given.append(kwargs["attention_mask"]), with_kwargs=True
        )
    model(torch.arange(2, 12)[None], use_cache=False)
    return given


def test_attention_needs_no_mask_also_where_a_graph_is_captured(capturing):
    model = tiny_model().eval()
    with rows_of_their_own():
        assert masks(model) == [None] * len(model.model.layers)


def test_what_is_traced_is_still_known_to_be():
    told = []

    def function(x):
        told.append(masking_utils.is_tracing())
        return x + 1

    with rows_of_their_own():
        function(torch.zeros(()))
        torch.jit.trace(function, torch.zeros(()), check_trace=False)
    assert told == [False, True]


def test_functions_of_transformers_come_back():
    own = masking_utils.is_tracing, masking_utils.find_packed_sequence_indices
    with pytest.raises(KeyboardInterrupt), rows_of_their_own():
        assert masking_utils.is_tracing is not own[0]
        raise KeyboardInterrupt
    assert (masking_utils.is_tracing, masking_utils.find_packed_sequence_indices) == own
