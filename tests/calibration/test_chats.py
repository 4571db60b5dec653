"""What the assistant says in chats: found by the template, counted by the loss, told in the provenance."""

import json

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file
from test_collector import reference
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import hf_guidedquant
from hf_guidedquant import GuidedQuantConfig
from hf_guidedquant.calibration import load_rows
from hf_guidedquant.calibration.chats import assistant_labels
from hf_guidedquant.calibration.kinds import check_dataset
from hf_guidedquant.errors import CalibrationError, FolderMismatchError

# Both write the same text, and mean the same tokens: a message's content and its end, but not its header.
TURN = "<{{ m['role'] }}>{{ m['content'] }}</>\n"
PROMPT = "{% if add_generation_prompt %}<assistant>{% endif %}"
PLAIN = "{% for m in messages %}" + TURN + "{% endfor %}" + PROMPT
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<assistant>{%- generation -%}{{ m['content'] }}</>\n"
    "{% endgeneration %}{% else %}" + TURN + "{% endif %}{% endfor %}" + PROMPT
)
# The same text, but the assistant's are the contents alone.
CONTENTS = MARKED.replace("</>\n{% endgeneration %}", "{% endgeneration %}</>\n")
# What the assistant has said earlier is cut short.
FORGETFUL = PLAIN.replace(
    "m['content']", "m['content'][:1] if m['role'] == 'assistant' and not loop.last else m['content']"
)
TEMPLATES = {"plain": PLAIN, "marked": MARKED}

SYSTEM = {"role": "system", "content": "Be kind."}
USER = {"role": "user", "content": "Hi, you"}
ASSISTANT = {"role": "assistant", "content": "\nHello, hello!"}
CHATS = {
    "one turn": [USER, ASSISTANT],
    "system prompt": [SYSTEM, USER, ASSISTANT],
    "several turns": [SYSTEM, USER, ASSISTANT, {**USER, "content": ""}, {**ASSISTANT, "content": "Yes"}, USER],
    "assistant twice": [USER, ASSISTANT, ASSISTANT],
    "assistant first": [ASSISTANT, USER, ASSISTANT],
    "no assistant": [SYSTEM, USER],
}


def tokenizer_of(template=PLAIN, merges=()):
    """Ids are bytes; merged pairs come behind them."""
    vocabulary = {_letter(byte): byte for byte in range(256)}
    vocabulary |= {left + right: 256 + index for index, (left, right) in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocabulary, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template)


def _letter(byte):
    """How byte-level tokenizers write a byte: GPT-2's table."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return chr(byte if byte in shown else 256 + [b for b in range(256) if b not in shown].index(byte))


def load(chats, tokenizer, seq_len=1000, assistant_only_loss=True):
    options = {"num_samples": 10, "seq_len": seq_len, "seed": 0}
    return load_rows(chats, tokenizer, assistant_only_loss=assistant_only_loss, **options)


def oracle(chat):
    """The text of a chat, and for every character whether the assistant says it."""
    text, said = "", []
    for message in chat:
        header, body = f"<{message['role']}>", f"{message['content']}</>\n"
        text += header + body
        said += [False] * len(header) + [message["role"] == "assistant"] * len(body)
    return text, said


@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_labels_are_what_the_assistant_says(template, chat):
    text, said = oracle(chat)
    ids, labels = assistant_labels(tokenizer_of(template), chat)
    assert bytes(ids.tolist()).decode() == text
    assert labels.tolist() == [ord(letter) if own else -100 for letter, own in zip(text, said, strict=True)]
    assert ids.dtype == labels.dtype == torch.int64


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_token_that_is_partly_the_assistants_is_the_assistants(template):
    """The header's last letter and the line break behind it are one token here."""
    tokenizer = tokenizer_of(template, merges=[(">", _letter(ord("\n")))])
    chat = CHATS["several turns"]
    ids, labels = assistant_labels(tokenizer, chat)
    text, said = oracle(chat)
    expected, place = [], 0
    for index in ids.tolist():
        length = 2 if index == 256 else 1
        expected.append(index if any(said[place : place + length]) else -100)
        place += length
    assert labels.tolist() == expected
    assert place == len(text) and 256 in expected


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("seq_len", [29, 48, 49, 1000])
def test_rows_and_labels_are_cut_alike_and_silent_chats_are_dropped(template, seq_len):
    calibration = load(list(CHATS.values()), tokenizer_of(template), seq_len)
    expected = [oracle(chat) for chat in CHATS.values()]
    expected = [(text[:seq_len], said[:seq_len]) for text, said in expected if any(said[1:seq_len])]
    assert [bytes(row.tolist()).decode() for row in calibration.rows] == [text for text, _ in expected]
    assert [(labels != -100).tolist() for labels in calibration.labels] == [said for _, said in expected]
    assert calibration.loss_tokens == sum(sum(said) for _, said in expected)
    reason = f"chats whose first {seq_len} tokens have nothing that the assistant says"
    assert calibration.dropped[reason] == len(CHATS) - len(expected)


def test_a_chat_is_silent_if_only_its_first_token_is_the_assistants():
    """Nothing foretells the first token, so it has no loss."""
    tokenizer = tokenizer_of("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    chat = [{"role": "assistant", "content": "A"}, {"role": "user", "content": "bc"}]
    assert assistant_labels(tokenizer, chat)[1].tolist() == [ord("A"), -100, -100]
    with pytest.raises(CalibrationError, match=r"dropped: 1 chats whose first 1000 tokens have nothing"):
        load([chat], tokenizer)


def test_rows_are_those_of_a_loss_over_all_tokens():
    chats = [chat for name, chat in CHATS.items() if name != "no assistant"]
    every, said = (load(chats, tokenizer_of(), 60, assistant_only_loss=only) for only in (False, True))
    assert every.labels is None
    assert all(torch.equal(a, b) for a, b in zip(every.rows, said.rows, strict=True))
    assert every.loss_tokens == every.tokens - len(every.rows)
    assert f"{said.loss_tokens:,} of them the assistant's" in said.describe()


def test_the_identity_is_of_the_labels_too():
    chats = [CHATS["several turns"]]
    every = load(chats, tokenizer_of(), assistant_only_loss=False)
    plain, marked, contents = (load(chats, tokenizer_of(template)) for template in (PLAIN, MARKED, CONTENTS))
    assert all(torch.equal(every.rows[0], other.rows[0]) for other in (plain, marked, contents))
    assert plain.sha256() == marked.sha256()
    assert len({every.sha256(), marked.sha256(), contents.sha256()}) == 3


def test_a_template_that_rewrites_earlier_turns_is_refused():
    load([CHATS["one turn"]], tokenizer_of(FORGETFUL))
    with pytest.raises(CalibrationError, match=r"in message 2 of a chat.*{% generation %}"):
        load([CHATS["several turns"]], tokenizer_of(FORGETFUL))


@pytest.mark.parametrize("mark", ["", "{% generation %}{% endgeneration %}"])
@pytest.mark.parametrize("only", [True, False])
def test_a_chat_that_the_template_refuses_is_a_named_error(mark, only):
    template = "{% for m in messages %}{{ raise_exception('no ' + m['role']) }}{% endfor %}" + mark
    with pytest.raises(CalibrationError, match="chat template refuses a calibration chat: no system"):
        load([CHATS["system prompt"]], tokenizer_of(template), assistant_only_loss=only)


def test_parts_that_a_template_for_texts_cannot_join_are_a_named_error():
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    template = "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}"
    with pytest.raises(CalibrationError, match=r"chat template refuses a calibration chat: .*concatenate"):
        load([parts], tokenizer_of(template))


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_an_empty_chat_of_a_stream_is_a_named_error(template):
    with pytest.raises(CalibrationError, match=r"chat template refuses a calibration chat: .*empty"):
        assistant_labels(tokenizer_of(template), [])


def test_a_tokenizer_that_does_not_tell_places_is_refused():
    class Slow:
        chat_template = PLAIN

        def __call__(self, text, **kwargs):
            return {"input_ids": list(text.encode())}

    with pytest.raises(CalibrationError, match=r"Slow does not tell\. Use a fast tokenizer"):
        load([CHATS["one turn"]], Slow())


@pytest.mark.parametrize("dataset", ["builtin", "c4", ["a text"], [torch.tensor([1, 2])]])
def test_what_is_no_chat_has_no_assistant(dataset):
    with pytest.raises(CalibrationError, match="assistant_only_loss needs chats, and the calibration data are"):
        load(dataset, tokenizer_of())
    if isinstance(dataset, str):
        check_dataset(dataset)
        with pytest.raises(CalibrationError, match="assistant_only_loss needs chats"):
            check_dataset(dataset, assistant_only_loss=True)


def quantize(template=MARKED, **changes):
    config = GuidedQuantConfig(
        bits=2,
        method="squeezellm",
        modules_to_not_convert=["self_attn", "layers.1"],
        tokenizer=tokenizer_of(template),
        **{"dataset": [CHATS["one turn"], CHATS["several turns"]], "assistant_only_loss": True, **changes},
    )
    return hf_guidedquant.quantize(tiny_model(), config)


def test_the_provenance_tells_and_no_word_of_a_chat_is_saved(tmp_path):
    model = quantize()
    model.save_pretrained(tmp_path)
    provenance = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["provenance"]
    said = [sum(oracle(chat)[1][:64]) for chat in (CHATS["one turn"], CHATS["several turns"])]
    assert provenance["assistant_only_loss"] is True
    assert provenance["loss_tokens"] == sum(said) > 0
    assert not any(b"ello" in file.read_bytes() for file in tmp_path.glob("*.json"))
    provenance = quantize(assistant_only_loss=False).config.quantization_config.provenance
    assert not {"assistant_only_loss", "loss_tokens"} & set(provenance)


@pytest.mark.parametrize("only", [True, False])
def test_the_statistics_of_a_run_are_of_the_loss_that_was_asked_for(only, tmp_path):
    """From chats to Hessians: against float64 autograd of a loss over the characters that the oracle says."""
    quantize(statistics=tmp_path, assistant_only_loss=only)
    told = [oracle(chat) for chat in (CHATS["one turn"], CHATS["several turns"])]
    rows = [torch.tensor(list(text.encode())[:64]) for text, _ in told]
    counts = [torch.tensor(said[:64]) | (not only) for _, said in told]
    hessians = reference(tiny_model(), rows, 1, True, counts)
    for name in ("gate_proj", "up_proj", "down_proj"):
        (file,) = tmp_path.glob(f"layers/*{name}*.safetensors")
        found = load_file(file)["diagonal"]
        expected = hessians[f"model.layers.0.mlp.{name}"].diagonal(dim1=1, dim2=2)
        # As in the tests of Hessians.
        bound = 40 * 96**0.5 * torch.finfo(torch.float32).eps * expected.amax()
        assert expected.amax() > 0
        assert (found - expected).abs().amax() <= bound, name


@pytest.mark.parametrize("folder", ["run_dir", "statistics"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"assistant_only_loss": False}, "assistant_only_loss was True, is False"),
        ({"template": CONTENTS}, "calibration data was [0-9a-f]{12}…, is [0-9a-f]{12}…"),
    ],
)
def test_folders_of_another_loss_are_refused_by_name(folder, changes, message, tmp_path):
    quantize(**{folder: tmp_path / "kept"})
    quantize(**{folder: tmp_path / "kept"})
    with pytest.raises(FolderMismatchError, match=message):
        quantize(**{folder: tmp_path / "kept"}, **changes)


def test_statistics_do_not_depend_on_how_the_same_tokens_are_found(tmp_path):
    quantize(MARKED, statistics=tmp_path)
    quantize(PLAIN, statistics=tmp_path)
