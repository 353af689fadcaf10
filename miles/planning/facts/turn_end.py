"""Whether the chat template ends a turn with a token that the model stops at."""

from __future__ import annotations

from typing import TYPE_CHECKING

from miles.arch import ArchSpec
from miles.errors import DataError

if TYPE_CHECKING:
    from miles.data.tokenizer import CheckpointTokenizer

PROBE = "miles"
"""The text of a message whose rendering shows how the template ends a turn."""


def unknown_turn_end(tokenizer: CheckpointTokenizer, spec: ArchSpec) -> tuple[int, str] | None:
    """The special token after an assistant's message, unless it is among the model's stop tokens."""
    if not tokenizer.chat_templates:
        return None
    messages = [{"role": "user", "content": PROBE}, {"role": "assistant", "content": PROBE}]
    try:
        text = tokenizer.render_chat(messages, add_generation_prompt=False)
        ids = tokenizer.encode(text[text.rindex(PROBE) + len(PROBE) :], add_special_tokens=False)
    except (DataError, ValueError):
        # A template that refuses or drops this conversation says nothing about its end.
        return None
    end = next((i for i in ids if i in tokenizer.special_ids), None)
    if end is None or end in spec.eos_token_ids:
        return None
    return end, tokenizer.decode([end])
