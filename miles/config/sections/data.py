"""`[data]`: where prompts come from and how a row becomes one."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from miles.config.sections.base import Section, Table


class DataSection(Section):
    """The prompt source and the columns of its rows."""

    prompt_data: str | None = None
    """Prompts: a JSONL or Parquet file, `path@[a:b]` for a slice, or `builtin:sort/train`."""

    input_key: str = "input"
    """Column of the prompt: text, or a list of chat messages."""

    label_key: str | None = None
    """Column of the expected answer."""

    metadata_key: str = "metadata"
    """Column of free data that travels with the sample."""

    tool_key: str = "tools"
    """Column of tool definitions for the chat template."""

    apply_chat_template: bool = False
    """Render the prompt with the checkpoint's chat template."""

    apply_chat_template_kwargs: Table = Field(default_factory=dict)
    """Arguments for the chat template, as a table."""

    chat_template_path: str | None = None
    """Jinja file used in place of the checkpoint's chat template."""

    rollout_shuffle: bool = False
    """Shuffle the prompts anew in every epoch, keyed by the rollout seed."""

    on_bad_row: Literal["skip", "refuse"] = "skip"
    """A row that cannot be read: `skip` reports its line and counts it, `refuse` does not start the run."""

    data_source_path: str | None = None
    """Python path of a class used in place of the built-in prompt source."""
