"""The table of settings is complete, and the pages generated from it are current."""

from __future__ import annotations

from pathlib import Path

from miles.config import fields
from miles.config.reference import flags_page, schema_text
from miles.config.sglang_table import server_args

DOCS = Path(__file__).parents[3] / "docs" / "reference"
COMMAND = "run: python -m miles.config.reference docs/reference"


def test_the_pages_are_current() -> None:
    assert (DOCS / "flags.md").read_text() == flags_page(), COMMAND
    assert (DOCS / "run-file.schema.json").read_text() == schema_text(), COMMAND


def test_every_setting_has_a_help_text_and_a_flag_of_its_own() -> None:
    flags = [field.flag for field in fields()]
    assert len(set(flags)) == len(flags)
    assert len({field.dotted for field in fields()}) == len(flags)
    for field in fields():
        assert field.help.endswith("."), f"{field.dotted} has no help text"


def test_typed_sglang_settings_are_real_server_arguments_of_the_same_kind() -> None:
    typed = {field.name: field.kind for field in fields() if field.section == "sglang"}
    assert {name: server_args()[name] for name in typed} == typed
