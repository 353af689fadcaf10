"""The tokenizer and the chat templates of a checkpoint give what transformers gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from miles.data import tasks
from miles.data.tokenizer import CheckpointTokenizer
from miles.errors import CheckpointError, DataError
from tests.cpu.data.conftest import CHATML, write_tokenizer

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "the weather <here> & now — ü",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CHAT = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "What's the weather in Zürich?"},
]
TOOL_CHAT = [
    *CHAT,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}
        ],
    },
    {"role": "tool", "content": "rain, 12 °C"},
]

# The constructs of published templates: Qwen's tools, Llama's dates and bos, DeepSeek's namespaces, loop
# controls.
TEMPLATES = {
    "chatml": CHATML,
    "qwen_tools": """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- for message in messages %}
    {%- if message.content is string %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.tool_calls %}
        {%- for call in message.tool_calls %}
            {{- '<tool_call>' + (call.function | tojson(indent=2)) + '</tool_call>' }}
        {%- endfor %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
""",
    "llama_dates": """
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%Y") %}
{%- endif %}
Today: {{ date_string }}
{% for message in messages if message.content is defined %}
    {{- message['role'] + ': ' + message['content'] | trim }}{{ eos_token }}
{% endfor %}
""",
    "namespaces": """
{% set ns = namespace(last='', n=0) %}
{% for message in messages %}
  {% if message.role == 'system' %}{% continue %}{% endif %}
  {% set ns.n = ns.n + 1 %}{% set ns.last = message.role %}
  {% generation %}{{ message.content }}{% endgeneration %}
{% endfor %}
{{ ns.last }} {{ ns.n }} {{ dict(a=1) | tojson }} {{ pad_token }}
{% if tools %}{{ tools | tojson(sort_keys=true, separators=(',', ':')) }}{% endif %}
""",
}


def transformers_tokenizer(checkpoint: Path) -> Any:
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(checkpoint)


# Plain ChatML has no place for tool calls.
@pytest.mark.parametrize(
    ("name", "conversation"),
    [(n, c) for n in TEMPLATES for c in ("chat", "tools") if (n, c) != ("chatml", "tools")],
)
def test_templates_render_as_in_transformers(name: str, conversation: str, tmp_path: Path) -> None:
    checkpoint = write_tokenizer(tmp_path, chat_template=TEMPLATES[name])
    messages, tools = (CHAT, None) if conversation == "chat" else (TOOL_CHAT, TOOLS)
    ours, theirs = CheckpointTokenizer(checkpoint), transformers_tokenizer(checkpoint)
    for kwargs in ({}, {"enable_thinking": False}, {"date_string": "26 Jul 2024"}):
        expected = theirs.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, tokenize=False, **kwargs
        )
        assert ours.render_chat(messages, tools, **kwargs) == expected
        ids = theirs.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, return_dict=False, **kwargs
        )
        assert ours.encode_chat(messages, tools, **kwargs) == ids


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"add_bos_token": True, "tokenizer_class": "PreTrainedTokenizerFast"},
        {"add_bos_token": True, "add_eos_token": True},
        {"added_tokens_decoder": {"302": {"content": "<think>", "special": False, "normalized": False}}},
    ],
)
def test_ids_and_text_are_those_of_transformers(config: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = write_tokenizer(tmp_path, **config)
    ours, theirs = CheckpointTokenizer(checkpoint), transformers_tokenizer(checkpoint)
    text = "Add 12 and 30.<|im_end|> <think>\n naïve 😀"
    for special in (True, False):
        ids = theirs(text, add_special_tokens=special)["input_ids"]
        assert ours.encode(text, add_special_tokens=special) == ids
        assert ours.encode_batch([text, "a"], add_special_tokens=special)[0] == ids
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert (ours.eos_token_id, ours.pad_token_id, ours.bos_token_id) == (
        theirs.eos_token_id,
        theirs.pad_token_id,
        theirs.bos_token_id,
    )
    assert ours.vocab_size == len(theirs)
    assert ours.special_ids == frozenset(theirs.all_special_ids) | {301}


def test_template_files_win_and_tools_have_their_own(tmp_path: Path) -> None:
    checkpoint = write_tokenizer(tmp_path, chat_template="from the config")
    (checkpoint / "chat_template.jinja").write_text("from the file")
    extra = checkpoint / "additional_chat_templates"
    extra.mkdir()
    (extra / "tool_use.jinja").write_text("with tools")
    ours, theirs = CheckpointTokenizer(checkpoint), transformers_tokenizer(checkpoint)
    for tools in (None, TOOLS):
        expected = theirs.apply_chat_template(CHAT, tools=tools, tokenize=False)
        assert ours.render_chat(CHAT, tools) == expected
    override = tmp_path / "mine.jinja"
    override.write_text("mine")
    assert CheckpointTokenizer(checkpoint, chat_template_path=override).render_chat(CHAT, TOOLS) == "mine"


def test_named_templates_in_the_config(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    ours = CheckpointTokenizer(write_tokenizer(tmp_path, chat_template=named))
    assert (ours.render_chat(CHAT), ours.render_chat(CHAT, TOOLS)) == ("plain", "tools")


def test_what_a_template_refuses_is_told(tmp_path: Path) -> None:
    refusing = write_tokenizer(tmp_path / "a", chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match="roles must alternate") as error:
        CheckpointTokenizer(refusing).render_chat(CHAT)
    assert "system, user" in error.value.why
    broken = write_tokenizer(tmp_path / "b", chat_template="{{ bos_token }}\n{% if %}")
    with pytest.raises(CheckpointError, match="template line 2"):
        CheckpointTokenizer(broken).render_chat(CHAT)
    none = CheckpointTokenizer(write_tokenizer(tmp_path / "c"))
    with pytest.raises(DataError, match="no chat template"):
        none.render_chat(CHAT)


def test_a_template_cannot_reach_out_of_its_sandbox(tmp_path: Path) -> None:
    escape = write_tokenizer(tmp_path, chat_template="{{ messages.__class__.__mro__ }}")
    with pytest.raises(DataError, match="unsafe"):
        CheckpointTokenizer(escape).render_chat(CHAT)


def test_a_checkpoint_without_a_tokenizer_names_the_next_step(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint directory"):
        CheckpointTokenizer(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json") as error:
        CheckpointTokenizer(tmp_path)
    assert "copy tokenizer.json" in error.value.fix
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model") as error:
        CheckpointTokenizer(tmp_path)
    assert "save_pretrained" in error.value.fix


def test_a_truncated_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    checkpoint = write_tokenizer(tmp_path)
    path = checkpoint / "tokenizer.json"
    path.write_text(path.read_text()[:500])
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not JSON"):
        CheckpointTokenizer(checkpoint)
    path.write_text(json.dumps({"version": "1.0"}))
    with pytest.raises(CheckpointError, match="no tokenizer model"):
        CheckpointTokenizer(checkpoint)


def test_a_closed_vocabulary_names_the_unknown_symbol(tmp_path: Path) -> None:
    tokenizer = CheckpointTokenizer(tasks.assets("sort", cache_dir=tmp_path).checkpoint)
    assert tokenizer.decode(tokenizer.encode("sort 12=<eos>")) == "sort 12=<eos>"
    with pytest.raises(DataError, match="'S', 'ü'"):
        tokenizer.encode("Sort ü")
