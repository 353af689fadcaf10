"""Values that follow from other values alone.

What needs facts (a machine, a checkpoint) is planning's to derive. `resolve_*` derives and never overrides an
explicit value; inconsistencies are for `validation.py` to refuse.
"""

from __future__ import annotations

from math import prod

from miles.config.resolved import ResolvedConfig

PROMPTS = "rollout.rollout_batch_size"
SAMPLES = "rollout.n_samples_per_prompt"
BATCH = "training.global_batch_size"
STEPS = "training.num_steps_per_rollout"
KNOBS = (PROMPTS, SAMPLES, BATCH, STEPS)

_FALLBACKS = {
    "algorithm.eps_clip_high": "algorithm.eps_clip",
    "training.log_probs_max_tokens_per_gpu": "training.max_tokens_per_gpu",
    "reward.eval_reward_key": "reward.reward_key",
    "eval.eval_input_key": "data.input_key",
    "eval.eval_label_key": "data.label_key",
    "eval.eval_tool_key": "data.tool_key",
    "eval.eval_temperature": "rollout.rollout_temperature",
    "eval.eval_top_p": "rollout.rollout_top_p",
    "eval.eval_top_k": "rollout.rollout_top_k",
    "eval.eval_max_response_len": "rollout.rollout_max_response_len",
    "eval.eval_max_prompt_len": "rollout.rollout_max_prompt_len",
    "eval.eval_max_context_len": "rollout.rollout_max_context_len",
}
"""Settings that take another's value where they have none."""


def resolve_all(resolved: ResolvedConfig) -> ResolvedConfig:
    """Every derivation of this module."""
    for rule in (resolve_four_knobs, resolve_fallbacks, resolve_colocation, resolve_dtype):
        resolved = rule(resolved)
    return resolved


def resolve_four_knobs(resolved: ResolvedConfig) -> ResolvedConfig:
    """Fill in `prompts x samples = batch x steps`.

    Steps per rollout are 1 and samples per prompt are 1 where the others leave them free. When a quotient is
    not whole, nothing is derived and `validate_four_knobs` says why.
    """
    known = {knob for knob in KNOBS if resolved.is_explicit(knob)}
    if PROMPTS not in known and BATCH not in known:
        return resolved
    for knob in (STEPS, SAMPLES):
        if len(known) < 3 and knob not in known:
            known.add(knob)
            resolved = resolved.derive(knob, 1, "four knobs: 1 where the others leave it free")
    missing = set(KNOBS) - known
    if len(missing) != 1:
        return resolved
    return _solve(resolved, missing.pop())


def _solve(resolved: ResolvedConfig, missing: str) -> ResolvedConfig:
    mine, others = ((PROMPTS, SAMPLES), (BATCH, STEPS))
    if missing in others:
        mine, others = others, mine
    factor = resolved.value(next(knob for knob in mine if knob != missing))
    quotient, rest = divmod(prod(resolved.value(knob) for knob in others), factor)
    if rest or quotient == 0:
        return resolved
    return resolved.derive(missing, quotient, f"four knobs: {_equation(missing)}")


def _equation(missing: str) -> str:
    prompts, samples, batch, steps = (knob.partition(".")[2] for knob in (PROMPTS, SAMPLES, BATCH, STEPS))
    sides = {prompts: samples, samples: prompts, batch: steps, steps: batch}
    name = missing.partition(".")[2]
    product = f"{batch} x {steps}" if name in (prompts, samples) else f"{prompts} x {samples}"
    return f"{product} / {sides[name]}"


def resolve_fallbacks(resolved: ResolvedConfig) -> ResolvedConfig:
    """Settings that take another's value where they have none."""
    for dotted, source in _FALLBACKS.items():
        if resolved.value(dotted) is None and resolved.value(source) is not None:
            resolved = resolved.derive(dotted, resolved.value(source), f"same as {source}")
    return resolved


def resolve_colocation(resolved: ResolvedConfig) -> ResolvedConfig:
    """Under `colocate` the engines get the trainer's GPUs, and each side gives its memory back."""
    cluster = resolved.config.cluster
    if cluster.colocate and cluster.rollout_num_gpus is None:
        gpus = cluster.actor_num_nodes * cluster.actor_num_gpus_per_node
        resolved = resolved.derive("cluster.rollout_num_gpus", gpus, "colocate: the trainer's GPUs")
    for side in ("cluster.offload_train", "cluster.offload_rollout"):
        if resolved.value(side) is None and (cluster.colocate or cluster.offload):
            resolved = resolved.derive(side, True, "on under colocate and offload")
    return resolved


def resolve_dtype(resolved: ResolvedConfig) -> ResolvedConfig:
    """Megatron's `--bf16` and `--fp16` name the type of the weights."""
    for switch in ("bf16", "fp16"):
        if getattr(resolved.config.precision, switch) and resolved.config.model.dtype is None:
            resolved = resolved.derive("model.dtype", switch, f"precision.{switch}")
    return resolved
