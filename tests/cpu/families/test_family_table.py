"""The table of families in the docs is that of the record, and the record that of the tests."""

from __future__ import annotations

import json

from miles_cli.family_table import CHECKS, PAGE, RECORD, passed, table, with_table
from tests.cpu.families.tiny_checkpoints import CASES


def test_the_page_has_the_table_of_the_record() -> None:
    record = json.loads(RECORD.read_text())
    assert with_table(PAGE.read_text(), record) == PAGE.read_text(), "run python -m miles_cli.docs"


def test_every_case_passed_every_check() -> None:
    found = passed(json.loads(RECORD.read_text()))
    assert found.keys() == CASES.keys(), "run python tests/cpu/families/record.py"
    assert all(found[name] == CHECKS.keys() for name in CASES)


def test_what_did_not_pass_is_not_called_tested() -> None:
    lines = table({"test_published_tensors_come_back_bit_for_bit": ["qwen"]}).splitlines()
    assert lines[2].count("yes") == 1 and lines[2].startswith("| `qwen` |")
