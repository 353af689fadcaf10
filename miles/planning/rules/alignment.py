"""Rules on agreement between trainer and engine: routes, sampling, and samples of older weights."""

from __future__ import annotations

from collections.abc import Iterator

from miles.planning.findings import Found, Severity
from miles.planning.rules.rule import rule
from miles.planning.subject import Subject
from miles.planning.versions import ROUTES_SINCE, older

REPLAY = "alignment.use_rollout_routing_replay"
INTERVAL = "weight_sync.update_weights_interval"


@rule(
    "ALN3",
    Severity.ERROR,
    title="routing replay, but the engine is told not to return routes",
    cause="the trainer replays what the engine recorded; without routes it fails at the first training "
    "step, after a whole rollout",
    fix="leave it out of the [sglang] section; the plan switches it on",
)
def routes_switched_off(subject: Subject) -> Iterator[Found]:
    setting = "sglang.enable_return_routed_experts"
    value = subject.config.sglang.server_args().get("enable_return_routed_experts")
    if subject.routing_replay and subject.config.rollout.backend == "sglang" and value is False:
        yield Found("enable_return_routed_experts = false with R3", setting)


@rule(
    "ALN4",
    Severity.WARNING,
    title="routing replay with servers that already run",
    cause="only a server started with --enable-return-routed-experts returns routes, and SGLang's published "
    "router drops the request for them; this cannot be seen before the first request",
    fix="start the servers with --enable-return-routed-experts and give their own addresses, not a router's",
)
def routes_of_external_engines(subject: Subject) -> Iterator[Found]:
    addresses = subject.config.rollout.rollout_external_engine_addrs
    if subject.routing_replay and addresses:
        yield Found(f"R3 with {len(addresses)} external server(s)", "rollout.rollout_external_engine_addrs")


@rule(
    "ALN5",
    Severity.WARNING,
    title="routing replay together with speculative decoding",
    cause="routes of tokens that a draft proposed were seen to be recorded at the wrong rows: the gap was "
    "0.022 with both, 0.007 with R3 alone (Qwen3.5-35B-A3B)",
    fix="compare train_rollout_logprob_abs_diff with and without; switch one of them off if it doubles",
)
def replay_with_speculation(subject: Subject) -> Iterator[Found]:
    elsewhere = subject.config.rollout.backend != "native"
    if elsewhere and subject.routing_replay and subject.config.sglang.speculative_algorithm:
        yield Found(
            f"R3 with speculative_algorithm {subject.config.sglang.speculative_algorithm}",
            "sglang.speculative_algorithm",
        )


@rule(
    "ALN6",
    Severity.ERROR,
    title="this SGLang returns no routes",
    cause=f"servers before {ROUTES_SINCE} ignore return_routed_experts, so R3 would have nothing to replay",
    fix=f"install sglang {ROUTES_SINCE} or newer",
    local=True,
)
def engine_too_old_for_routes(subject: Subject) -> Iterator[Found]:
    installed = subject.facts.machine.package("sglang")
    if (
        subject.routing_replay
        and subject.config.rollout.backend == "sglang"
        and installed is not None
        and older(installed, ROUTES_SINCE)
    ):
        yield Found(f"sglang {installed} with R3", REPLAY)


@rule(
    "ALN7",
    Severity.ERROR,
    title="true on-policy mode with fast numerics",
    cause="fast kernels give a token other bits in another batch, so trainer and engine would differ",
    fix="leave --numerics out",
)
def on_policy_with_fast_kernels(subject: Subject) -> Iterator[Found]:
    if subject.config.alignment.true_on_policy_mode and subject.numerics == "fast":
        yield Found('numerics = "fast" with true_on_policy_mode', "alignment.numerics")


@rule(
    "ALN8",
    Severity.ERROR,
    title="true on-policy mode with an engine in another number format",
    cause="weights that were rounded for the engine are another function than the trainer's; no kernel makes "
    "their bits equal",
    fix="leave --rollout-format out, or train in the same format",
)
def on_policy_with_another_format(subject: Subject) -> Iterator[Found]:
    wanted, policy = subject.config.precision.rollout_format, subject.precision
    if wanted is None or policy is None or policy.training == policy.rollout:
        return
    if subject.config.alignment.true_on_policy_mode:
        yield Found(f"{wanted} rollout with {subject.dtype} training", "precision.rollout_format")


@rule(
    "SMP1",
    Severity.ERROR,
    title="greedy sampling cannot explore",
    cause="at temperature 0 all samples of a prompt are equal, so every advantage is 0; a temperature below "
    "0 is refused by the run file",
    fix="set --rollout-temperature 1.0",
)
def greedy_rollout(subject: Subject) -> Iterator[Found]:
    config = subject.config
    if config.rollout.rollout_temperature == 0 and config.algorithm.loss_type != "sft_loss":
        yield Found("rollout_temperature 0", "rollout.rollout_temperature")


@rule(
    "SMP2",
    Severity.WARNING,
    title="the sampled distribution is cut",
    cause="log-probs are those of the whole distribution at this temperature; tokens outside top-p or top-k "
    "are never drawn, so importance weights are of another distribution than the one that sampled",
    fix="use --rollout-top-p 1.0 --rollout-top-k -1 in training; evaluation has its own",
)
def truncated_sampling(subject: Subject) -> Iterator[Found]:
    rollout = subject.config.rollout
    if subject.config.algorithm.loss_type == "sft_loss":
        return
    if rollout.rollout_top_p < 1:
        yield Found(f"rollout_top_p {rollout.rollout_top_p:g}", "rollout.rollout_top_p")
    if rollout.rollout_top_k > 0:
        yield Found(f"rollout_top_k {rollout.rollout_top_k}", "rollout.rollout_top_k")


@rule(
    "OFF1",
    Severity.WARNING,
    title="samples of older weights without a correction",
    cause="rollouts one step ahead, asynchronous and partial rollouts, and those between two weight updates, "
    "train on tokens that older weights sampled; uncorrected, the drift between both sides biases every step",
    fix="add --use-tis",
)
def stale_without_correction(subject: Subject) -> Iterator[Found]:
    config = subject.config
    rollout, correction = config.rollout, config.correction
    # With the engine's log-probs as the old policy the loss itself weighs by the policy that sampled.
    if config.algorithm.loss_type == "sft_loss" or config.algorithm.use_rollout_logprobs:
        return
    if correction.use_tis or correction.use_rs:
        return
    for setting in ("one_step_ahead", "fully_async"):
        if getattr(rollout, setting):
            yield Found(f"{setting} without a correction", f"rollout.{setting}")
    if rollout.partial_rollout and not rollout.mask_offpolicy_in_partial_rollout:
        yield Found("partial_rollout without a correction", "rollout.partial_rollout")
    interval = config.weight_sync.update_weights_interval
    if interval > 1:
        found = f"update_weights_interval {interval} without a correction"
        yield Found(found, INTERVAL)


@rule(
    "OFF2",
    Severity.WARNING,
    title="partial rollouts with nothing to keep",
    cause="a rollout is cut off when enough groups are complete; without over-sampling it ends with the last "
    "of them, and no sample is left unfinished",
    fix="set --over-sampling-batch-size above --rollout-batch-size",
)
def nothing_partial(subject: Subject) -> Iterator[Found]:
    rollout = subject.config.rollout
    drawn, wanted = rollout.over_sampling_batch_size, rollout.rollout_batch_size
    if rollout.partial_rollout and wanted is not None and (drawn or wanted) <= wanted:
        yield Found(f"partial_rollout with {drawn or wanted} groups in flight", "rollout.partial_rollout")
    if rollout.mask_offpolicy_in_partial_rollout and not rollout.partial_rollout:
        setting = "rollout.mask_offpolicy_in_partial_rollout"
        yield Found("mask_offpolicy_in_partial_rollout alone", setting, "add --partial-rollout")


@rule(
    "OFF3",
    Severity.ERROR,
    title="engines that need their weights at every step",
    cause="engines that share GPUs with the trainer give their weights up in every step; samples of older "
    "weights cannot agree with the weights that learn from them to the bit; a supervised run has no engine",
    fix="leave --update-weights-interval out",
)
def weights_at_every_step(subject: Subject) -> Iterator[Found]:
    config = subject.config
    interval = config.weight_sync.update_weights_interval
    reasons = {
        "cluster.colocate": config.cluster.colocate,
        "alignment.true_on_policy_mode": config.alignment.true_on_policy_mode,
        "algorithm.loss_type = sft_loss": config.algorithm.loss_type == "sft_loss",
    }
    for reason, holds in reasons.items():
        if interval > 1 and holds:
            yield Found(f"update_weights_interval {interval} with {reason}", INTERVAL)


@rule(
    "LPR1",
    Severity.WARNING,
    title="the gap between trainer and engine is not measured",
    cause="with the engine's log-probs as the old policy, a comparison with the old policy is 0 by "
    "definition; the gap is then only seen against the current policy",
    fix="leave --use-rollout-logprobs out to have it measured",
)
def gap_not_measured(subject: Subject) -> Iterator[Found]:
    if subject.config.algorithm.use_rollout_logprobs:
        yield Found("use_rollout_logprobs", "algorithm.use_rollout_logprobs")


@rule(
    "MOE1",
    Severity.WARNING,
    title="a load-balancing loss in reinforcement learning",
    cause="it pulls the router away from the routes that earned the reward; on large models it was the "
    "cause of NaN (Qwen3-235B-A22B)",
    fix="set --moe-aux-loss-coeff 0",
)
def aux_loss_in_rl(subject: Subject) -> Iterator[Found]:
    config, spec = subject.config, subject.spec
    if spec is not None and spec.is_moe and config.algorithm.loss_type != "sft_loss":
        coefficient = config.training.moe_aux_loss_coeff
        if coefficient > 0:
            yield Found(f"moe_aux_loss_coeff {coefficient:g}", "training.moe_aux_loss_coeff")


@rule(
    "STP2",
    Severity.WARNING,
    title="the chat template ends turns with a token that the model does not stop at",
    cause="a response goes on after its turn has ended, into turns that it makes up, until the length limit",
    fix="add --rollout-stop-token-ids",
)
def turn_end_not_stop(subject: Subject) -> Iterator[Found]:
    end, stops = subject.facts.checkpoint.turn_end, subject.config.rollout.rollout_stop_token_ids
    if end is not None and subject.config.data.apply_chat_template and end[0] not in stops:
        yield Found(
            f"{end[1]!r} (id {end[0]}) ends a turn and is not in eos_token_id",
            "rollout.rollout_stop_token_ids",
            f"add --rollout-stop-token-ids {end[0]}",
        )


@rule(
    "STP3",
    Severity.ERROR,
    title="an empty stop string",
    cause="every text contains it, so every response would end at its first token",
    fix="leave it out of --rollout-stop",
)
def empty_stop_string(subject: Subject) -> Iterator[Found]:
    if "" in subject.config.rollout.rollout_stop:
        yield Found("rollout_stop holds an empty string", "rollout.rollout_stop")


@rule(
    "STP4",
    Severity.WARNING,
    title="a stop string that is spelled, not meant",
    cause="a shell hands a backslash and a letter over as they are; a line end or a tab is another character",
    fix="in a shell --rollout-stop $'\\n'; in the run file rollout_stop = [\"\\n\"]",
)
def spelled_line_end(subject: Subject) -> Iterator[Found]:
    for stop in subject.config.rollout.rollout_stop:
        if stop and not stop.replace("\\n", "").replace("\\r", "").replace("\\t", ""):
            yield Found(f"{stop!r} is {len(stop)} characters, backslashes among them", "rollout.rollout_stop")
