"""What people ran into is answered: by rules that exist, or by a part of miles that is named."""

from __future__ import annotations

from miles.planning.field_reports import field_reports, reports_of
from miles.planning.rules import REGISTRY

TOPICS = {
    "Configuration and launch": 16,
    "Installation": 7,
    "Correctness and numerics": 14,
    "Memory and hangs": 9,
    "Speculative decoding": 3,
}
"""How many reports the field's notes hold by topic; one that is dropped here must be dropped there."""


def test_no_report_is_forgotten() -> None:
    counted = {topic: sum(report.topic == topic for report in field_reports()) for topic in TOPICS}
    assert counted == TOPICS
    threads = [report.thread for report in field_reports()]
    assert len(set(threads)) == len(threads)


def test_every_report_has_an_answer_and_names_real_rules() -> None:
    for report in field_reports():
        assert report.answer and report.complaint
        assert set(report.rules) <= REGISTRY.keys(), report.thread


def test_most_reports_are_answered_before_the_run() -> None:
    silent = [report.thread for report in field_reports() if not report.rules]
    assert len(silent) <= len(field_reports()) / 3, silent


def test_a_rule_knows_who_ran_into_it() -> None:
    assert [report.thread for report in reports_of("SPC2")] == ["slime#1534"]
    assert reports_of("KLD1") == ()
