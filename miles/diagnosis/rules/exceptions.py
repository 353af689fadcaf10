"""The first real exception across all workers, and the texts that name a failure by themselves."""

from __future__ import annotations

from miles.diagnosis.finding import Evidence, Fix, FixKind, Match, Severity, Tier
from miles.diagnosis.known_texts import KNOWN_TEXTS, KnownText
from miles.diagnosis.root import Root
from miles.diagnosis.rule import Rule, rule
from miles.diagnosis.rules.liveness import way_back
from miles.diagnosis.view import RecordView
from miles.errors import RunError
from miles.record import RunStatus
from miles.record import events as kinds


@rule(
    "EX1",
    "The run failed with an exception",
    tier=Tier.LIVENESS,
    severity=Severity.CRITICAL,
    symptom="an exception was recorded, or a traceback stands in a log; the earliest one that is not "
    "the echo of another worker's failure is named, without its wrappers",
    cause="see the exception",
    remedy="mend what the exception names, then resume from the latest checkpoint",
    source="miles; S#1043, M#574: the reason of a dead actor was lost",
)
def first_exception(view: RecordView) -> Match | None:
    root = view.root
    if root is None or root.failure is None or root.known is not None:
        return None
    failure = root.failure
    if failure.type == RunError.__name__ and view.events(kinds.NON_FINITE):
        return None  # the trainer stopped itself, and NF1 says why
    fix = Fix("mend what the exception names", FixKind.MANUAL, "none")
    return Match(
        failure.step,
        _evidence(root),
        (fix, *way_back(view)),
        cause=f"{failure.type} in {failure.worker}: {failure.message}".rstrip(": "),
        severity=_severity(view),
        title=f"{failure.worker} raised {failure.type}",
    )


def _text_rule(known: KnownText) -> Rule:
    """The rule that fires when the root of the failure fits `known`."""

    def named_failure(view: RecordView) -> Match | None:
        root = view.root
        if root is None or root.known is not known:
            return None
        step = None if root.failure is None else root.failure.step
        fixes = (*known.fixes, *way_back(view))
        return Match(step, _evidence(root), fixes, severity=_severity(view))

    where = "an exception" if known.exception_only else "an exception or a line of a log"
    return rule(
        known.rule,
        known.title,
        tier=Tier.LIVENESS,
        severity=Severity.CRITICAL,
        symptom=f"{where} that is the root of the failure says so (text: {known.pattern.pattern})",
        cause=known.cause,
        remedy=known.remedy,
        source=known.source,
    )(named_failure)


def _severity(view: RecordView) -> Severity | None:
    return Severity.WARNING if view.status is RunStatus.FINISHED else None


def _evidence(root: Root) -> tuple[Evidence, ...]:
    lines = []
    failure = root.failure
    if root.line is not None:
        lines += [root.line.text.strip()[:300], f"worker {root.line.worker} ({root.line.log})"]
    elif failure is not None:
        where = f" at step {failure.step}" if failure.step is not None else ""
        log = f" ({failure.log})" if failure.log else ""
        lines += [
            f"{failure.type}: {failure.message}".rstrip(": "),
            f"worker {failure.worker}{where}{log}",
        ]
        if failure.place:
            lines.append(failure.place)
        if failure.wrapped_in:
            lines.append(f"wrapped in {', '.join(failure.wrapped_in)}")
    others = sorted({f"{f.worker}: {f.type}" for f in root.others})
    if others:
        lines.append(f"then {', '.join(others[:5])}")
    return tuple(Evidence(line) for line in lines)


RULES = (first_exception, *(_text_rule(known) for known in KNOWN_TEXTS))
