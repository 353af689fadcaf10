"""The table of model families in `docs/support.md`, from the record of what their tests ran.

The record, `docs/reference/families.json`, names for each test the cases that passed it; the tests write it
(`python tests/cpu/families/record.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

RECORD = Path("docs/reference/families.json")
PAGE = Path("docs/support.md")
BEGIN, END = "<!-- families: python -m miles_cli.docs -->", "<!-- end of families -->"

CHECKS: Mapping[str, str] = {
    "test_logits_and_gradients_are_those_of_transformers": "logits and gradients",
    "test_greedy_continuations_are_those_of_transformers": "greedy text",
    "test_reading_over_a_cache_equals_a_full_forward": "cache",
    "test_layers_that_run_again_in_backward_have_the_same_gradients": "recompute",
    "test_published_tensors_come_back_bit_for_bit": "files",
    "fp8": "to FP8",
    "int4": "to INT4",
}
"""Columns: a test, or the format that a conversion test ends in."""
_CONVERSION = "test_quantised_checkpoints_stand_for_the_rounded_weights"


def passed(record: Mapping[str, list[str]]) -> dict[str, set[str]]:
    """For every family the checks that it passed, keys of `CHECKS`."""
    found: dict[str, set[str]] = {}
    for test, cases in record.items():
        for case in cases:
            family, _, form = case.rpartition("-") if test == _CONVERSION else (case, "", test)
            if form in CHECKS:
                found.setdefault(family, set()).add(form)
    return found


def table(record: Mapping[str, list[str]]) -> str:
    """A line for each family, in Markdown."""
    rows = [["family", *CHECKS.values()], ["---"] * (len(CHECKS) + 1)]
    for family, checks in sorted(passed(record).items()):
        rows.append([f"`{family}`", *("yes" if check in checks else "refused" for check in CHECKS)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def with_table(page: str, record: Mapping[str, list[str]]) -> str:
    """The page with the table of today between its marks."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{table(record)}\n\n{END}{rest.split(END)[1]}"


def main() -> None:
    """Write the table, from the root of the repository."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), record), encoding="utf-8")


if __name__ == "__main__":
    main()
