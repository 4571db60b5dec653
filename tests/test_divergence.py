"""KL to the original, against the definition in float64; models of which it cannot be known are refused."""

import pytest
import torch
from conftest import tiny_model, token_rows
from transformers import AutoModel, Gemma3ForCausalLM

import hf_guidedquant
from hf_guidedquant import GuidedQuantConfig
from hf_guidedquant.errors import CalibrationError, ModelError
from hf_guidedquant.training import Divergence, divergence, teacher_states


def capped_gemma3():
    """A model with a cap as small as its logits, so that it matters."""
    model = tiny_model("gemma3")
    model.config.final_logit_softcapping = 0.5
    return model


MODELS = {
    **{name: lambda name=name: tiny_model(name) for name in ("llama", "llama-tied", "gpt2")},
    "gemma3": capped_gemma3,
}


def quantized(model):
    return hf_guidedquant.quantize(model, GuidedQuantConfig(bits=2, dataset=token_rows(4)))


@pytest.mark.parametrize("name", MODELS)
def test_divergence_is_that_of_the_definition(name, monkeypatch):
    rows = [*token_rows(5, 33, seed=1), *token_rows(3, 20, seed=2)]
    original, model = MODELS[name]().double(), quantized(MODELS[name]()).double()
    monkeypatch.setattr(divergence, "_LOGIT_TOKENS", 11)
    measured = Divergence(model, rows, teacher_states(original, rows))
    expected, bound = [], []
    with torch.no_grad():
        for row in rows:
            theirs, ours = (m(input_ids=row[None]).logits[0].log_softmax(-1) for m in (original, model))
            expected.append(float((theirs.exp() * (theirs - ours)).sum()))
            # Of each log-probability: rounding of sums over the hidden size, in two computations of them.
            for m in (original, model):
                hidden = m.base_model(input_ids=row[None]).last_hidden_state[0].abs()
                largest = hidden @ m.get_output_embeddings().weight.abs().T
                bound.append(4 * (64 + 128) * torch.finfo(torch.float64).eps * float(largest.max()) * row.numel())
    tokens = sum(row.numel() for row in rows)
    assert measured.tokens(range(8)) == tokens
    assert sum(bound) < 1e-6 * sum(expected)
    assert abs(measured.mean(range(8)) - sum(expected) / tokens) <= sum(bound) / tokens
    assert abs(measured.mean([2]) - expected[2] / 33) <= sum(bound) / 33
    summed = measured.summed(torch.stack(rows[:5]), torch.stack(measured.states[:5]))
    assert abs(float(summed.detach()) - sum(expected[:5])) <= sum(bound[:10])


def test_the_original_is_no_distance_from_itself():
    model, rows = capped_gemma3(), token_rows()
    assert Divergence(model, rows, teacher_states(model, rows)).mean(range(8)) == 0


def test_a_model_whose_logits_cannot_be_made_again_is_refused(monkeypatch):
    model, rows = capped_gemma3(), token_rows()
    forward = Gemma3ForCausalLM.forward

    def scaled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits * 1.1
        return output

    monkeypatch.setattr(Gemma3ForCausalLM, "forward", scaled)
    with pytest.raises(ModelError, match="Gemma3ForCausalLM does more to its logits"):
        teacher_states(model, rows)


def test_a_model_without_a_head_is_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="LlamaModel has no output head"):
        teacher_states(AutoModel.from_pretrained(tmp_path), token_rows())


def test_one_row_is_too_few():
    with pytest.raises(CalibrationError, match="two calibration rows"):
        teacher_states(tiny_model(), token_rows(1))


def test_rows_with_nan_are_left_out_and_many_are_refused():
    model, rows = tiny_model(), token_rows(20)
    for row in rows:
        row[row == 77] = 78
    rows[0][3] = rows[5][0] = 77
    model.model.embed_tokens.weight.data[77] = float("nan")
    states = teacher_states(model, rows)
    assert Divergence(model, rows, states).usable() == [i for i in range(20) if i not in (0, 5)]
    rows[7][1] = 77
    with pytest.raises(CalibrationError, match="3 of 20 calibration rows gave NaN"):
        teacher_states(model, rows)


def test_models_come_back_as_they_were():
    model = tiny_model().train()
    model.model.layers[1].mlp.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    teacher_states(model, token_rows())
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model.get_output_embeddings()._forward_pre_hooks
