"""The page about preflight is the one that the rules generate."""

from __future__ import annotations

from pathlib import Path

from miles.planning.reference import preflight_page
from miles.planning.rules import REGISTRY

PAGE = Path(__file__).parents[3] / "docs" / "reference" / "preflight.md"


def test_page_is_current() -> None:
    generate = "run `python -m miles.planning.reference docs/reference`"
    assert PAGE.read_text(encoding="utf-8") == preflight_page(), generate


def test_every_rule_has_its_anchor() -> None:
    headings = {line.removeprefix("## ") for line in preflight_page().splitlines() if line.startswith("## ")}
    assert headings >= REGISTRY.keys()
