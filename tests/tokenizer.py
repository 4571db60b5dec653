"""A word tokenizer that fits the tiny models' vocabulary."""

import random

from conftest import VOCABULARY
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<s>", "</s>", "<unk>"]
WORDS = [f"word{index}" for index in range(VOCABULARY - len(SPECIAL))]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Ids 0-2 are the special tokens, the others ``word0``, ``word1``, ...; anything else reads as ``<unk>``."""
    vocabulary = {word: index for index, word in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def texts(count: int = 6, words: int = 40, seed: int = 0) -> list[str]:
    """Random texts in the tokenizer's words."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=words)) for _ in range(count)]
