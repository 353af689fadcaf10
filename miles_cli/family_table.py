"""The table of model families in `docs/support.md`, from the record of what their tests ran.

The record, `docs/reference/families.json`, names for each test the cases that passed it; the tests write it
(`python tests/cpu/families/record.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from miles.arch.families import FAMILIES

RECORD = Path("docs/reference/families.json")
PAGE = Path("docs/support.md")
BEGIN, END = "<!-- families: python -m miles_cli.docs -->", "<!-- end of families -->"

CHECKS: Mapping[str, tuple[str, ...]] = {
    "logits and gradients": ("test_logits_and_gradients_are_those_of_transformers",),
    "greedy text": ("test_greedy_continuations_are_those_of_transformers",),
    "cache": (
        "test_reading_over_a_cache_equals_a_full_forward",
        "test_sampling_with_a_cache_gives_the_log_probs_and_routes_of_a_full_forward",
    ),
    "recompute": ("test_layers_that_run_again_in_backward_have_the_same_gradients",),
    "files": (
        "test_published_tensors_come_back_bit_for_bit",
        "test_a_published_checkpoint_is_written_back_bit_for_bit",
        "test_towers_and_unused_keys_are_read_and_written_back",
    ),
    "to FP8": ("fp8",),
    "to INT4": ("int4",),
    "an RL run": ("test_grpo_raises_the_reward_and_leaves_router_biases_and_indexers_alone",),
    "MTP layers": ("test_an_mtp_layer_predicts_what_transformers_predicts",),
}
"""Columns: tests, any of which shows it, or the format that a test of conversions ends in."""
CONVERSIONS = (
    "test_quantised_checkpoints_stand_for_the_rounded_weights",
    "test_a_quantised_checkpoint_stands_for_the_rounded_weights",
)
_WORD = re.compile(r"\w+")


def passed(record: Mapping[str, list[str]]) -> dict[str, set[str]]:
    """For every family the checks that it passed, keys of `CHECKS`. A case is called by its family, whatever
    follows, and by the format in a test of conversions.
    """
    found: dict[str, set[str]] = {family: set() for family in FAMILIES}
    for test, cases in record.items():
        for words in map(_WORD.findall, cases):
            shown = words if test in CONVERSIONS else [test]
            for family in found.keys() & set(words):
                found[family] |= {check for check, tests in CHECKS.items() if {*tests} & {*shown}}
    return found


def table(record: Mapping[str, list[str]]) -> str:
    """A line for each family, in Markdown."""
    rows = [["family", *CHECKS], ["---"] * (len(CHECKS) + 1)]
    for family, checks in passed(record).items():
        rows.append([f"`{family}`", *("yes" if check in checks else "-" for check in CHECKS)])
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
