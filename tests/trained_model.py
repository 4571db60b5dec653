"""A small language model that has really learned something: bytes of the built-in text, some ten seconds on a CPU."""

import functools
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_guidedquant.calibration.kinds import builtin_text

HELD_OUT = Path(__file__).parent.parent / "examples" / "held_out.txt"
ROW = 64


def byte_ids(text: str) -> torch.Tensor:
    """Token ids of a byte-level model: the bytes themselves."""
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def calibration_rows(count: int = 64) -> list[torch.Tensor]:
    return list(byte_ids(builtin_text())[: count * ROW].view(count, ROW))


def held_out_ids(count: int = 32) -> torch.Tensor:
    return byte_ids(HELD_OUT.read_text(encoding="utf-8"))[: count * ROW]


@functools.cache
def trained_model() -> LlamaForCausalLM:
    """The trained model in fp32. Shared: copy it before changing it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=64,
                intermediate_size=160,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocab_size=256,
                max_position_embeddings=ROW,
                tie_word_embeddings=True,
                bos_token_id=0,
                eos_token_id=0,
            )
        )
        ids = byte_ids(builtin_text())
        steps, batch = 800, 16
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
        for _ in range(steps):
            starts = torch.randint(ids.numel() - ROW, (batch,))
            rows = torch.stack([ids[start : start + ROW] for start in starts])
            model(input_ids=rows, labels=rows).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return model.eval()
