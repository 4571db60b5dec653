"""The graphed decode loop says what plain ``generate`` says. Without a GPU the same step runs kernel by kernel."""

import copy
import functools
import gc
import logging
import pickle
import traceback
import warnings
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import accelerate
import peft
import pytest
import torch
from conftest import VOCABULARY, tiny_model, token_rows
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    DynamicCache,
    FalconConfig,
    FalconForCausalLM,
    StoppingCriteria,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.generation.streamers import BaseStreamer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import hf_guidedquant
from hf_guidedquant import GuidedQuantConfig, replay
from hf_guidedquant.decoding import GraphedDecode, attention, capture, prompt
from hf_guidedquant.decoding.cache import share_column
from hf_guidedquant.decoding.step import DecodeStep
from hf_guidedquant.errors import DecodingError, NonFiniteScoresError
from hf_guidedquant.triton_kernels import decode_attention

PROMPT = torch.arange(2, 10)[None]
ARCHITECTURES = ["llama", "qwen3", "gemma3", "gpt2"]


@pytest.fixture
def graphed():
    return GraphedDecode()


@pytest.fixture
def model():
    return prepared()


def prepared(architecture="llama"):
    """A model that answers with many different tokens, and does not stop by itself."""
    model = tiny_model(architecture)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= 4
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 1
    return model


def padded_batch(batch_size=3, length=9, seed=0):
    """Token ids with left padding, and their mask."""
    ids = torch.randint(2, VOCABULARY, (batch_size, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    mask[-1, : length - 2] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}


def both(model, graphed, **kwargs):
    """The answers of plain ``generate`` and of the graphed loop, each under the same seed."""
    answers = []
    for method in (None, graphed):
        torch.manual_seed(0)
        answers.append(model.generate(**{"do_sample": False, "max_new_tokens": 12, **kwargs}, custom_generate=method))
    return answers


def step_of(graphed, model):
    (step,) = graphed._steps[model].values()
    return step


@pytest.fixture
def same_draws(monkeypatch):
    """Let plain ``generate`` draw as the graphed loop does."""

    def multinomial(probabilities, num_samples):
        return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(dim=-1, keepdim=True)

    monkeypatch.setattr(torch, "multinomial", multinomial)


class Recorder(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], 0

    def put(self, value):
        self.tokens.append(value.tolist())

    def end(self):
        self.ended += 1


class FakeReplay:
    """Stands in for :class:`replay.Replay` without a GPU."""

    capturable = True

    def __init__(self):
        self.runs = self.resets = 0

    def __call__(self, function):
        self.runs += 1
        function()

    def reset(self):
        self.resets += 1


@pytest.fixture
def prompts(monkeypatch):
    """Lets a step read short prompts as on a GPU, without a graph. Collects their padded lengths."""
    columns, read_once = [], prompt._Pass.run

    def counted(self, *args):
        columns.append(len(self._columns))
        return read_once(self, *args)

    monkeypatch.setattr(prompt._Pass, "run", counted)
    monkeypatch.setattr(prompt, "Replay", lambda *args: FakeReplay())
    initialize = DecodeStep.__init__

    def with_prompts(self, cache, cache_length, settings):
        initialize(self, cache, cache_length, settings)
        self._prompts = prompt.PromptReader(cache, cache_length, settings.device)

    monkeypatch.setattr(DecodeStep, "__init__", with_prompts)
    return columns


class After(StoppingCriteria):
    """Stop a row once it holds a token."""

    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, PROMPT.shape[1] :] == self.token).any(dim=1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_tokens_are_those_of_plain_generate(architecture, graphed):
    model = prepared(architecture)
    # Longer than Gemma's window of 32.
    plain, ours = both(model, graphed, inputs=PROMPT, max_new_tokens=40)
    assert torch.equal(plain, ours)
    assert len(set(ours[0].tolist())) > 8
    for _ in range(2):
        plain, ours = both(model, graphed, **padded_batch(), max_new_tokens=30)
        assert torch.equal(plain, ours)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_rows_end_at_any_of_several_stop_tokens(architecture, graphed):
    model = prepared(architecture)
    inputs = padded_batch()
    endless = model.generate(**inputs, do_sample=False, max_new_tokens=30)[:, 9:]
    # The rows end at different times, all before the limit.
    stops = [int(endless[0, 3]), int(endless[1, 10]), int(endless[2, 15]), VOCABULARY + 7]
    plain, ours = both(model, graphed, **inputs, eos_token_id=stops, max_new_tokens=30)
    assert torch.equal(plain, ours)
    assert ours.shape[1] < 9 + 30
    assert (ours[:, -1] == 1).any()
    for kwargs in ({"min_new_tokens": 8}, {"min_length": 14}):
        plain, ours = both(model, graphed, **inputs, **kwargs, eos_token_id=stops, max_new_tokens=30)
        assert torch.equal(plain, ours)
    plain, ours = both(model, graphed, **inputs, eos_token_id=stops[0], pad_token_id=99, max_new_tokens=20)
    assert torch.equal(plain, ours)
    # Without a processor, with that of `min_new_tokens`, and with that of `min_length`.
    assert len(graphed._steps[model]) == 3


def test_one_token_and_max_length(model, graphed):
    for kwargs in ({"max_new_tokens": 1}, {"max_new_tokens": None, "max_length": 11}):
        plain, ours = both(model, graphed, inputs=PROMPT, **kwargs)
        assert torch.equal(plain, ours)


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True},
        {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8},
        {"do_sample": True, "top_k": 0, "min_p": 0.05},
        {"do_sample": True, "typical_p": 0.5, "epsilon_cutoff": 0.01, "renormalize_logits": True},
        {"do_sample": True, "repetition_penalty": 1.5, "remove_invalid_values": True},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.7, "min_new_tokens": 6, "eos_token_id": [3, 4]},
        {"suppress_tokens": list(range(2, 90)), "min_length": 15, "eos_token_id": 95},
    ],
)
def test_logits_processors_do_what_they_do_in_plain_generate(settings, model, graphed, same_draws):
    for inputs in (padded_batch(), padded_batch(seed=1)):
        plain, ours = both(model, graphed, **inputs, **settings, max_new_tokens=20)
        assert torch.equal(plain, ours)
    assert len(graphed._steps[model]) == 1


def test_draws_follow_the_probabilities(llama, graphed):
    """4000 rows draw one token: every frequency is within six standard deviations of its probability."""
    rows = PROMPT.expand(4000, -1)
    torch.manual_seed(0)
    tokens = llama.generate(rows, do_sample=True, top_k=0, max_new_tokens=1, custom_generate=graphed)[:, -1]
    with torch.no_grad():
        probabilities = llama(PROMPT).logits[0, -1].softmax(-1).double()
    frequencies = torch.bincount(tokens, minlength=VOCABULARY).double() / len(rows)
    deviation = (probabilities * (1 - probabilities) / len(rows)).sqrt()
    assert ((frequencies - probabilities).abs() <= 6 * deviation).all()


def test_a_seed_repeats_the_draws(model, graphed):
    def draw(seed):
        torch.manual_seed(seed)
        return model.generate(PROMPT, do_sample=True, max_new_tokens=12, custom_generate=graphed)

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


def test_only_the_top_tokens_are_drawn(model, graphed):
    greedy = model.generate(PROMPT, do_sample=False, max_new_tokens=12)
    kwargs = {"do_sample": True, "max_new_tokens": 12, "custom_generate": graphed}
    assert torch.equal(model.generate(PROMPT, top_k=1, **kwargs), greedy)
    drawn = model.generate(PROMPT.expand(20, -1), top_k=3, **kwargs)
    with torch.no_grad():
        top = model(drawn).logits[:, PROMPT.shape[1] - 1 : -1].topk(3).indices
    assert (top == drawn[:, PROMPT.shape[1] :, None]).any(-1).all()
    assert len(drawn.unique(dim=0)) > 10


def test_several_sequences_per_prompt(model, graphed, same_draws):
    plain, ours = both(model, graphed, **padded_batch(), do_sample=True, num_return_sequences=2)
    assert ours.shape[0] == 6
    assert torch.equal(plain, ours)


@pytest.mark.parametrize("wrap", [lambda loop: loop, lambda loop: lambda *args, **kwargs: loop(*args, **kwargs)])
def test_a_streamer_gets_the_same_as_from_plain_generate(wrap, model, graphed):
    endless = model.generate(PROMPT, do_sample=False, max_new_tokens=20)
    stop = int(endless[0, 17])
    for kwargs in ({}, {"eos_token_id": stop}, {"stopping_criteria": [After(stop)]}):
        recorders = Recorder(), Recorder()
        for recorder, method in zip(recorders, (None, wrap(graphed)), strict=True):
            model.generate(
                PROMPT, do_sample=False, max_new_tokens=20, streamer=recorder, custom_generate=method, **kwargs
            )
        assert recorders[0].tokens == recorders[1].tokens
        assert recorders[1].ended == 1


def test_other_stopping_criteria(model, graphed):
    rows = PROMPT.repeat(2, 1)
    rows[1, 0] = 77
    endless = model.generate(rows, do_sample=False, max_new_tokens=20)
    for criteria in ([After(int(endless[0, 12]))], [After(int(endless[0, 10])), After(int(endless[1, 14]))]):
        plain, ours = both(model, graphed, inputs=rows, stopping_criteria=criteria, max_new_tokens=20)
        assert torch.equal(plain, ours)
        # With a stop token, rows that are done are padded.
        plain, ours = both(model, graphed, inputs=rows, stopping_criteria=criteria, eos_token_id=0, max_new_tokens=20)
        assert torch.equal(plain, ours)
    plain, ours = both(model, graphed, inputs=rows, max_time=0.0)
    assert torch.equal(plain, ours)
    assert ours.shape[1] == rows.shape[1] + 1


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"num_beams": 2}, "beam search"),
        ({"no_repeat_ngram_size": 2}, "NoRepeatNGramLogitsProcessor"),
        ({"logits_processor": [lambda ids, scores: scores]}, "function"),
        ({"prompt_lookup_num_tokens": 2}, "assisted generation"),
        ({"return_dict_in_generate": True, "output_scores": True}, "output_scores"),
    ],
)
def test_what_it_cannot_do_is_named(kwargs, named, model, graphed):
    with pytest.raises(DecodingError, match=f"{named}.*without custom_generate"):
        model.generate(PROMPT, max_new_tokens=4, custom_generate=graphed, **kwargs)


def test_an_input_that_would_grow_is_refused(model, graphed, monkeypatch):
    prepare = type(model).prepare_inputs_for_generation

    def with_history(self, ids, **kwargs):
        return prepare(self, ids, **kwargs) | {"history": ids}

    model.generate(PROMPT, max_new_tokens=2, custom_generate=graphed)
    monkeypatch.setattr(type(model), "prepare_inputs_for_generation", with_history)
    with pytest.raises(DecodingError, match="history"):
        model.generate(PROMPT, max_new_tokens=2, custom_generate=graphed)


def test_an_assistant_is_refused(model, graphed):
    with pytest.raises(DecodingError, match="assisted"):
        model.generate(PROMPT, max_new_tokens=4, assistant_model=tiny_model(), custom_generate=graphed)


def test_sequences_in_a_dictionary(model, graphed):
    plain, ours = both(model, graphed, inputs=PROMPT, return_dict_in_generate=True)
    assert torch.equal(plain.sequences, ours.sequences)


def test_embeddings_as_the_prompt(model, graphed):
    inputs = padded_batch()
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    plain, ours = both(model, graphed, inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
    assert torch.equal(plain, ours)


def test_in_and_out_of_inference_mode(model, graphed):
    for _ in range(2):
        with torch.inference_mode():
            plain, ours = both(model, graphed, inputs=PROMPT)
            assert torch.equal(plain, ours)
        plain, ours = both(model, graphed, inputs=PROMPT)
        assert torch.equal(plain, ours)


@pytest.mark.parametrize("static", [False, True])
def test_a_quantized_model(static, graphed):
    model = hf_guidedquant.quantize(prepared(), GuidedQuantConfig(bits=2, dataset=token_rows()))
    kwargs = {"cache_implementation": "static"} if static else {}
    plain, ours = both(model, graphed, **padded_batch(), **kwargs)
    assert torch.equal(plain, ours)
    assert len(graphed._steps) == 1


def test_what_cannot_be_captured_decodes_as_ever_and_says_so_once(graphed, caplog):
    model = prepared()
    with caplog.at_level(logging.WARNING, "hf_guidedquant"):
        for _ in range(2):
            plain, ours = both(model, graphed, inputs=PROMPT, use_cache=False)
            assert torch.equal(plain, ours)
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(PROMPT[:, :5], past_key_values=cache)
        ours = model.generate(
            PROMPT, past_key_values=cache, do_sample=False, max_new_tokens=12, custom_generate=graphed
        )
        assert torch.equal(plain, ours)
        with torch.autocast("cpu", torch.bfloat16):
            plain, ours = both(model, graphed, inputs=PROMPT)
            assert torch.equal(plain, ours)
        small = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": VOCABULARY}
        plain, ours = both(
            T5ForConditionalGeneration(T5Config(**small, decoder_start_token_id=0)), graphed, inputs=PROMPT
        )
        assert torch.equal(plain, ours)
    assert not graphed._steps
    messages = [record.message for record in caplog.records]
    assert len(messages) == 4
    assert all("own loop" in message for message in messages)


def test_a_model_whose_positions_depend_on_the_length_decodes_as_ever(graphed):
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    config = copy.deepcopy(tiny_model().config)
    config.max_position_embeddings, config.rope_parameters = 10, rope
    model = type(tiny_model())(config).eval()
    plain, ours = both(model, graphed, inputs=PROMPT)
    assert torch.equal(plain, ours)
    assert not graphed._steps


def _virtual_tokens(kind):
    config = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    return peft.get_peft_model(prepared(), getattr(peft, f"{kind}Config")(**config)).eval()


def _alibi():
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY}
    return FalconForCausalLM(FalconConfig(**small, alibi=True, eos_token_id=None, pad_token_id=1)).eval()


def _offloaded():
    return accelerate.cpu_offload(prepared(), execution_device=torch.device("cpu"))


@pytest.mark.parametrize(
    "make",
    [lambda: _virtual_tokens("PromptTuning"), lambda: _virtual_tokens("PrefixTuning"), _alibi, _offloaded],
    ids=["prompt-tuning", "prefix-tuning", "alibi", "offloaded"],
)
def test_a_model_that_the_step_does_not_suit_decodes_as_ever(make, graphed):
    plain, ours = both(make(), graphed, input_ids=PROMPT)
    assert torch.equal(plain, ours)
    assert not graphed._steps


def test_scores_that_are_nan_are_an_error_as_in_plain_generate(model, graphed):
    kwargs = {"do_sample": True, "max_new_tokens": 4}
    model.generate(PROMPT, **kwargs, custom_generate=graphed)
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    with pytest.raises(RuntimeError):
        model.generate(PROMPT, **kwargs)
    with pytest.raises(NonFiniteScoresError):
        model.generate(PROMPT, **kwargs, custom_generate=graphed)
    with torch.no_grad():
        model.lm_head.weight[5] = 0
    model.generate(PROMPT, **kwargs, custom_generate=graphed)


def test_calls_share_a_step(model, graphed):
    model.generate(PROMPT, max_new_tokens=4, custom_generate=graphed)
    step = step_of(graphed, model)
    cache = step.cache.layers[0].keys
    for length in (2, 5):
        plain, ours = both(model, graphed, inputs=PROMPT[:, :length], max_new_tokens=9)
        assert torch.equal(plain, ours)
        assert step_of(graphed, model) is step
        assert step.cache.layers[0].keys is cache
    assert step.cache_length == cache.shape[2] == 512


def test_buffers_stay_where_they_are(model, graphed):
    """A graph reads and writes the memory that was there when it was captured."""
    settings = {"repetition_penalty": 1.3, "min_new_tokens": 3, "eos_token_id": 5}
    both(model, graphed, **padded_batch(), **settings)
    step = step_of(graphed, model)

    def places():
        held = [vars(step), *map(vars, step._processors), *map(vars, step.cache.layers)]
        return [capture.facts(each) for each in held]

    before = places()
    for length in (9, 5, 30):
        both(model, graphed, **padded_batch(seed=length, length=length), **settings, max_new_tokens=length)
        assert places() == before
    assert step_of(graphed, model) is step


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_short_prompts_are_padded_and_answered_as_ever(architecture, graphed, prompts):
    model = prepared(architecture)
    # The first makes the cache. Longer than Gemma's window, shorter, and what padding of a longer one has filled.
    for length in (9, 40, 30, 17, 16, 3, 1, 50):
        ids = torch.randint(2, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(length))
        plain, ours = both(model, graphed, inputs=ids)
        assert torch.equal(plain, ours)
    assert prompts == [64, 32, 32, 16, 16, 16, 64]
    for seed in range(3):
        plain, ours = both(model, graphed, **padded_batch(seed=seed), max_new_tokens=30)
        assert torch.equal(plain, ours)
    assert prompts[7:] == [16, 16]


class Waits(TorchDispatchMode):
    """Notices where values are asked for, for which the host would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.places = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.places.append("".join(traceback.format_stack(limit=6)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_to_read_a_short_prompt_the_host_never_waits(implementation, architecture, graphed, prompts, attended):
    model = prepared(architecture)
    model.set_attn_implementation(implementation)
    for seed in range(2):
        model.generate(**padded_batch(seed=seed), max_new_tokens=2, custom_generate=graphed)
    (reading,) = step_of(graphed, model)._prompts._passes.values()
    share_column(reading._cache, reading._columns)
    with torch.no_grad(), Waits() as waits:
        reading._forward(model)
    assert not waits.places
    with Waits() as waits:
        assert torch.ones(1).all()
    assert waits.places


def test_samples_and_processors_see_the_prompt_without_padding(model, graphed, prompts, same_draws):
    settings = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 0, "min_new_tokens": 3, "eos_token_id": 5}
    for seed in range(3):
        plain, ours = both(model, graphed, **padded_batch(seed=seed), **settings, do_sample=True, max_new_tokens=20)
        assert torch.equal(plain, ours)
    assert prompts == [16, 16]


def test_scores_of_one_column_from_a_model_that_gives_those_of_all(model, graphed, prompts, monkeypatch):
    forward = type(model).forward

    @functools.wraps(forward)
    def of_all_columns(self, *args, logits_to_keep=0, **kwargs):
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", of_all_columns)
    for length in (5, 5, 8):
        plain, ours = both(model, graphed, inputs=PROMPT[:, :length])
        assert torch.equal(plain, ours)
    assert prompts == [16, 16]


@pytest.mark.parametrize(
    "kwargs",
    [
        {"inputs": torch.arange(2, 260)[None] % VOCABULARY},
        {"inputs": PROMPT.repeat(20, 1)},
        {"inputs": PROMPT, "prefill_chunk_size": 4},
        {"input_ids": PROMPT, "attention_mask": torch.ones_like(PROMPT), "token_type_ids": torch.zeros_like(PROMPT)},
        {"inputs_embeds": True},
    ],
)
def test_other_prompts_are_read_without_padding(kwargs, graphed, prompts):
    model = prepared("gpt2" if "token_type_ids" in kwargs else "llama")
    if "inputs_embeds" in kwargs:
        kwargs = {"inputs_embeds": model.get_input_embeddings()(PROMPT)}
    for _ in range(3):
        plain, ours = both(model, graphed, **kwargs)
        assert torch.equal(plain, ours)
    assert not prompts


def test_prompts_that_make_the_host_wait_are_read_as_ever_from_then_on(model, graphed, prompts):
    for _ in range(2):
        both(model, graphed, inputs=PROMPT)
    reader = step_of(graphed, model)._prompts
    reader._passes[16]._replay.capturable = False
    for length in (8, 8, 20):
        plain, ours = both(model, graphed, inputs=PROMPT[:, :1].repeat(1, length))
        assert torch.equal(plain, ours)
        assert not reader._passes
    assert prompts == [16, 16]


def test_hooks_hear_of_prompts(model, graphed, prompts):
    for _ in range(2):
        both(model, graphed, inputs=PROMPT)
    assert prompts == [16]
    heard = []
    hook = model.model.norm.register_forward_hook(lambda module, args, output: heard.append(output.shape[1]))
    for _ in range(2):
        model.generate(PROMPT, max_new_tokens=2, custom_generate=graphed)
    assert heard.count(8) == 2
    assert prompts == [16]
    hook.remove()
    both(model, graphed, inputs=PROMPT)
    assert prompts == [16, 16]


def test_hooks_that_transformers_leaves_do_not_count_and_those_of_all_modules_do(model, graphed, prompts):
    model(PROMPT, output_hidden_states=True)
    for _ in range(2):
        both(model, graphed, inputs=PROMPT)
    assert prompts == [16]
    heard = []
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *args: heard.append(args))
    try:
        # Also where the model is what it was.
        model.generate(PROMPT, max_new_tokens=1, custom_generate=graphed)
    finally:
        hook.remove()
    assert heard
    accelerate.hooks.add_hook_to_module(model.model.norm, accelerate.hooks.ModelHook())
    both(model, graphed, inputs=PROMPT)
    assert prompts == [16]


def test_padding_is_of_the_prompts_own_tokens(model, graphed, prompts):
    with torch.no_grad():
        model.model.embed_tokens.weight[[0, 1]] = torch.nan
    for _ in range(3):
        plain, ours = both(model, graphed, inputs=PROMPT)
        assert torch.equal(plain, ours)
    assert prompts == [16, 16]


def test_graphs_of_prompts_are_dropped_with_what_they_rest_on(model, graphed, prompts):
    for length in (8, 8, 20):
        both(model, graphed, inputs=PROMPT[:, :1].repeat(1, length))
    reader = step_of(graphed, model)._prompts
    before = dict(reader._passes)
    assert list(before) == [16, 32]
    both(model, graphed, inputs=PROMPT)
    assert reader._passes[16] is before[16]
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 2)
    both(model, graphed, inputs=PROMPT)
    assert list(reader._passes) == [16]
    assert reader._passes[16] is not before[16]


def test_few_steps_are_kept_and_can_be_released(model, graphed):
    for batch_size in range(1, 7):
        model.generate(PROMPT.repeat(batch_size, 1), max_new_tokens=2, custom_generate=graphed)
    kept = list(graphed._steps[model].values())
    assert [step.settings.batch_size for step in kept] == [3, 4, 5, 6]
    graphed.release(model)
    assert not graphed._steps
    graphed.release(model)
    model.generate(PROMPT, max_new_tokens=2, custom_generate=graphed)
    graphed.release()
    assert not graphed._steps


def test_a_call_inside_a_call_gets_a_step_of_its_own(model, graphed):
    expected = model.generate(PROMPT, do_sample=False, max_new_tokens=12)

    class Nested(Recorder):
        def put(self, value):
            again = model.generate(PROMPT, do_sample=False, max_new_tokens=12, custom_generate=graphed)
            assert torch.equal(again, expected)

    kwargs = {"do_sample": False, "max_new_tokens": 12, "custom_generate": graphed}
    assert torch.equal(model.generate(PROMPT, streamer=Nested(), **kwargs), expected)


def test_a_failure_leaves_the_loop_usable(model, graphed):
    class Failing(Recorder):
        def end(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.generate(PROMPT, max_new_tokens=4, streamer=Failing(), custom_generate=graphed)
    plain, ours = both(model, graphed, inputs=PROMPT)
    assert torch.equal(plain, ours)


def test_the_model_stays_an_ordinary_one(model, graphed, tmp_path):
    expected = model.generate(PROMPT, do_sample=False, max_new_tokens=6, custom_generate=graphed)
    model.save_pretrained(tmp_path)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        kwargs = {"do_sample": False, "max_new_tokens": 6, "custom_generate": graphed}
        assert torch.equal(again.generate(PROMPT, **kwargs), expected)
    assert len(graphed._steps) == 2
    watch = weakref.ref(again)
    del again
    gc.collect()
    assert watch() is None
    assert len(graphed._steps) == 1


def test_replaced_weights_are_noticed(model, graphed):
    both(model, graphed, inputs=PROMPT)
    replay = step_of(graphed, model)._replay = FakeReplay()
    both(model, graphed, inputs=PROMPT)
    assert (replay.runs, replay.resets) == (11, 0)
    other = tiny_model(seed=1)
    for mine, others in zip(model.parameters(), other.parameters(), strict=True):
        mine.data = others.data
    plain, ours = both(model, graphed, inputs=PROMPT)
    assert torch.equal(plain, ours)
    assert (replay.runs, replay.resets) == (22, 1)
    plain, ours = both(model.to(torch.bfloat16), graphed, inputs=PROMPT)
    assert torch.equal(plain, ours)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.train(),
        lambda model: model.set_attn_implementation("eager"),
        lambda model: model.model.norm.register_forward_hook(lambda *args: None),
        lambda model: setattr(model.lm_head, "weight", torch.nn.Parameter(model.lm_head.weight.clone())),
        lambda model: setattr(model.lm_head, "_disable_adapters", True),
        lambda model: setattr(model.lm_head, "scaling", {"default": 2.0}),
        lambda model: setattr(model.lm_head, "compute_dtype", torch.bfloat16),
        lambda model: setattr(model.lm_head, "forward", lambda x: x),
        lambda model: setattr(model.config, "final_logit_softcapping", 30.0),
    ],
)
def test_a_changed_model_is_noticed(change, model):
    facts = capture.model_facts(model)
    change(model)
    assert capture.model_facts(model) != facts


def test_what_dense_copies_are_made_of_is_noticed():
    model = hf_guidedquant.quantize(prepared(), GuidedQuantConfig(bits=2, method="rtn", cache_dequantized=True))
    model(PROMPT)
    facts = capture.model_facts(model)
    assert capture.model_facts(model) == facts
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.lut.neg_()
    assert capture.model_facts(model) != facts


@pytest.fixture
def attended(monkeypatch):
    """Lets the step use the attention that it uses on GPUs, in fp32, and collects the numbers of queries it is for."""
    queries = []

    def counted(query, *args):
        queries.append(query.shape[2])
        return decode_attention(query, *args)

    monkeypatch.setattr(attention, "backend_for", lambda device: "triton")
    monkeypatch.setattr(attention, "decode_attention", counted)
    monkeypatch.setattr(attention, "_DTYPES", (torch.float32,))
    return queries


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_step_attends_by_itself_and_the_model_does_not_notice(architecture, graphed, attended):
    model = prepared(architecture)
    plain, ours = both(model, graphed, **padded_batch(), max_new_tokens=30)
    assert torch.equal(plain, ours)
    assert len(attended) == 29 * model.config.num_hidden_layers
    assert model.config._attn_implementation == "sdpa"
    before = len(attended)
    model.generate(PROMPT, max_new_tokens=3)
    model.set_attn_implementation("eager")
    both(model, graphed, inputs=PROMPT)
    assert len(attended) == before


@pytest.mark.parametrize(("capability", "suits"), [((7, 5), False), ((8, 0), True), ((9, 4), True)])
def test_old_gpus_attend_with_torch(capability, suits, monkeypatch):
    monkeypatch.setattr(attention, "backend_for", lambda device: "triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert attention._has_kernel(torch.device("cuda:0")) is suits


def test_attention_that_the_kernel_does_not_know_is_that_of_sdpa(attended):
    module = torch.nn.Module()
    query, key, value = (torch.randn(2, 4, n, 16) for n in (1, 6, 6))
    for arguments in (
        {"attention_mask": torch.randn(2, 1, 1, 6)},
        {"attention_mask": torch.rand(2, 4, 1, 6) > 0.3},
        {"attention_mask": None, "position_bias": torch.randn(2, 4, 1, 6)},
    ):
        ours, _ = attention.decode_attention_forward(module, query, key, value, **arguments)
        theirs, _ = sdpa_attention_forward(module, query, key, value, **arguments)
        assert torch.equal(ours, theirs)
    assert not attended


@pytest.fixture
def dynamo_only(monkeypatch):
    """Trace as for compilation, without the compiler."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_step_is_one_compiled_graph(architecture, dynamo_only):
    graphed, model = GraphedDecode(compile=True), prepared(architecture)
    torch._dynamo.utils.counters.clear()
    for inputs in (padded_batch(), padded_batch(seed=1)):
        plain, ours = both(model, graphed, **inputs, max_new_tokens=30)
        assert torch.equal(plain, ours)
    assert step_of(graphed, model)._forward._compiled is not None
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    watch = weakref.ref(model)
    del model
    gc.collect()
    assert watch() is None
    assert not graphed._steps


def test_every_step_compiles_code_of_its_own(dynamo_only):
    """Since torch.compile gives up after eight variants of the same code."""
    for length in range(1, 12):
        doubled = capture.Compiled(_double)
        assert torch.equal(doubled(torch.ones(length)), torch.full((length,), 2.0))
        assert doubled._compiled is not None


def test_more_variants_than_torch_keeps_are_compiled_all_the_same(dynamo_only):
    doubled = capture.Compiled(_double)
    for length in [*range(1, 12), 1, 11]:
        assert torch.equal(doubled(torch.ones(length)), torch.full((length,), 2.0))
        assert doubled._compiled is not None


def _double(x):
    return x * 2


def test_what_does_not_compile_runs_as_it_is(model, dynamo_only, caplog):
    def look(module, args, output):
        return output if output.sum() > 0 else output.clone()

    model.model.norm.register_forward_hook(look)
    with caplog.at_level(logging.WARNING, "hf_guidedquant"):
        plain, ours = both(model, GraphedDecode(compile=True), inputs=PROMPT)
    assert torch.equal(plain, ours)
    assert "uncompiled" in caplog.text


def test_waits_of_the_host_are_told_from_other_warnings(monkeypatch):
    def set_mode(mode):
        warnings.warn("Synchronization debug mode does not yet detect all synchronizing operations", stacklevel=1)

    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    assert replay._run_watched(lambda: warnings.warn("something else", stacklevel=1)) == ""
    wait = replay._run_watched(lambda: warnings.warn("called a synchronizing CUDA operation", stacklevel=1))
    assert "test_decoding.py" in wait


def test_an_interrupted_first_run_is_not_one_that_has_loaded_everything(monkeypatch):
    stream = SimpleNamespace(wait_stream=lambda other: None, device=None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    watched = []
    monkeypatch.setattr(replay, "_run_watched", lambda function: watched.append(function()) or "")

    def interrupted():
        raise KeyboardInterrupt

    work = replay.Replay(torch.device("cuda"), "Work")
    with pytest.raises(KeyboardInterrupt):
        work(interrupted)
    work(lambda: "first")
    assert not watched
    work(lambda: "second")
    assert watched == ["second"]


def test_what_could_not_be_captured_is_not_tried_again(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    work = replay.Replay(torch.device("cuda"), "Work")
    work._runs = replay._WARM_UP

    def fails(function):
        raise RuntimeError

    monkeypatch.setattr(work, "_capture", fails)
    done = []
    with pytest.raises(RuntimeError):
        work(lambda: done.append(1))
    work(lambda: done.append(2))
    assert done == [2]


@pytest.mark.gpu
class TestOnCuda:
    """Eager in fp32, so that tokens can be compared; compiled once."""

    @pytest.fixture
    def graphed(self):
        return GraphedDecode(compile=False)

    @pytest.fixture
    def captures(self, monkeypatch):
        """The graphs captured so far."""
        graphs = []
        capture_once = replay.Replay._capture

        def counted(self, function):
            graphs.append(capture_once(self, function))
            return graphs[-1]

        monkeypatch.setattr(replay.Replay, "_capture", counted)
        return graphs

    @staticmethod
    def cuda(inputs):
        return {name: value.cuda() for name, value in inputs.items()}

    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    @pytest.mark.parametrize("compile", [False, True])
    def test_greedy_tokens_are_those_of_plain_generate(self, architecture, compile, captures):
        model, graphed = prepared(architecture).cuda(), GraphedDecode(compile=compile)
        for seed in range(3):
            plain, ours = both(model, graphed, **self.cuda(padded_batch(seed=seed)), max_new_tokens=40)
            assert torch.equal(plain, ours)
        assert len(captures) == 1
        assert compile == (getattr(step_of(graphed, model)._forward, "_compiled", None) is not None)

    def test_calls_share_a_graph(self, graphed, captures):
        model = prepared().cuda()
        for length, new in ((8, 20), (3, 40), (8, 1), (6, 2), (5, 30)):
            plain, ours = both(model, graphed, inputs=PROMPT[:, :length].cuda(), max_new_tokens=new)
            assert torch.equal(plain, ours)
        # The step's, and that of the prompts: the first made the cache, the next two were run to watch them.
        assert len(captures) == 2
        both(model, graphed, inputs=PROMPT.repeat(2, 1).cuda(), max_new_tokens=20)
        assert len(captures) == 3

    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_short_prompts_are_captured(self, architecture, graphed, captures, monkeypatch):
        model, runs, run_once = prepared(architecture).cuda(), [], prompt._Pass._forward
        monkeypatch.setattr(prompt._Pass, "_forward", lambda self, model: runs.append(run_once(self, model)))
        for length in (12, 11, 10, 16, 9, 13, 30, 20, 31, 18, 5):
            ids = torch.randint(2, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(length)).cuda()
            plain, ours = both(model, graphed, inputs=ids, max_new_tokens=20)
            assert torch.equal(plain, ours)
        # Three of either length, the last of them as it was captured.
        assert len(runs) == 6
        assert len(captures) == 3
        for seed in range(5):
            plain, ours = both(model, graphed, **self.cuda(padded_batch(seed=seed)), max_new_tokens=20)
            assert torch.equal(plain, ours)
        assert len(captures) == 5
        with torch.no_grad():
            model.get_output_embeddings().weight.neg_()
        plain, ours = both(model, graphed, **self.cuda(padded_batch(seed=7)), max_new_tokens=20)
        assert torch.equal(plain, ours)
        assert len(captures) == 5

    def test_rows_end_at_stop_tokens(self, graphed, captures):
        model, inputs = prepared().cuda(), self.cuda(padded_batch())
        endless = model.generate(**inputs, do_sample=False, max_new_tokens=30)[:, 9:]
        for column in (0, 2, 12):
            stops = endless[:, column].tolist()
            plain, ours = both(model, graphed, **inputs, eos_token_id=stops, pad_token_id=99, max_new_tokens=30)
            assert torch.equal(plain, ours)
        assert len(captures) == 1

    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"top_k": 20, "top_p": 0.8, "temperature": 0.7},
            {"top_k": 0, "min_p": 0.05, "typical_p": 0.9, "epsilon_cutoff": 0.001, "renormalize_logits": True},
            {"repetition_penalty": 1.3, "min_new_tokens": 9, "eos_token_id": [3, 4], "suppress_tokens": [5, 6, 7]},
        ],
    )
    def test_sampling_is_that_of_plain_generate_with_its_draws(self, settings, graphed, captures, same_draws):
        model = prepared().cuda()
        for seed in range(3):
            inputs = self.cuda(padded_batch(seed=seed))
            plain, ours = both(model, graphed, **inputs, do_sample=True, max_new_tokens=20, **settings)
            assert torch.equal(plain, ours)
        assert len(captures) == 1

    def test_a_seed_repeats_the_draws_before_and_after_capture(self, graphed, captures):
        model = prepared().cuda()

        def draw(seed):
            torch.manual_seed(seed)
            kwargs = {"do_sample": True, "max_new_tokens": 20, "custom_generate": graphed}
            return model.generate(PROMPT.cuda(), **kwargs)

        first = draw(0)
        assert len(captures) == 1
        assert torch.equal(first, draw(0))
        assert not torch.equal(first, draw(1))
        assert len(captures) == 1

    def test_weights_replaced_after_capture(self, graphed, captures):
        model = prepared().cuda()
        both(model, graphed, inputs=PROMPT.cuda(), max_new_tokens=20)
        model.cpu()
        other = tiny_model(seed=1)
        model.load_state_dict(other.state_dict())
        filler = [torch.full((1 << 20,), torch.nan, device="cuda") for _ in range(4)]
        model.cuda()
        del filler
        plain, ours = both(model, graphed, inputs=PROMPT.cuda(), max_new_tokens=20)
        assert torch.equal(plain, ours)
        # Weights that change where they are need no new graph.
        with torch.no_grad():
            model.lm_head.weight.neg_()
        count = len(captures)
        plain, ours = both(model, graphed, inputs=PROMPT.cuda(), max_new_tokens=20)
        assert torch.equal(plain, ours)
        assert len(captures) == count

    def test_a_streamer_and_other_criteria(self, graphed, captures):
        model = prepared().cuda()
        endless = model.generate(PROMPT.cuda(), do_sample=False, max_new_tokens=20)
        stop = int(endless[0, 17])
        for kwargs in ({}, {"eos_token_id": stop}, {"stopping_criteria": [After(stop)]}):
            recorders = Recorder(), Recorder()
            for recorder, method in zip(recorders, (None, graphed), strict=True):
                model.generate(
                    PROMPT.cuda(),
                    do_sample=False,
                    max_new_tokens=20,
                    streamer=recorder,
                    custom_generate=method,
                    **kwargs,
                )
            assert recorders[0].tokens == recorders[1].tokens
            assert recorders[1].ended == 1

    def test_a_step_that_waits_for_the_device_stays_eager(self, graphed, captures, caplog):
        model = prepared().cuda()

        def look(module, args, output):
            return output if output.sum() > 0 else output.clone()

        model.model.norm.register_forward_hook(look)
        with caplog.at_level(logging.WARNING, "hf_guidedquant"):
            plain, ours = both(model, graphed, inputs=PROMPT.cuda(), max_new_tokens=20)
        assert torch.equal(plain, ours)
        assert not captures
        assert "makes the host wait" in caplog.text

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_a_quantized_model_in_half_precision(self, dtype, captures):
        model = hf_guidedquant.quantize(prepared().to("cuda", dtype), GuidedQuantConfig(bits=2, dataset=token_rows()))
        for graphed in (GraphedDecode(compile=False), GraphedDecode()):
            answers = [
                model.generate(PROMPT.cuda(), do_sample=False, max_new_tokens=20, custom_generate=graphed)
                for _ in range(2)
            ]
            assert torch.equal(*answers)
        assert len(captures) == 2

    def test_memory_is_freed_with_the_model(self, graphed, captures):
        model = prepared().cuda()
        both(model, graphed, inputs=PROMPT.cuda(), max_new_tokens=20)
        gc.collect()
        before = torch.cuda.memory_allocated()
        watch = weakref.ref(model)
        cache_bytes = sum(2 * layer.keys.nbytes for layer in step_of(graphed, model).cache.layers)
        captures.clear()
        del model
        gc.collect()
        assert watch() is None
        assert torch.cuda.memory_allocated() <= before - cache_bytes
