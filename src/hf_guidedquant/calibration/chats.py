"""Chats as the tokenizer's chat template writes them, and which of their tokens are the assistant's."""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from ..errors import CalibrationError

Chat = Sequence[Mapping[str, Any]]

# What cross-entropy takes for "no target here".
IGNORED = -100
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def chat_text(tokenizer: Any, chat: Chat, prompt: bool = False) -> str:
    """A chat in the template's words; with ``prompt``, up to where the assistant is to go on.

    Raises:
        CalibrationError: The template refuses the chat.
    """
    options = {"add_generation_prompt": True} if prompt else {}
    return _apply(tokenizer, chat, tokenize=False, **options)


def assistant_labels(tokenizer: Any, chat: Chat) -> tuple[Tensor, Tensor]:
    """Token ids of a chat, and its labels: the ids of what the assistant says, and ``-100`` for all else.

    Where the template has ``{% generation %}``, it says which tokens are the assistant's. Otherwise they are what an
    assistant's message adds to the chat up to there with its generation prompt, so headers of turns are not among them.

    Args:
        tokenizer: A fast tokenizer with a chat template.
        chat: Messages with ``role`` and ``content``.

    Returns:
        Both int64 ``[tokens]``.

    Raises:
        CalibrationError: The tokenizer is not a fast one, or the template refuses the chat, or writes messages
            differently once others follow.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise CalibrationError(
            f"assistant_only_loss needs to know where tokens stand in the text, and {type(tokenizer).__name__} does "
            "not tell. Use a fast tokenizer."
        )
    if _GENERATION.search(tokenizer.get_chat_template()):
        ids, said = _by_template(tokenizer, chat)
    else:
        ids, said = _by_prefixes(tokenizer, chat)
    return ids, ids.masked_fill(~said, IGNORED)


def _apply(tokenizer: Any, chat: Chat, **options: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(list(chat), **options)
    except (TemplateError, TypeError, ValueError) as error:
        raise CalibrationError(f"The tokenizer's chat template refuses a calibration chat: {error}") from error


def _by_template(tokenizer: Any, chat: Chat) -> tuple[Tensor, Tensor]:
    quiet = {"verbose": False}
    found = _apply(tokenizer, chat, return_dict=True, return_assistant_tokens_mask=True, tokenizer_kwargs=quiet)
    said = torch.tensor(found["assistant_masks"], dtype=torch.bool)
    return torch.tensor(found["input_ids"], dtype=torch.int64), said


def _opening(tokenizer: Any, message: Mapping[str, Any]) -> str:
    """What stands before a chat's first message: templates are not made for chats of no messages."""
    texts = [chat_text(tokenizer, [{**message, "content": said}]) for said in ("a", "b")]
    return os.path.commonprefix(texts)  # noqa: RUF071  Of characters, as wanted.


def _by_prefixes(tokenizer: Any, chat: Chat) -> tuple[Tensor, Tensor]:
    text = chat_text(tokenizer, chat)
    found = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    starts, ends = torch.tensor(found["offset_mapping"]).view(-1, 2).unbind(1)
    said = torch.zeros_like(starts, dtype=torch.bool)
    for index, message in enumerate(chat):
        if message.get("role") == "assistant":
            before = chat_text(tokenizer, chat[:index], prompt=True) if index else _opening(tokenizer, message)
            after = chat_text(tokenizer, chat[: index + 1])
            if not (text.startswith(after) and after.startswith(before)):
                raise CalibrationError(
                    f"assistant_only_loss cannot tell what the assistant says in message {index} of a chat: the "
                    "tokenizer's chat template writes a chat's beginning differently once more follows. Give the "
                    "tokenizer a template with {% generation %} and {% endgeneration %} around it."
                )
            said |= (starts < len(after)) & (ends > len(before))
    return torch.tensor(found["input_ids"], dtype=torch.int64), said
