"""Do tokens go to the experts the engine chose, and are the experts all in use?"""

from __future__ import annotations

from typing import Any

from miles.diagnosis.finding import Evidence, Fix, FixKind, Match, Severity, Tier
from miles.diagnosis.patches import CHECK_SYNC
from miles.diagnosis.rule import rule
from miles.diagnosis.view import RecordView
from miles.record import events as kinds

_WITHOUT_REPLAY = Fix(
    "train without replayed routes until the engine returns them",
    FixKind.RESUME,
    "trainer and engine choose different experts; the log-prob gap roughly doubles",
    (("alignment.use_rollout_routing_replay", False),),
)


def _missing(view: RecordView, shape: bool) -> list[dict[str, Any]]:
    return [e for e in view.events(kinds.ROUTES_MISSING) if (e["what"] == "shape") == shape]


def _told(events: list[dict[str, Any]]) -> list[Evidence]:
    return [
        Evidence(f"step {e['step']}: {e['count']} samples, {e.get('why', e['what'])}") for e in events[:3]
    ]


@rule(
    "RT1",
    "Routes are not replayed although they should be",
    tier=Tier.NUMERICS,
    severity=Severity.CRITICAL,
    symptom="routing replay (R3) is on, and samples came without routes, or less than 99 % of rows were "
    "replayed",
    cause="the engine does not record routes, or something on the way to the trainer drops the field",
    remedy="ask the engine for one response and look for its routes; switch recording on; go around the "
    "router",
    source="M#407, S#1145, S#1909",
    thresholds=("replayed_rows", "mean_steps"),
)
def replay_missing(view: RecordView) -> Match | None:
    if not view.replays_routes:
        return None
    events = _missing(view, shape=False)
    evidence = _told(events)
    share = view.recent_mean("route/replayed_rows_frac")
    if share is not None and share < view.thresholds.replayed_rows:
        evidence.append(view.evidence(f"{share:.1%} of rows replayed", "route/replayed_rows_frac"))
    if not evidence:
        return None
    severity = Severity.WARNING if share else Severity.CRITICAL
    return Match(
        events[0]["step"] if events else view.step, tuple(evidence), (_WITHOUT_REPLAY,), severity=severity
    )


@rule(
    "RT2",
    "Routes have the wrong shape",
    tier=Tier.NUMERICS,
    severity=Severity.CRITICAL,
    symptom="a sample's routes do not have one row per token but the last, or not top-k experts",
    cause="turns were merged, a response was cut, or prefix-cache rows were left out after the routes "
    "were recorded",
    remedy="drop such samples or ask for them again; report the engine and its version",
    source="miles types.py",
)
def wrong_shape(view: RecordView) -> Match | None:
    events = _missing(view, shape=True)
    return Match(events[0]["step"], tuple(_told(events)), (_WITHOUT_REPLAY,)) if events else None


@rule(
    "RT3",
    "Replayed routes do not belong to these tokens",
    tier=Tier.NUMERICS,
    severity=Severity.CRITICAL,
    symptom="more than 1 % of (token, layer) choices share no expert with what the trainer would choose",
    cause="rows or layers are shifted: wrong layer order, an off-by-one row, another pipeline split, or "
    "an engine "
    "with other weights",
    remedy="compare the order of MoE layers on both sides and the first row; then the weights",
    source="slime (overlap check of replayed routes)",
    thresholds=("zero_overlap", "gap_warn", "mean_steps"),
)
def foreign_routes(view: RecordView) -> Match | None:
    values = view.tail("route/zero_overlap_frac", 3)
    if len(values) < 3 or min(values) <= view.thresholds.zero_overlap:
        return None
    evidence = [view.evidence(f"{values[-1]:.1%} of choices share no expert", "route/zero_overlap_frac")]
    worst = _worst_layer(view)
    if worst is not None:
        evidence.append(worst)
    decided = view.recent_mean("train/train_rollout_logprob_abs_diff_no_replay")
    if decided is not None and decided > view.thresholds.gap_warn:
        cause = f"the engine computes with other weights: without replay the gap is {decided:.2g} nats, too"
        return Match(view.step, tuple(evidence), (CHECK_SYNC,), cause=cause, severity=Severity.WARNING)
    check = Fix("compare layer order, first row and weights of both sides", FixKind.MANUAL, "none")
    return Match(view.step, tuple(evidence), (check, _WITHOUT_REPLAY))


@rule(
    "RT4",
    "Trainer and engine choose different experts",
    tier=Tier.NUMERICS,
    severity=Severity.WARNING,
    symptom="more than 20 % of expert choices differ (10 % is normal in BF16)",
    cause="more than kernel noise: router precision differs, or the engine's weights are old",
    remedy="keep the router in high precision on both sides; replay routes; verify the weight sync",
    source="arXiv 2510.11370 (about 10 % of routers differ)",
    thresholds=("flip_warn", "mean_steps"),
)
def many_flips(view: RecordView) -> Match | None:
    flips = view.recent_mean("route/flip_frac")
    if flips is None or flips <= view.thresholds.flip_warn:
        return None
    evidence = [view.evidence(f"{flips:.1%} of expert choices differ", "route/flip_frac")]
    worst = _worst_layer(view)
    if worst is not None:
        evidence.append(worst)
    replay = Fix(
        "replay the engine's routes in the trainer (R3)",
        FixKind.RESUME,
        "none known; the engine must return its routes",
        (("alignment.use_rollout_routing_replay", True),),
    )
    verify = Fix("verify the weight sync and the router's precision", FixKind.MANUAL, "none")
    return Match(view.step, tuple(evidence), (verify,) if view.replays_routes else (replay, verify))


@rule(
    "RT6",
    "Replaying routes widens the log-prob gap",
    tier=Tier.NUMERICS,
    severity=Severity.CRITICAL,
    symptom="with routing replay the gap is more than twice what it is without, and above 0.01",
    cause="the replayed routes are not those of the tokens: verified draft tokens are mapped to wrong rows, "
    "or rows or layers are shifted",
    remedy="switch speculative decoding or replay off, one at a time; upgrade the engine",
    source="M#1186 (0.007 with R3, 0.022 with R3 and speculation); ours: compared within one run",
    thresholds=("replay_harm", "gap_growth_floor", "mean_steps"),
)
def harmful_replay(view: RecordView) -> Match | None:
    limits = view.thresholds
    name = "train/train_rollout_logprob_abs_diff"
    replayed, decided = view.recent_mean(name), view.recent_mean(f"{name}_no_replay")
    if replayed is None or decided is None or not view.replays_routes:
        return None
    if replayed <= max(limits.gap_growth_floor, limits.replay_harm * decided):
        return None
    evidence = view.evidence(f"gap {replayed:.3g} with replay, {decided:.3g} without", name)
    return Match(view.step, (evidence,), (_WITHOUT_REPLAY,))


@rule(
    "RT7",
    "Experts are used unevenly",
    tier=Tier.NUMERICS,
    severity=Severity.WARNING,
    symptom="the busiest expert of a layer gets more than five times the mean load",
    cause="the router drifts towards few experts",
    remedy="a small load-balancing loss, a lower learning rate, or a frozen router",
    source="S#1555; threshold ours",
    thresholds=("expert_load", "mean_steps"),
)
def uneven_load(view: RecordView) -> Match | None:
    name = "route/expert_load_max_over_mean"
    load, first = view.recent_mean(name), view.first_mean(name)
    if load is None or first is None or load <= view.thresholds.expert_load or load <= 1.5 * first:
        return None
    evidence = view.evidence(f"{load:.1f} times the mean load, {first:.1f} at the start", name)
    balance = Fix(
        "add a small load-balancing loss",
        FixKind.RESUME,
        "pulls a little against the reward",
        (("training.moe_aux_loss_coeff", 1e-3),),
    )
    return Match(view.step, (evidence,), (balance,))


@rule(
    "RT8",
    "Replayed tokens went to other experts",
    tier=Tier.NUMERICS,
    severity=Severity.CRITICAL,
    symptom="routing replay (R3) is on, and some rows that have a route were dispatched to other experts",
    cause="the trainer lost its place in the recorded routes: another order of micro-batches, rows or layers "
    "in this pass than in the one that the routes were cut for",
    remedy="stop replaying; this is a fault of the trainer, not of the run: report it with the run file",
    source="ours: expert ids compared at dispatch, exactly 0 by construction",
)
def replay_missed(view: RecordView) -> Match | None:
    name = "route/dispatched_flip_frac"
    flagged = view.flagged_steps(name) if view.replays_routes else []
    if not flagged:
        return None
    step, share = flagged[-1]
    evidence = view.evidence(f"step {step}: {share:.2%} of dispatches differ from the engine's", name)
    return Match(step, (evidence,), (_WITHOUT_REPLAY,))


def _worst_layer(view: RecordView) -> Evidence | None:
    prefix = "route/flip_frac/layer_"
    layers = {name: s.last for name, s in view.history.series.items() if name.startswith(prefix)}
    if not layers:
        return None
    name = max(layers, key=lambda n: layers[n])
    return view.evidence(f"worst layer {name.removeprefix(prefix)}: {layers[name]:.1%} differ", name, 1)


RULES = (
    replay_missing,
    wrong_shape,
    foreign_routes,
    many_flips,
    harmful_replay,
    uneven_load,
    replay_missed,
)
