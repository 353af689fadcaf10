"""Runs the tests of the families and notes which case passed which: `python tests/cpu/families/record.py`.

`docs/support.md` has its table of families from this record, see `miles_cli.family_table`.
"""

from __future__ import annotations

import json
import re
import sys

import pytest

from miles_cli.family_table import CHECKS, CONVERSIONS, RECORD

TESTS = (
    "tests/cpu/families/test_family_parity.py",
    "tests/cpu/families/test_family_conversion.py",
    "tests/cpu/models/test_families.py",
    "tests/cpu/models/test_family_files.py",
    "tests/cpu/models/test_family_rl.py",
)
RECORDED = {*CONVERSIONS, *(test for tests in CHECKS.values() for test in tests)}
_NODE = re.compile(r"::(test_\w+)\[(.+)\]$")


class Passed:
    """The cases that passed each test, and whether any test failed."""

    def __init__(self) -> None:
        self.cases: dict[str, list[str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        found = _NODE.search(report.nodeid)
        if report.when == "call" and report.passed and found and found[1] in RECORDED:
            self.cases.setdefault(found[1], []).append(found[2])


def main() -> int:
    passed = Passed()
    code = pytest.main(["-q", *TESTS], plugins=[passed])
    if code:
        return int(code)
    record = {test: sorted(cases) for test, cases in sorted(passed.cases.items())}
    RECORD.write_text(json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
