"""Perplexity, and the distance to the original, against their definitions; the speed of decoding."""

import math
from types import SimpleNamespace

import peft
import pytest
import torch
import torch.nn.functional as F
from conftest import ARCHITECTURES, VOCABULARY, tiny_model

import hf_guidedquant
from hf_guidedquant import GuidedQuantConfig
from hf_guidedquant.errors import EvaluationError
from hf_guidedquant.evaluate import compare, decode_speed, perplexity, speed, text

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
    with pytest.raises(EvaluationError, match="at least 2 tokens"):
        perplexity(tiny_model(), None, ids(count), context)


def capped_gemma3():
    """A model that changes its logits after the head."""
    model = tiny_model("gemma3")
    model.config.final_logit_softcapping = 0.5
    return model


MODELS = {**{name: lambda name=name: tiny_model(name) for name in ARCHITECTURES}, "gemma3-capped": capped_gemma3}


def pair(name):
    """A model and its original, both in float64."""
    model = hf_guidedquant.quantize(MODELS[name](), GuidedQuantConfig(bits=2, method="rtn"))
    return model.double(), MODELS[name]().double()


@torch.no_grad()
def comparison_by_definition(model, original, windows):
    losses, original_losses, divergences, agreements = [], [], [], []
    for window in windows:
        ours, theirs = (m(input_ids=window[None]).logits[0].log_softmax(-1).tolist() for m in (model, original))
        for t in range(len(window) - 1):
            losses.append(-ours[t][window[t + 1]])
            original_losses.append(-theirs[t][window[t + 1]])
            divergences.append(sum(math.exp(b) * (b - a) for a, b in zip(ours[t], theirs[t], strict=True)))
            agreements.append(ours[t].index(max(ours[t])) == theirs[t].index(max(theirs[t])))
    mean = [sum(values) / len(values) for values in (losses, original_losses, divergences, agreements)]
    return math.exp(mean[0]), math.exp(mean[1]), mean[2], mean[3]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [5, 8, 16, 17])
def test_comparison_is_that_of_the_definition(name, size, monkeypatch):
    monkeypatch.setattr(text, "_LOGIT_TOKENS", size)
    model, original = pair(name)
    tokens = ids(70)
    expected = comparison_by_definition(model, original, tokens[:68].view(4, 17))
    found = compare(model, original, None, tokens, 17)
    assert (found.tokens, found.context) == (64, 17)
    # Some hundred roundings of 2^-53 on both sides, in log-probabilities of order 10, against a KL above 1e-3.
    assert expected[2] > 1e-3
    assert (found.perplexity, found.original_perplexity, found.kl) == pytest.approx(expected[:3], rel=1e-9)
    assert found.top1 == expected[3]
    assert perplexity(model, None, tokens, 17) == found.perplexity
    assert perplexity(original, None, tokens, 17) == found.original_perplexity


def test_a_model_is_no_distance_from_itself():
    model = tiny_model()
    found = compare(model, model, None, ids(64), 16)
    assert (found.kl, found.top1) == (0, 1)
    assert found.perplexity == found.original_perplexity


def test_kl_is_that_of_the_original_from_the_model():
    """Not the other way round, and in nats: two distributions over two tokens, by hand."""

    def model(*probabilities):
        logits = torch.tensor(probabilities, dtype=torch.float64).log()
        stub = torch.nn.Module()
        stub.weight = torch.nn.Parameter(torch.zeros(1))
        stub.forward = lambda input_ids, use_cache: SimpleNamespace(logits=logits.expand(1, input_ids.shape[1], 2))
        stub.base_model, stub.get_input_embeddings = torch.nn.Module(), lambda: stub
        stub.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace())
        return stub

    found = compare(model(0.2, 0.8), model(0.6, 0.4), None, torch.zeros(4, dtype=torch.int64), 4)
    assert found.kl == pytest.approx(0.6 * math.log(0.6 / 0.2) + 0.4 * math.log(0.4 / 0.8), rel=1e-12)
    assert (found.perplexity, found.original_perplexity) == pytest.approx((1 / 0.2, 1 / 0.6), rel=1e-12)
    assert found.top1 == 0


def test_the_body_runs_once_a_window_and_the_head_on_slices(monkeypatch):
    monkeypatch.setattr(text, "_LOGIT_TOKENS", 6)
    model = tiny_model()
    bodies, heads = [], []
    model.model.layers[0].register_forward_hook(lambda *_: bodies.append(1))
    model.lm_head.register_forward_hook(lambda module, args, output: heads.append(output.shape[1]))
    perplexity(model, None, ids(32), 16)
    assert len(bodies) == 2
    assert heads == [6, 6, 4] * 2
    assert "forward" not in model.model.__dict__


def test_a_model_without_a_body_of_its_own_costs_memory_only(monkeypatch):
    monkeypatch.setattr(text, "_LOGIT_TOKENS", 6)
    model, tokens = tiny_model(), ids(32)
    expected = perplexity(model, None, tokens, 16)
    model.base_model_prefix = "nothing"
    assert model.base_model is model
    heads = []
    model.lm_head.register_forward_hook(lambda module, args, output: heads.append(output.shape[1]))
    assert perplexity(model, None, tokens, 16) == pytest.approx(expected, rel=REL)
    assert heads == [16, 16]


@pytest.mark.parametrize("context", [4, 16])
def test_learned_prompts_come_before_the_text(context, monkeypatch):
    monkeypatch.setattr(text, "_LOGIT_TOKENS", 6)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model, tokens = peft.get_peft_model(tiny_model(), config).eval(), ids(32)
    windows = tokens.split(context)
    with torch.no_grad():
        losses = [F.cross_entropy(model(input_ids=w[None]).logits[0, 4:-1].double(), w[1:]) for w in windows]
    assert perplexity(model, None, tokens, context) == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-6)


def test_an_error_leaves_the_model_as_it_was(monkeypatch):
    model = tiny_model().train()
    model.model.layers[1].eval()

    def fail(*args):
        raise KeyboardInterrupt

    handle = model.lm_head.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        perplexity(model, None, ids(16), 16)
    handle.remove()
    assert "forward" not in model.model.__dict__
    assert model.training and not model.model.layers[1].training


def test_other_vocabularies_are_refused():
    other = tiny_model()
    other.resize_token_embeddings(VOCABULARY + 8)
    with pytest.raises(EvaluationError, match=f"has {VOCABULARY + 8} entries, the model's {VOCABULARY}"):
        compare(tiny_model(), other, None, ids(16), 16)


def test_a_context_beyond_that_of_either_model_is_refused():
    other = tiny_model()
    other.config.max_position_embeddings = 16
    for models in ((tiny_model(), other), (other, tiny_model())):
        with pytest.raises(EvaluationError, match="context of 16 tokens"):
            compare(*models, None, ids(64), 17)


@pytest.mark.parametrize("prompt", [ids(5), ids(10).view(2, 5)])
def test_decode_speed_counts_the_new_tokens_of_all_rows(prompt, monkeypatch):
    model = tiny_model()
    clock = iter([0, 100, 200, 204, 300, 301, 400, 402])
    monkeypatch.setattr(speed, "perf_counter", lambda: next(clock))
    lengths = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda *a, **k: lengths.append(generate(*a, **k)) or lengths[-1])
    found = decode_speed(model, prompt, new_tokens=7, runs=3)
    rows = 1 if prompt.ndim == 1 else 2
    assert [tuple(output.shape) for output in lengths] == [(rows, 12)] * 4
    # The first call warms up; of 4, 1 and 2 seconds the median is 2.
    assert found.tokens_per_second == rows * 7 / 2
    assert (found.new_tokens, found.prompt_tokens, found.batch, found.runs) == (7, 5, rows, 3)
    assert (found.dtype, found.device) == ("float32", "1 CPU threads")
    assert "7 tokens after a prompt of 5" in found.describe()


def test_decode_speed_hands_options_to_generate():
    seen = []

    def loop(model, input_ids, **options):
        seen.append(model)
        return torch.cat([input_ids, input_ids[:, :1].expand(-1, 3)], dim=1)

    model = tiny_model()
    decode_speed(model, ids(5), 3, runs=1, custom_generate=loop)
    assert seen == [model, model]


@pytest.mark.parametrize(("tokens", "new_tokens", "runs"), [(0, 4, 1), (5, 0, 1), (5, 4, 0), (60, 5, 1)])
def test_speed_of_nothing_or_beyond_the_context_is_refused(tokens, new_tokens, runs):
    with pytest.raises(EvaluationError):
        decode_speed(tiny_model(), ids(tokens), new_tokens, runs)


@pytest.mark.parametrize("measure", [perplexity, lambda *given: compare(given[0], *given)])
def test_nothing_is_kept_for_a_backward_pass(measure):
    model, modes = tiny_model().requires_grad_(True), []
    model.lm_head.register_forward_hook(lambda module, args, output: modes.append(output.requires_grad))
    measure(model, None, torch.randint(VOCABULARY, (64,)), 16)
    assert modes and not any(modes)
