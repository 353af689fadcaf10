"""Prompts that could not be read, samples that could not be judged."""

from __future__ import annotations

from miles.diagnosis.finding import Evidence, Fix, FixKind, Match, Severity, Tier
from miles.diagnosis.rule import rule
from miles.diagnosis.view import RecordView
from miles.record import events as kinds


@rule(
    "DA1",
    "Prompt rows could not be read",
    tier=Tier.DATA,
    severity=Severity.WARNING,
    symptom="rows of the prompt file were left out",
    cause="malformed lines, or rows without the input or label key",
    remedy="mend or remove the lines that are named; data.on_bad_row = 'refuse' stops before training",
    source="miles",
)
def bad_rows(view: RecordView) -> Match | None:
    events = view.history.of_kind(kinds.BAD_ROW)
    counted = view.series("rollout/bad_rows")
    total = max([len(events), *(int(v) for v in counted.values[-1:] if v > 0)])
    if total == 0:
        return None
    evidence = [Evidence(f"{total} rows left out")]
    evidence += [Evidence(f"{e['file']}:{e['line']}: {e['reason']}") for e in events[:5]]
    fix = Fix("mend or remove these lines", FixKind.MANUAL, "none")
    return Match(None, tuple(evidence), (fix,))


@rule(
    "RO10",
    "Samples without a reward",
    tier=Tier.DATA,
    severity=Severity.CRITICAL,
    symptom="for some samples no reward could be computed; critical above one half",
    cause="the verifier or the environment failed on them",
    remedy="read the verifier's errors in logs/ and look at such samples",
    source="miles (none_reward_ratio)",
    thresholds=("none_reward_bad", "recent_steps"),
)
def no_reward(view: RecordView) -> Match | None:
    name = "rollout/none_reward_ratio"
    flagged = view.flagged_steps(name)
    if not flagged:
        return None
    worst_step, worst = max(flagged, key=lambda point: point[1])
    text = f"in {len(flagged)} steps, at most {worst:.1%} of samples (step {worst_step})"
    last = view.series(name).last
    severity = Severity.CRITICAL if last > view.thresholds.none_reward_bad else Severity.WARNING
    fix = Fix("look at the samples without a reward and at the verifier's errors", FixKind.MANUAL, "none")
    return Match(flagged[0][0], (Evidence(text, name, tuple(flagged[-5:])),), (fix,), severity=severity)


RULES = (bad_rows, no_reward)
