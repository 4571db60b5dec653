"""Models that also read images: the text model is quantized, the rest stays as it is."""

import json

import pytest
import torch
from conftest import VOCABULARY, token_rows
from tokenizer import word_tokenizer
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessor,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    pipeline,
)

import hf_guidedquant
from hf_guidedquant import GuidedQuantConfig
from hf_guidedquant.cli import main
from hf_guidedquant.inspection import inspect
from hf_guidedquant.nn import quantized_modules

IMAGE = VOCABULARY - 1
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
# An image of 16 x 16 pixels is four tokens.
PIXELS = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
PATCHES = {"pixel_values": PIXELS.view(4, -1).repeat(1, 2), "image_grid_thw": torch.tensor([[1, 2, 2]])}
TOKENS = {"image_token_id": IMAGE, "video_token_id": 126, "vision_start_token_id": 125, "vision_end_token_id": 124}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}


def _llava():
    text, vision = {"model_type": "llama", **TEXT}, {"model_type": "clip_vision_model", "projection_dim": 16, **VISION}
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE, image_token_id=IMAGE)
    return LlavaForConditionalGeneration(config), {"pixel_values": PIXELS}


def _qwen2_vl():
    vision = {"embed_dim": 32, "hidden_size": 64, "depth": 2, "num_heads": 2, "mlp_ratio": 2, "patch_size": 8}
    vision["spatial_merge_size"] = 1
    config = Qwen2VLConfig(text_config={**TEXT, **ROPE}, vision_config=vision, **TOKENS)
    return Qwen2VLForConditionalGeneration(config), PATCHES


def _qwen3_vl_moe():
    text = {**TEXT, **ROPE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    vision = {"hidden_size": 32, "intermediate_size": 48, "depth": 2, "num_heads": 2, "patch_size": 8}
    vision |= {"spatial_merge_size": 1, "out_hidden_size": 64, "deepstack_visual_indexes": [0]}
    vision |= {"num_position_embeddings": 16}
    config = Qwen3VLMoeConfig(text_config=text, vision_config=vision, **TOKENS)
    return Qwen3VLMoeForConditionalGeneration(config), PATCHES


def _gemma3():
    vision = {"model_type": "siglip_vision_model", "vision_use_head": False, **VISION}
    indices = {"image_token_index": IMAGE, "boi_token_index": 126, "eoi_token_index": 125, "mm_tokens_per_image": 4}
    config = Gemma3Config(text_config={**TEXT, "sliding_window": 32}, vision_config=vision, **indices)
    model = Gemma3ForConditionalGeneration(config)
    # It starts as zero, which would hide the image.
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)
    return model, {"pixel_values": PIXELS}


MODELS = {"llava": _llava, "qwen2-vl": _qwen2_vl, "qwen3-vl-moe": _qwen3_vl_moe, "gemma3": _gemma3}


def made(kind):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, image = MODELS[kind]()
    ids = torch.tensor([[5, 6, *[IMAGE] * 4, 7, 8]])
    prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **image}
    if kind != "llava":
        prompt["mm_token_type_ids" if kind != "gemma3" else "token_type_ids"] = (ids == IMAGE).long()
    return model.eval(), prompt


def config(**changes):
    rows = [row % 120 for row in token_rows(4)]
    return GuidedQuantConfig(**{"bits": 3, "dataset": rows, "seq_len": 33, "device": "cpu", **changes})


def logits(model, prompt):
    with torch.no_grad():
        return model(**prompt).logits


@pytest.mark.parametrize("kind", list(MODELS))
def test_the_text_model_is_quantized_saved_and_reloaded(kind, tmp_path):
    original, prompt = made(kind)
    original.save_pretrained(tmp_path / "dense")
    before = AutoModelForImageTextToText.from_pretrained(tmp_path / "dense", quantization_config=config())
    names = set(quantized_modules(before))
    assert names
    assert all("language_model" in name for name in names)
    assert not any("vision" in name or "visual" in name or "projector" in name for name in names)
    # All but the text model is what it was, to the bit.
    outside = [name for name in original.state_dict() if "language_model" not in name and "lm_head" not in name]
    assert len(outside) > 10
    for name in outside:
        assert torch.equal(before.state_dict()[name], original.state_dict()[name]), name
    hf_guidedquant.save(before, tmp_path / "quantized")
    after = AutoModelForImageTextToText.from_pretrained(tmp_path / "quantized")
    expected = logits(before, prompt)
    assert torch.equal(logits(after, prompt), expected)
    assert not torch.equal(logits(after, prompt), logits(original, prompt))
    assert not torch.equal(logits(after, {**prompt, "pixel_values": 0 * prompt["pixel_values"]}), expected)
    settings = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(after.generate(**prompt, **settings), before.generate(**prompt, **settings))
    assert {layer.name for layer in inspect(tmp_path / "quantized", verify=True).layers} == names


@pytest.mark.parametrize("kind", list(MODELS))
def test_the_plan_says_what_stays_dense(kind, tmp_path):
    model, _ = made(kind)
    model.save_pretrained(tmp_path)
    planned = hf_guidedquant.plan(tmp_path, config(), probe=False)
    expected = {"outside the text model", "embedding", "output head"} | ({"router"} if "moe" in kind else set())
    assert set(planned.skipped.values()) == expected
    assert all("language_model" in layer.name for layer in planned.layers)
    assert "left alone: outside the text model" in planned.table()
    assert planned.quantized_bytes < planned.dense_bytes == sum(p.nbytes for p in model.parameters())


def test_training_and_segments_of_a_text_model():
    model, prompt = made("llava")
    settings = config(bits=2, reconstruct={"epochs": 1}, distill={"epochs": 1})
    hf_guidedquant.quantize(model, settings)
    report = model.quantization_report
    assert [block.name.rpartition(".")[2] for block in report.reconstruction.blocks] == ["0", "1"]
    assert report.distillation.held_back_rows == 1
    assert torch.isfinite(logits(model, prompt)).all()


def test_the_command_line_takes_such_models(tmp_path, capsys):
    model, _ = made("llava")
    model.save_pretrained(tmp_path / "dense")
    processor = LlavaProcessor(CLIPImageProcessor(), word_tokenizer(), patch_size=8)
    processor.save_pretrained(tmp_path / "dense")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"word{index % 100}" for index in range(400)))
    options = ["--bits", "3", "--method", "squeezellm", "--dataset", str(text), "--seq-len", "32", "--json"]
    assert main(["quantize", str(tmp_path / "dense"), str(tmp_path / "quantized"), *options]) == 0
    assert len(json.loads(capsys.readouterr().out)["layers"]) == 14
    assert len(quantized_modules(AutoModelForImageTextToText.from_pretrained(tmp_path / "quantized"))) == 14
    assert type(AutoProcessor.from_pretrained(tmp_path / "quantized")) is LlavaProcessor
    card = (tmp_path / "quantized" / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card
    assert 'pipeline("image-text-to-text"' in card
    generator = pipeline("image-text-to-text", model=str(tmp_path / "quantized"))
    assert generator(text="word1 word2", max_new_tokens=2)[0]["generated_text"].startswith("word1 word2 ")
