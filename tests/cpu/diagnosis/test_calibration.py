"""No alert on healthy runs, a named cause on the two recipes that collapse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from miles.diagnosis import Monitor, RecordView, assess, diagnose, open_alerts
from miles.errors import ExitCode
from miles.record import History, RecordWriter, RunReader

Steps = list[dict[str, float]]


def feed(history: History, step: int, metrics: dict[str, float]) -> None:
    history.ingest(
        {"kind": "metrics", "writer": "driver", "attempt": 1, "seq": step, "time": float(step), "step": step}
        | {"metrics": metrics}
    )


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_run_never_raises_an_alert(
    seed: int, healthy: Callable[[int], Steps], write_run: Callable[..., RunReader]
) -> None:
    steps = healthy(seed)
    reader = write_run(steps)
    history = History()
    for step, metrics in enumerate(steps, start=1):
        feed(history, step, metrics)
        assert assess(RecordView(history, reader.config)) == [], f"step {step}"
    report = diagnose(reader)
    assert report.findings == () and report.exit_code is ExitCode.OK


@pytest.mark.parametrize(("recipe", "lr", "by_step"), [("sudden_death", 1e-2, 10), ("slow_death", 3e-3, 15)])
def test_a_collapsing_recipe_is_named_with_its_cause_and_a_lower_learning_rate(
    recipe: str, lr: float, by_step: int, request: pytest.FixtureRequest, write_run: Callable[..., RunReader]
) -> None:
    steps: Steps = request.getfixturevalue(recipe)(seed=1)
    reader = write_run(steps, config={"optimizer": {"lr": lr}})
    report = diagnose(reader)
    finding = report.findings[0]
    assert (finding.rule, finding.severity, report.exit_code) == ("OP8", "critical", ExitCode.CRITICAL)
    assert f"learning rate too high ({lr:g})" in finding.cause
    assert finding.fixes[0].patch == (("optimizer.lr", 3e-4),)
    told = " ".join(evidence.text for evidence in finding.evidence)
    assert "active groups fell" in told and "gradient" in told
    assert {f.rule for f in report.findings} == {"OP8"}, "symptoms of the collapse are not told as well"

    history = History()
    fired = None
    for step, metrics in enumerate(steps, start=1):
        feed(history, step, metrics)
        if fired is None and any(f.rule == "OP8" for f in assess(RecordView(history, reader.config))):
            fired = step
    assert fired is not None and fired <= by_step


def test_the_fix_of_a_collapse_starts_from_the_last_checkpoint_before_the_fall(
    slow_death: Callable[..., Steps], write_run: Callable[..., RunReader]
) -> None:
    saves = [("checkpoint", {"step": s, "path": f"checkpoints/step-{s:06d}"}) for s in (4, 20, 40)]
    fix = diagnose(write_run(slow_death(), events=saves)).findings[0].fixes[0]
    assert fix.from_step == 4 and not fix.start_over
    fix = diagnose(write_run(slow_death(), events=saves[1:], name="late")).findings[0].fixes[0]
    assert fix.from_step is None and fix.start_over


def test_a_reward_that_falls_for_no_recorded_reason_is_not_blamed_on_the_learning_rate(
    healthy: Callable[[int], Steps], write_run: Callable[..., RunReader]
) -> None:
    steps = healthy(0)
    for metrics in steps[40:]:
        metrics["rollout/raw_reward"] *= 0.3
    (finding,) = diagnose(write_run(steps)).findings
    assert finding.rule == "OP8" and "learning rate" not in finding.cause
    assert finding.fixes[0].patch == ()


def test_an_alarm_silences_tuning_advice_until_it_clears(
    healthy: Callable[[int], Steps], write_run: Callable[..., RunReader]
) -> None:
    steps = healthy(0)
    for metrics in steps:
        metrics["rollout/truncated_ratio"] = 0.5
    assert [f.rule for f in diagnose(write_run(steps)).findings] == ["RO2"]
    for metrics in steps:
        metrics["train/train_rollout_logprob_abs_diff"] = 0.05
    assert [f.rule for f in diagnose(write_run(steps, name="gap")).findings] == ["MM6"]


def test_findings_are_told_liveness_first_then_numerics_then_data(
    healthy: Callable[[int], Steps], write_run: Callable[..., RunReader]
) -> None:
    steps = healthy(0)
    for metrics in steps:
        metrics["rollout/none_reward_ratio"] = 0.1
    events: list[tuple[str, dict[str, Any]]] = [
        ("non_finite", {"step": 80, "tensor": "lm_head.weight", "what": "gradient", "count": 3}),
        ("worker_dead", {"worker": "engine-0", "reason": "exit code 1"}),
    ]
    report = diagnose(write_run(steps, events=events))
    assert [(f.tier.name, f.rule) for f in report.findings] == [
        ("LIVENESS", "LV3"),
        ("NUMERICS", "NF1"),
        ("DATA", "RO10"),
    ]


def test_the_monitor_raises_once_clears_when_the_signature_is_gone_and_survives_a_resume(
    healthy: Callable[[int], Steps], tmp_path: Any
) -> None:
    steps = healthy(0)
    history = History()
    with RecordWriter(tmp_path, history=history) as writer:
        monitor = Monitor(writer, {})
        for step in range(1, 31):
            metrics = dict(steps[step - 1])
            if step <= 20:
                metrics["train/train_rollout_logprob_abs_diff"] = 0.05
            writer.metrics(step, metrics)
            new = monitor.check(step)
            assert [f.rule for f in new] == (["MM6"] if step == 3 else [])
    told = [(a["rule"], a["state"], a["step"]) for a in RunReader(tmp_path).alerts()]
    assert told == [("MM6", "raised", 3), ("MM6", "cleared", 22)]
    raised = RunReader(tmp_path).alerts()[0]
    assert raised["evidence"] and raised["fixes"] and raised["cause"]

    report = diagnose(RunReader(tmp_path))
    assert report.findings == () and [(p.rule, p.raised, p.cleared) for p in report.past] == [("MM6", 3, 22)]

    history = RunReader(tmp_path).history
    with RecordWriter(tmp_path, attempt=2, history=history) as writer:
        writer.resume(10)
        assert set(open_alerts(history)) == {"MM6"}
        monitor = Monitor(writer, {})
        for step in range(11, 14):
            writer.metrics(step, steps[step])
            monitor.check(step)
        assert open_alerts(history) == {}


def test_an_alert_that_becomes_critical_is_raised_again(
    healthy: Callable[[int], Steps], tmp_path: Any
) -> None:
    with RecordWriter(tmp_path, history=History()) as writer:
        monitor = Monitor(writer, {})
        for step, metrics in enumerate(healthy(0)[:20], start=1):
            gap = 0.05 if step < 10 else 0.5
            writer.metrics(step, metrics | {"train/train_rollout_logprob_abs_diff": gap})
            monitor.check(step)
    raised = [(a["rule"], a["severity"]) for a in RunReader(tmp_path).alerts() if a["state"] == "raised"]
    assert raised[:2] == [("MM6", "warning"), ("MM6", "critical")]


def test_a_collapse_after_non_finite_values_is_their_consequence(
    slow_death: Callable[..., Steps], write_run: Callable[..., RunReader]
) -> None:
    bad = {"step": 5, "tensor": "lm_head.weight", "what": "gradient", "count": 3}
    report = diagnose(write_run(slow_death(), events=[("non_finite", bad)]))
    assert [f.rule for f in report.findings] == ["NF1"]


def test_the_cause_of_a_gap_is_told_before_the_gap(
    healthy: Callable[[int], Steps], write_run: Callable[..., RunReader]
) -> None:
    steps = healthy(0)
    for metrics in steps[40:]:
        metrics |= {"train/train_rollout_logprob_abs_diff": 0.5, "route/zero_overlap_frac": 0.3}
    assert [f.rule for f in diagnose(write_run(steps)).findings][:2] == ["RT3", "MM6"]
