"""The table of families in the docs is that of the record, and the record that of the tests."""

from __future__ import annotations

import json

from miles.arch.families import FAMILIES
from miles_cli.family_table import CHECKS, PAGE, RECORD, passed, table, with_table

SHIPPING_MTP = {"glm4_moe", "deepseek_v3", "deepseek_v32"}


def test_the_page_has_the_table_of_the_record() -> None:
    record = json.loads(RECORD.read_text())
    assert with_table(PAGE.read_text(), record) == PAGE.read_text(), "run python -m miles_cli.docs"


def test_every_family_passed_every_check() -> None:
    """But the whole of Gemma 3n, of which transformers makes no tiny one: its text tower did."""
    found = passed(json.loads(RECORD.read_text()))
    for family in FAMILIES.keys() - {"gemma3n"}:
        spare = set() if family in SHIPPING_MTP else {"MTP layers"}
        assert found[family] == CHECKS.keys() - spare, f"{family}: run python tests/cpu/families/record.py"


def test_what_did_not_pass_is_not_called_tested() -> None:
    record = {
        "test_published_tensors_come_back_bit_for_bit": ["qwen3_moe, tied"],
        "test_a_quantised_checkpoint_stands_for_the_rounded_weights": ["int4-qwen3_moe"],
        "another_test": ["llama"],
    }
    found = {family: checks for family, checks in passed(record).items() if checks}
    assert found == {"qwen3_moe": {"files", "to INT4"}}
    assert sum(line.count("yes") for line in table(record).splitlines()) == 2
