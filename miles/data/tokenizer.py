"""A checkpoint's tokenizer, read from its Hugging Face files without transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, models

from miles.data.chat_template import ChatTemplate, choose_template, load_chat_template
from miles.data.sample import Message
from miles.errors import CheckpointError, DataError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
"""What a checkpoint writer copies so that the result has the same tokenizer."""

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class CheckpointTokenizer:
    """Text to ids and back, special tokens and chat templates of one checkpoint directory."""

    def __init__(self, checkpoint: Path, chat_template_path: Path | None = None) -> None:
        """Read the tokenizer files; `chat_template_path` replaces the checkpoint's templates.

        Raises CheckpointError when tokenizer.json is missing or unreadable.
        """
        self.checkpoint = checkpoint
        config = _read_json(checkpoint / "tokenizer_config.json")
        named = {**_read_json(checkpoint / "special_tokens_map.json"), **config}
        self.special_tokens: dict[str, str] = {
            name: _content(named[name]) for name in _NAMED_TOKENS if named.get(name) is not None
        }
        self._tokenizer = _load_backend(checkpoint)
        self._add_missing_tokens(config)
        self.chat_templates = load_chat_template(checkpoint, config, self.special_tokens)
        if chat_template_path is not None:
            self.chat_templates = {"default": self._template_file(chat_template_path)}

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included; a model's embedding may be padded beyond it."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def bos_token_id(self) -> int | None:
        return self._named_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._named_id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        return self._named_id("pad_token")

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that `decode` leaves out when special tokens are skipped."""
        added = self._tokenizer.get_added_tokens_decoder()
        return frozenset(i for i, token in added.items() if token.special)

    def token_to_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text. Rendered chat templates bring their own special tokens: pass False for them.

        Which tokens are added is the post-processor's word in tokenizer.json (`add_bos_token` of
        tokenizer_config.json has no say beside it, as in transformers 5).
        """
        self._check_known_symbols(text)
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` of many texts at once."""
        for text in texts:
            self._check_known_symbols(text)
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [e.ids for e in encoded]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of ids; ids beyond the vocabulary (a padded embedding) decode to nothing."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def render_chat(
        self,
        messages: list[Message],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """The text of a conversation under the chat template."""
        template = self.require_chat_template(tools is not None)
        return template.render(messages, tools, add_generation_prompt, **kwargs)

    def require_chat_template(self, with_tools: bool = False) -> ChatTemplate:
        """The template that conversations use. Raises DataError when the checkpoint has none."""
        template = choose_template(self.chat_templates, with_tools)
        if template is None:
            raise DataError(
                "the checkpoint has no chat template",
                where=str(self.checkpoint),
                why=f"--apply-chat-template is on; its templates: {', '.join(self.chat_templates) or 'none'}",
                fix="give one with --chat-template-path, or leave --apply-chat-template out",
            )
        return template

    def encode_chat(
        self,
        messages: list[Message],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> list[int]:
        """Ids of a conversation under the chat template."""
        text = self.render_chat(messages, tools, add_generation_prompt, **kwargs)
        return self.encode(text, add_special_tokens=False)

    def _named_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self._tokenizer.token_to_id(token)

    def _add_missing_tokens(self, config: dict[str, Any]) -> None:
        """Added and named special tokens that only tokenizer_config.json knows."""
        for _, token in sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0])):
            if self._tokenizer.token_to_id(token["content"]) is None:
                options = {k: v for k, v in token.items() if k not in ("content", "__type")}
                self._tokenizer.add_tokens([AddedToken(token["content"], **options)])
        self._tokenizer.add_special_tokens(list(self.special_tokens.values()))

    def _template_file(self, path: Path) -> ChatTemplate:
        if not path.is_file():
            raise DataError("no such chat template file", where=str(path), fix="check --chat-template-path")
        return ChatTemplate(path.read_text(encoding="utf-8"), str(path), self.special_tokens)

    @cached_property
    def _closed_vocabulary(self) -> frozenset[str] | None:
        """The symbols of a word-level vocabulary without an unknown token; None for any other model."""
        model = self._tokenizer.model
        if not isinstance(model, models.WordLevel):
            return None
        if self._tokenizer.token_to_id(model.unk_token) is not None:
            return None
        return frozenset(self._tokenizer.get_vocab(with_added_tokens=True))

    def _check_known_symbols(self, text: str) -> None:
        known = self._closed_vocabulary
        if known is None or known.issuperset(text):
            return
        pieces = [text]
        if self._tokenizer.pre_tokenizer is not None:
            pieces = [piece for piece, _ in self._tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        unknown = sorted(set(pieces) - known)
        if unknown:
            raise DataError(
                f"the tokenizer knows no symbol for {', '.join(map(repr, unknown[:5]))}",
                where=str(self.checkpoint / "tokenizer.json"),
                why="its vocabulary is closed: it has no unknown token",
            )


def _load_backend(checkpoint: Path) -> Tokenizer:
    path = checkpoint / "tokenizer.json"
    if not path.is_file():
        raise _missing(checkpoint)
    text = path.read_text(encoding="utf-8")
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"tokenizer.json is not JSON: {error.msg}",
            where=f"{path}:{error.lineno}",
            why="the file may be truncated",
            fix="download the checkpoint's tokenizer files again",
        ) from error
    if not isinstance(document, dict) or "model" not in document:
        raise CheckpointError(
            "tokenizer.json holds no tokenizer model",
            where=str(path),
            fix="download the checkpoint's tokenizer files again",
        )
    tokenizer = Tokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _missing(checkpoint: Path) -> CheckpointError:
    if not checkpoint.is_dir():
        return CheckpointError(
            "no such checkpoint directory", where=str(checkpoint), fix="check --hf-checkpoint"
        )
    other = next((n for n in ("tokenizer.model", "vocab.json") if (checkpoint / n).is_file()), None)
    return CheckpointError(
        "the checkpoint has no tokenizer.json",
        where=str(checkpoint),
        why=f"it has {other}, an older format" if other else "prompts cannot be turned into ids without it",
        fix=(
            'write it once: python -c "from transformers import AutoTokenizer as T; '
            f"T.from_pretrained('{checkpoint}').save_pretrained('{checkpoint}')\""
            if other
            else "copy tokenizer.json and tokenizer_config.json of the base model into it"
        ),
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{path.name} is not JSON: {error.msg}", where=f"{path}:{error.lineno}"
        ) from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path.name} is not a JSON object", where=str(path))
    return document


def _content(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])
