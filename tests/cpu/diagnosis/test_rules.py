"""Each rule fires on its signature, with evidence and a way out, and is quiet on a healthy run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest

from miles.config.fields import by_dotted
from miles.diagnosis import BY_ID, RULES, RecordView, Severity, Thresholds
from miles.diagnosis.known_texts import KNOWN_TEXTS
from miles.diagnosis.live import LIVE_SETTINGS, TRAINING_SETTINGS
from miles.diagnosis.not_evaluated import FOREIGN_METRICS, NOT_EVALUATED
from miles.diagnosis.reference import rules_page
from miles.diagnosis.thresholds import DEFAULT
from miles.record import RecordWriter, RunReader, RunStatus
from miles.record.metrics import find_metric

Steps = list[dict[str, float]]
Edit = dict[str, float | Callable[[int], float]]


@dataclass(frozen=True)
class Case:
    """A healthy run with some metrics replaced (a constant or a function of the step), events, settings."""

    rule: str
    metrics: Edit = field(default_factory=dict)
    events: tuple[tuple[str, dict[str, Any]], ...] = ()
    config: dict[str, dict[str, Any]] = field(default_factory=dict)
    drop: tuple[str, ...] = ()
    severity: str = "warning"
    says: str = ""
    patch: dict[str, Any] | None = None


ROUTES = (
    "route/flip_frac",
    "route/zero_overlap_frac",
    "route/replayed_rows_frac",
    "route/expert_load_max_over_mean",
)
FLAT: Edit = {"rollout/raw_reward": 0.3}
LOST = "rollout/zero_std/all_zero_percentage"
GAP = "train/train_rollout_logprob_abs_diff"
NO_REPLAY = {"alignment": {"use_rollout_routing_replay": False}}
RAISED_CAP = {"rollout.rollout_max_response_len": 24}
CUT = {"step": 4, "what": "shape", "count": 1, "why": "11 rows for 12"}
NAN_AT_10 = ("non_finite", {"step": 10, "tensor": "model.layers.0.q_proj", "what": "gradient", "count": 7})

CASES = (
    Case("NF1", events=(NAN_AT_10,), severity="critical", patch={"optimizer.lr": 1e-4},
         says="step 10: 7 non-finite elements in the gradient of model."),
    Case("NF1", events=(NAN_AT_10,), config={"debug": {"inject_fault": "nan_grad@10"}}, severity="critical",
         says="step 10", patch={"debug.inject_fault": None}),
    Case("NF1", {"train/loss": lambda s: math.nan if s == 30 else 0.0}, severity="critical", says="step 30"),
    Case("NF1", events=(NAN_AT_10,), config={"training": {"moe_aux_loss_coeff": 0.01}}, severity="critical",
         patch={"training.moe_aux_loss_coeff": 0.0}),
    Case("OP2", {"train/grad_norm": lambda s: 45.0 if s == 40 else 2.0}, says="45 at step 40"),
    Case("OP2", {"train/grad_norm": lambda s: 5e3}, says="5e+03"),
    Case("MM1", {"train/ppo_kl": lambda s: 0.02 if s == 1 else 0.0}, says="train/ppo_kl is 0.02"),
    Case("MM4", {"rollout/log_probs": -0.2}, says="trainer -0.2000, engine -0.3000"),
    Case("MM5", {GAP: 0.05}, drop=ROUTES, says="0.05", patch={"correction.tis_clip": 2.0}),
    Case("MM5", {GAP: 0.2}, drop=ROUTES, severity="critical"),
    Case("MM6", {GAP: 0.05, "route/flip_frac": 0.12}, config=NO_REPLAY,
         says="12.0% of expert choices differ", patch={"alignment.use_rollout_routing_replay": True}),
    Case("MM6", {GAP: 0.2}, severity="critical", patch={"correction.tis_clip": 2.0}),
    Case("MM2", {"rollout/ref_log_probs": -0.35}, says="reference -0.35"),
    Case("MM2", {"rollout/ref_log_probs": -0.35}, config={"model": {"ref_load": "/other"}},
         patch={"model.ref_load": None}),
    Case("MM3", {"train/kl_loss": lambda s: 0.8 if s == 1 else 0.0}, says="0.8 in step 1"),
    Case("MM3", {"train/kl_loss": 1.4}, severity="critical"),
    Case("MM7", {GAP: 0.5}, config={"precision": {"fp8_format": "e4m3"}}, says="0.5 nats"),
    Case("MM9", {GAP: lambda s: 1e-9 if s == 7 else 0.0}, severity="critical", says="at step 7",
         config={"alignment": {"true_on_policy_mode": True}}),
    Case("MM10", {GAP: 1e-5}, config={"run": {"deterministic": True}}, says="1e-05"),
    Case("MM13", {"train/mis_catastrophic_seq_fraction": 0.03}, says="3.0%",
         patch={"correction.use_rs": True, "correction.rs_veto_threshold": 1e-4}),
    Case("RT6", {GAP: 0.022, f"{GAP}_no_replay": 0.007}, severity="critical", says="0.022 with replay",
         patch={"alignment.use_rollout_routing_replay": False}),
    Case("FP4", {"precision/activation_saturated_frac/layer_1": 0.02}, says="2.0% of the activations",
         patch={"precision.extra_high_precision_layers_hf": ["layers.1."]}),
    Case("FP5", {f"precision/weight_underflow_frac/layer_{i}": 0.08 - 0.07 * i for i in range(2)},
         config={"precision": {"fp8_format": "e4m3"}}, says="8.0% of the weights of layer 0",
         patch={"precision.extra_high_precision_layers_hf": ["layers.0."]}),
    Case("I43", {"precision/weight_error": 0.0}, config={"precision": {"int4_qat": True}},
         severity="critical", says="equal before and after"),
    Case("NF2", {"train/log_ratio_bounded": lambda s: 3.0 if s == 12 else 0.0},
         says="at most 3 tokens (step 12)", patch={"optimizer.lr": 1e-4}),
    Case("OP1", {**FLAT, "train/grad_norm": lambda s: 1.5 if s <= 30 else 4.0}, says="100% of the last 20",
         patch={"optimizer.lr": 1e-4}),
    Case("OP3", {"train/pg_clipfrac": 0.6}, says="60%", patch={"optimizer.lr": 1e-4}),
    Case("OP4", {"train/ess_ratio": 0.7}, says="0.70", config={"training": {"num_steps_per_rollout": 4}},
         patch={"training.num_steps_per_rollout": 1, "training.global_batch_size": None}),
    Case("OP4", {"train/ess_ratio": 0.4}, severity="critical"),
    Case("OP5", {"train/kl_loss": lambda s: 0.9 if s == 50 else 0.01}, says="0.9 at step 50",
         config={"algorithm": {"use_kl_loss": True, "kl_loss_coef": 0.01}},
         patch={"algorithm.kl_loss_coef": 0.02}),
    Case("OP9", {"train/value_clipfrac": 0.5}, says="50%", patch={"critic.critic_lr": 1e-4}),
    Case("OP9", {"train/value_clipfrac": 0.5}, config={"critic": {"critic_lr": 9e-4}},
         patch={"critic.critic_lr": 3e-4}),
    Case("OP12", {"train/explained_variance": -0.4}, says="-0.40 of the variance",
         patch={"critic.critic_lr": 1e-4}),
    Case("OP10", {"train/mtp_loss": 1.7}, says="1.70"),
    Case("SY17", {"rollout/weight_version/max": lambda s: min(s - 1, 40)}, severity="critical",
         says="version 40 in steps 78 to 80"),
    Case("SY17", {"rollout/weight_version/max": 0.0}, severity="critical",
         config={"debug": {"debug_skip_weight_update": True}},
         patch={"debug.debug_skip_weight_update": False}),
    Case("RO5", {"eval/sort": lambda s: 0.5, "rollout/raw_reward": lambda s: 0.05 * s},
         says="eval/sort 0.500 -> 0.500"),
    Case("RO7", {"rollout/weight_version/min": lambda s: max(0, s - 8)}, says="7.0 versions old",
         config={"rollout": {"fully_async": True}}, patch={"rollout.max_weight_staleness": 4}),
    Case("RO7", {"rollout/weight_version/min": lambda s: max(0, (s - 1) // 20 * 20)},
         config={"weight_sync": {"update_weights_interval": 20}},
         patch={"weight_sync.update_weights_interval": 1}),
    Case("SY17", {"rollout/weight_version/max": lambda s: min((s - 1) // 4 * 4, 40)}, severity="critical",
         config={"weight_sync": {"update_weights_interval": 4}}, says="version 40 in steps 75 to 80"),
    Case("RO8", {"rollout/weight_version/mixed_version_ratio": 0.8}, says="80%",
         patch={"rollout.mask_offpolicy_in_partial_rollout": True}),
    Case("RO9", {"rollout/tito_session_mismatch_rate/special_token": lambda s: 0.02 if s == 3 else 0.0},
         severity="critical", says="2.00% at step 3"),
    Case("RO12", {"rollout/rollout_log_probs": -7.5}, severity="critical", says="-7.50"),
    Case("RO13", {"rollout/spec_accept_rate": lambda s: 0.91 - 0.0014 * s}, says="0.906 at the start",
         drop=(), patch={"speculative.enable_mtp_training": True, "speculative.mtp_num_layers": 1},
         severity="warning"),
    Case("RO13", {"rollout/spec_accept_rate": lambda s: 0.91 - 0.0014 * s}, severity="warning",
         config={"speculative": {"mtp_num_layers": 2}}, patch={"speculative.enable_mtp_training": True}),
    Case("RO13", {"rollout/spec_accept_length": 1.2}, severity="critical",
         config={"sglang": {"speculative_algorithm": "NGRAM"}}, patch={"sglang.speculative_num_steps": 1}),
    Case("RO13", {"rollout/spec_accept_rate": lambda s: max(0.4, 0.91 - 0.01 * s)}, severity="critical"),
    Case("RO13", {"rollout/spec_accept_length": 1.2}, severity="critical", says="1.2 now"),
    Case("RO14", {"perf/spec_speedup": 0.8}, says="0.80 of the tokens",
         config={"sglang": {"speculative_algorithm": "NGRAM", "speculative_num_steps": 4}},
         patch={"sglang.speculative_num_steps": 2}),
    Case("RO14", {"perf/spec_speedup": 0.97}, config={"sglang": {"speculative_num_steps": 1}},
         patch={"sglang.speculative_num_steps": 0}),
    Case("SY4", {"perf/wait_time_ratio": 0.7}, says="70%"),
    Case("SY4", {"perf/wait_time_ratio": 0.4}, config={"rollout": {"one_step_ahead": True}}),
    Case("SY5", {"perf/actor_train_mfu": 0.08}, severity="info", says="8.0%"),
    Case("SY8", {"rollout/prefix_cache_hit_rate": 0.0}, config={"rollout": {"n_samples_per_prompt": 8}},
         severity="info", says="0%"),
    Case("SY19", {"perf/update_weights_density": 0.3}, severity="info", says="30.0%"),
    Case("MM8", {GAP: lambda s: 0.008 + 0.0002 * s}, says="in the last"),
    Case("MM11", {"train/tis_clipfrac": 0.02}, says="2.00%"),
    Case("MM11", {"train/tis_clipfrac": 0.2}, severity="critical"),
    Case("MM12", {"train/ois": 0.75}, config={"rollout": {"rollout_top_p": 0.9}}, says="0.750",
         patch={"rollout.rollout_top_p": 1.0}),
    Case("MM14", {GAP: 0.0}, config={"algorithm": {"use_rollout_logprobs": True}}, severity="info",
         patch={"algorithm.use_rollout_logprobs": False}),
    Case("RT1", {"route/replayed_rows_frac": 0.5}, says="50.0%"),
    Case("RT1", events=(("routes_missing", {"step": 4, "what": "absent", "count": 3}),), drop=ROUTES[2:3],
         severity="critical",
         says="step 4: 3 samples"),
    Case("RT2", events=(("routes_missing", CUT),), severity="critical", says="11 rows for 12"),
    Case("RT3", {"route/zero_overlap_frac": 0.3, "route/flip_frac/layer_1": 0.8}, severity="critical",
         says="worst layer 1"),
    Case("RT3", {"route/zero_overlap_frac": 0.3, f"{GAP}_no_replay": 0.4}, says="30.0%"),
    Case("RT4", {"route/flip_frac": 0.35}, says="35.0%"),
    Case("RT7", {"route/expert_load_max_over_mean": lambda s: 1.5 + 0.1 * s},
         patch={"training.moe_aux_loss_coeff": 1e-3}),
    Case("RT8", {"route/dispatched_flip_frac": lambda s: 0.02 if s == 30 else 0.0}, severity="critical",
         says="step 30: 2.00% of dispatches", patch={"alignment.use_rollout_routing_replay": False}),
    Case("RO10", {"rollout/none_reward_ratio": lambda s: 0.1 if s == 9 else 0.0}, says="step 9"),
    Case("RO10", {"rollout/none_reward_ratio": 0.9}, severity="critical"),
    Case("DA1", events=(("bad_row", {"file": "train.jsonl", "line": 17, "reason": "not JSON"}),),
         says="train.jsonl:17: not JSON"),
    Case("OP6", FLAT, says="entropy"),
    Case("OP6", FLAT, config={"algorithm": {"eps_clip_high": 0.2}}, patch={"algorithm.eps_clip_high": 0.28}),
    Case("OP7", {**FLAT, "train/entropy": lambda s: 0.5 + 0.03 * s}, patch={"algorithm.eps_clip_high": 0.2}),
    Case("RO1", {**FLAT, "rollout/zero_std/fraction": 0.6}, says="60%",
         patch={"rollout.dynamic_sampling_filter_path": "check_reward_nonzero_std"}),
    Case("RO1", {"rollout/raw_reward": 0.0, "rollout/zero_std/fraction": 1.0,
                 "rollout/zero_std/all_zero_percentage": 1.0}, severity="critical", says="100% all fail"),
    Case("OP11", {**FLAT, LOST: lambda s: min(0.1 + 0.02 * s, 0.5)}, says="-> 50%",
         config={"optimizer": {"lr": 3e-3}}, patch={"optimizer.lr": 3e-4}),
    Case("RO2", {"rollout/truncated_ratio": 0.33}, says="33%", patch=RAISED_CAP),
    Case("RO3", {**FLAT, "rollout/response_len/mean": lambda s: 4.0 + 0.1 * s}, says="cap 12"),
    Case("RO4", {"rollout/repetition_frac": 0.02}),
    Case("RO4", {"rollout/repetition_frac": 0.2}, severity="critical", says="20.0%"),
)  # fmt: skip
ELSEWHERE = {"LV1", "LV2", "LV3", "SY1", "SY2", "EX1", "OP8", "MM15", *(text.rule for text in KNOWN_TEXTS)}
"""Rules that need more than metrics; they have tests of their own."""


def apply(steps: Steps, case: Case) -> Steps:
    for number, metrics in enumerate(steps, start=1):
        for name in case.drop:
            del metrics[name]
        for name, value in case.metrics.items():
            metrics[name] = value(number) if callable(value) else value
    return steps


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.rule)
def test_the_rule_fires_on_its_signature(
    case: Case, healthy: Callable[[int], Steps], write_run: Callable[..., RunReader]
) -> None:
    reader = write_run(apply(healthy(0), case), config=case.config, events=case.events)
    finding = BY_ID[case.rule].check(RecordView.of_run(reader))
    assert finding is not None
    assert finding.severity == case.severity
    assert finding.fixes and finding.cause and finding.evidence
    assert case.says in " | ".join(evidence.text for evidence in finding.evidence)
    if case.patch is not None:
        assert case.patch in [dict(fix.patch) for fix in finding.fixes]
    for fix in finding.fixes:
        assert fix.risk and all(key in by_dotted() for key, _ in fix.patch), "a patch names real settings"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.id)
def test_the_rule_is_quiet_on_a_healthy_run_and_on_an_empty_record(
    rule: Any, healthy: Callable[[int], Steps], write_run: Callable[..., RunReader]
) -> None:
    assert rule.check(RecordView.of_run(write_run(healthy(3)))) is None
    assert rule.check(RecordView.of_run(write_run([{}], name="bare"))) is None


NEAR_MISSES = (
    Case("OP1", {"train/grad_norm": lambda s: 1.5 if s <= 30 else 4.0}),  # the reward rises all the same
    Case("OP5", {"train/kl_loss": lambda s: 1e-6 * 1.25**s}),  # grows fast, but does not jump
    Case("OP5", {"train/kl_loss": lambda s: 0.04 if s == 50 else 0.001}),  # jumps, and is tiny
    Case("OP11", {LOST: lambda s: min(0.1 + 0.02 * s, 0.5)}),  # the reward rises all the same
    Case("OP11", {**FLAT, LOST: 0.6}),  # hard from the start
    Case("OP11", {**FLAT, LOST: lambda s: 0.3 if s < 20 else 0.4}),  # too little to tell from noise
    Case("RO1", {**FLAT, "rollout/zero_std/fraction": 0.6, LOST: lambda s: min(0.02 * s, 0.5)}),  # OP11
    Case("RO5", {"eval/sort": lambda s: 0.3 + 0.03 * s, "rollout/raw_reward": lambda s: 0.08 * s}),
    Case("RO7", {"rollout/weight_version/min": lambda s: max(0, s - 4)}),
    Case(
        "RO8", {"rollout/weight_version/mixed_version_ratio": 0.8}, config={"correction": {"use_tis": True}}
    ),
    Case("RT6", {GAP: 1e-5, f"{GAP}_no_replay": 1e-7}),  # kernel noise
    Case(
        "RT8",
        {"route/dispatched_flip_frac": 0.02},
        config={"alignment": {"use_rollout_routing_replay": False}},
    ),
    Case("MM2", {"rollout/ref_log_probs": -0.35}, config={"model": {"load": "/a/checkpoint"}}),
    Case("FP4", {"precision/activation_saturated_frac/layer_1": 0.005}),
    Case("FP5", {"precision/weight_underflow_frac/layer_0": 0.12}, config={"precision": {"int4_qat": True}}),
    Case("I43", {"precision/weight_error": 0.1}, config={"precision": {"int4_qat": True}}),
    Case("MM7", {GAP: 0.27}, config={"precision": {"fp8_format": "e4m3"}}),
    Case("MM9", {GAP: 0.0}, config={"alignment": {"true_on_policy_mode": True}}),
    Case("SY8", {"rollout/prefix_cache_hit_rate": 0.0}, config={"rollout": {"n_samples_per_prompt": 1}}),
    Case("SY17", {"rollout/weight_version/max": lambda s: (s - 1) // 2}),  # every second step
)


@pytest.mark.parametrize("case", NEAR_MISSES, ids=lambda case: case.rule)
def test_the_rule_is_quiet_where_only_a_part_of_its_signature_is_there(
    case: Case, healthy: Callable[[int], Steps], write_run: Callable[..., RunReader]
) -> None:
    reader = write_run(apply(healthy(0), case), config=case.config, events=case.events)
    assert BY_ID[case.rule].check(RecordView.of_run(reader)) is None


def test_a_first_update_with_several_epochs_is_no_alarm_in_a_run_whose_settings_are_unknown(
    healthy: Callable[[int], Steps], write_run: Callable[..., RunReader]
) -> None:
    steps = healthy(0)
    steps[0]["train/ppo_kl"] = 0.02
    history = write_run(steps).history
    assert BY_ID["MM1"].check(RecordView(history, {})) is not None
    assert BY_ID["MM1"].check(RecordView(history, {}, foreign=True)) is None


def test_every_rule_has_a_firing_case() -> None:
    assert {case.rule for case in CASES} | ELSEWHERE == {rule.id for rule in RULES}


FIELD = {
    *(f"MM{i}" for i in range(1, 16)), *(f"RT{i}" for i in range(1, 8)), "NF1", "NF2",
    *(f"FP{i}" for i in range(1, 8)), *(f"I4{i}" for i in range(1, 5)), "NV1", "LS1",
    *(f"OP{i}" for i in range(1, 11)), *(f"RO{i}" for i in range(1, 15)), *(f"SY{i}" for i in range(1, 20)),
}  # fmt: skip
"""Every symptom known from the field."""


def test_every_known_symptom_is_a_rule_or_said_to_be_missing() -> None:
    rules, missing = {rule.id for rule in RULES}, {row.id for row in NOT_EVALUATED}
    assert not rules & missing
    assert rules | missing >= FIELD
    assert rules - FIELD == {"LV1", "LV2", "LV3", "EX1", "DA1", "SY20", "RT8", "OP11", "OP12"}, "ours"


def test_metrics_that_only_other_systems_record_are_said_to_be_theirs() -> None:
    read = {name for case in CASES for name in case.metrics}
    undeclared = {name for name in read if find_metric(name) is None}
    assert undeclared == set(FOREIGN_METRICS.values())
    for rule, metric in FOREIGN_METRICS.items():
        assert any(case.rule == rule and metric in case.metrics for case in CASES), rule


def test_rules_explain_themselves_and_name_real_thresholds() -> None:
    names = {f.name for f in fields(Thresholds)}
    used = {name for rule in RULES for name in rule.thresholds}
    assert used <= names
    assert names - used <= {"mean_steps"}, "every threshold belongs to a rule"
    for rule in RULES:
        assert rule.symptom and rule.cause and rule.remedy and rule.source and rule.title


def test_a_threshold_can_be_moved(
    healthy: Callable[[int], Steps], write_run: Callable[..., RunReader]
) -> None:
    steps = healthy(0)
    for metrics in steps:
        metrics["rollout/truncated_ratio"] = 0.3
    reader = write_run(steps)
    assert BY_ID["RO2"].check(RecordView.of_run(reader)) is not None
    assert BY_ID["RO2"].check(RecordView.of_run(reader, Thresholds(truncation=0.4))) is None


def test_a_solved_task_is_not_an_entropy_collapse_nor_a_lack_of_signal(
    healthy: Callable[[int], Steps], write_run: Callable[..., RunReader]
) -> None:
    steps = healthy(0) + healthy(1)[40:] * 5
    for metrics in steps[60:]:
        metrics |= {"train/entropy": 0.02, "rollout/zero_std/fraction": 0.8}
    view = RecordView.of_run(write_run(steps))
    assert BY_ID["OP6"].check(view) is None and BY_ID["RO1"].check(view) is None


def test_a_single_event_counts_in_a_post_mortem_and_for_a_while_in_a_live_run(
    healthy: Callable[[int], Steps], write_run: Callable[..., RunReader]
) -> None:
    reader = write_run(healthy(0), events=[NAN_AT_10])
    assert BY_ID["NF1"].check(RecordView.of_run(reader)) is not None
    assert BY_ID["NF1"].check(RecordView(reader.history, reader.config)) is None
    early = write_run(healthy(0)[: 10 + DEFAULT.recent_steps - 1], events=[NAN_AT_10], name="early")
    assert BY_ID["NF1"].check(RecordView(early.history, early.config)) is not None


def test_nf1_names_the_first_tensor_of_several(
    healthy: Callable[[int], Steps], write_run: Callable[..., RunReader]
) -> None:
    later = ("non_finite", {"step": 11, "tensor": "embed", "what": "weight", "count": 1})
    reader = write_run(healthy(0), events=[later, NAN_AT_10])
    finding = BY_ID["NF1"].check(RecordView.of_run(reader))
    assert finding is not None and finding.severity is Severity.CRITICAL
    assert finding.step == 10 and "model.layers.0.q_proj" in finding.title


def test_a_wider_gap_is_normal_where_the_engine_is_quantised(
    healthy: Callable[[int], Steps], write_run: Callable[..., RunReader]
) -> None:
    steps = healthy(0)
    for metrics in steps:
        metrics[GAP] = 0.06
    for name, value in (("fp8_format", "e4m3"), ("rollout_format", "fp8")):
        reader = write_run(steps, config={"precision": {name: value}}, name=name)
        assert BY_ID["MM6"].check(RecordView.of_run(reader)) is None
    reader = write_run(steps, config={"precision": {"rollout_format": "bf16"}}, name="bf16")
    assert BY_ID["MM6"].check(RecordView.of_run(reader)) is not None


@pytest.mark.parametrize(
    ("config", "version"),
    [
        ({"weight_sync": {"update_weights_interval": 4}}, lambda step: step // 4 * 4),
        ({"rollout": {"fully_async": True, "max_weight_staleness": 3}}, lambda step: max(step - 3, 0)),
    ],
)
def test_an_engine_between_two_updates_is_not_stuck(write_run, config, version) -> None:
    steps = [{"rollout/weight_version/max": float(version(step))} for step in range(12)]
    for length in range(4, 12):
        reader = write_run(steps[:length], config=config, name=f"{length}")
        assert BY_ID["SY17"].check(RecordView.of_run(reader)) is None


@pytest.mark.parametrize("setting", ["one_step_ahead", "fully_async"])
def test_the_gap_of_a_run_ahead_is_learning_and_no_symptom(write_run, setting: str) -> None:
    steps = [
        {GAP: 0.2 + 0.02 * step, "rollout/log_probs": -0.5, "rollout/rollout_log_probs": -0.6}
        for step in range(30)
    ]
    for value in (False, True):
        reader = write_run(steps, config={"rollout": {setting: value}}, name=f"{setting}-{value}")
        fired = [id for id in ("MM4", "MM5", "MM8") if BY_ID[id].check(RecordView.of_run(reader)) is not None]
        assert fired == ([] if value else ["MM4", "MM5", "MM8"])


def test_the_reference_page_is_current() -> None:
    page = Path(__file__).parents[3] / "docs" / "reference" / "rules.md"
    assert page.read_text() == rules_page(), "run: python -m miles.diagnosis.reference docs/reference"


def test_a_gap_that_jumps_at_a_resume_is_told_with_its_step(
    healthy: Callable[[int], Steps], tmp_path: Path
) -> None:
    def run(name: str, gap: float) -> RecordView:
        with RecordWriter(tmp_path / name) as writer:
            for step, metrics in enumerate(healthy(0)[:20], start=1):
                writer.metrics(step, metrics | {GAP: 0.011})
        with RecordWriter(tmp_path / name, attempt=2) as writer:
            writer.resume(15)
            for step, metrics in enumerate(healthy(0)[15:20], start=16):
                writer.metrics(step, metrics | {GAP: gap})
        return RecordView.of_run(RunReader(tmp_path / name))

    finding = BY_ID["MM15"].check(run("jump", 0.05))
    assert finding is not None and finding.step == 15 and "0.011 before" in finding.evidence[0].text
    assert BY_ID["MM15"].check(run("calm", 0.012)) is None


def test_one_and_the_same_change_is_live_in_a_running_run_and_a_resume_in_a_finished_one(
    healthy: Callable[[int], Steps], write_run: Callable[..., RunReader]
) -> None:
    steps = healthy(0)
    for metrics in steps:
        metrics["train/pg_clipfrac"] = 0.6
    reader = write_run(steps)
    for status, kind in ((RunStatus.RUNNING, "live"), (RunStatus.FINISHED, "resume")):
        finding = BY_ID["OP3"].check(RecordView(reader.history, reader.config, status=status))
        assert finding is not None and finding.fixes[0].kind == kind
        assert dict(finding.fixes[0].patch) == {"optimizer.lr": 1e-4}


def test_live_settings_are_the_knobs_of_the_trainer() -> None:
    from miles.training.knobs import RANGES

    assert {key.rpartition(".")[2] for key in TRAINING_SETTINGS} == set(RANGES)
    assert set(by_dotted()) >= LIVE_SETTINGS


def test_a_live_fix_names_only_live_settings(
    healthy: Callable[[int], Steps], write_run: Callable[..., RunReader]
) -> None:
    for number, case in enumerate(CASES):
        reader = write_run(apply(healthy(0), case), case.config, case.events, name=f"run{number}")
        view = RecordView(reader.history, reader.config, whole=True)
        for rule in RULES:
            finding = rule.check(view)
            for fix in finding.fixes if finding else ():
                keys = {key for key, _ in fix.patch}
                assert fix.kind != "live" or (keys and keys <= LIVE_SETTINGS), (rule.id, fix)
