"""Perplexity against the definition."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import VOCABULARY, tiny_model

from hf_guidedquant.errors import CalibrationError
from hf_guidedquant.evaluate import perplexity

# float32 against float64: some 40 roundings of 2^-24 each; a token counted twice or left out moves it by per cents.
REL = 1e-5


def ids(count, seed=0):
    return torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))


def by_definition(model, windows):
    losses = []
    for window in windows:
        logits = model.double()(input_ids=window[None]).logits[0]
        losses += [-F.log_softmax(logits[t], -1)[window[t + 1]].item() for t in range(len(window) - 1)]
    return math.exp(sum(losses) / len(losses))


def test_windows_do_not_overlap_and_the_rest_is_left_out():
    model, tokens = tiny_model(), ids(70)
    expected = by_definition(tiny_model(), [tokens[0:16], tokens[16:32], tokens[32:48], tokens[48:64]])
    assert perplexity(model, None, tokens, 16) == pytest.approx(expected, rel=REL)


def test_a_short_text_is_one_short_window():
    tokens = ids(9)
    assert perplexity(tiny_model(), None, tokens, 16) == pytest.approx(by_definition(tiny_model(), [tokens]), rel=REL)


def test_texts_are_tokenized_once_and_joined():
    def tokenizer(text, **kwargs):
        assert kwargs["add_special_tokens"] is False
        return {"input_ids": [ord(c) % VOCABULARY for c in text]}

    model = tiny_model()
    whole = perplexity(model, tokenizer, "abcdefgh\n\nijklmnop", 8)
    assert perplexity(model, tokenizer, ["abcdefgh", "ijklmnop"], 8) == whole


def test_the_models_mode_is_kept():
    model = tiny_model().train()
    perplexity(model, None, ids(20), 8)
    assert model.training


@pytest.mark.parametrize(("count", "context"), [(1, 16), (0, 16), (20, 1)])
def test_too_little_text_is_an_error(count, context):
    with pytest.raises(CalibrationError, match="at least 2 tokens"):
        perplexity(tiny_model(), None, ids(count), context)
