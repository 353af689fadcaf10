"""Suggestions about lengths, batches, the learning rate and what fits into memory."""

from __future__ import annotations

from miles_cli.init.scene import Scene, Suggestion

SMALL_PARAMETERS = 10_000_000
"""Below this a laptop samples hundreds of responses in a second."""

LARGE_PARAMETERS = 100_000_000
PROMPT_STEP = 16
"""Prompt limits are multiples of this."""

CPU_RESPONSE, GPU_RESPONSE = 512, 8192
"""Tokens of a free-text answer: short on a CPU, with room to reason on GPUs."""

MICRO_BATCH = 16384
REQUESTS = 256
MEMORY_SHARE = 0.9
"""Of the free memory, what a run may be estimated to need."""


def rollout_max_prompt_len(scene: Scene) -> Suggestion | None:
    """The longest prompt that was measured, and half the model's positions at most."""
    known = scene.from_profile("rollout.rollout_max_prompt_len")
    data, positions = scene.data, scene.positions
    if known or data is None or positions is None or data.problem or data.unit != "tokens":
        return known
    wanted = -(-data.longest // PROMPT_STEP) * PROMPT_STEP
    measured = f"the longest of {data.measured:,} measured prompts has {data.longest} tokens"
    if wanted > positions // 2:
        why = f"half of the model's {positions} positions, though {measured}"
        return Suggestion(positions // 2, why)
    return Suggestion(wanted, measured)


def rollout_max_response_len(scene: Scene) -> Suggestion | None:
    """The profile's; the longest expected answer under `exact`; else room for free text."""
    suggestion = scene.from_profile("rollout.rollout_max_response_len") or _response(scene)
    if scene.positions is None:
        return suggestion
    room = scene.positions - (scene.number("rollout_max_prompt_len") or 0)
    if int(suggestion.value) <= room or room < 1:
        return suggestion
    return Suggestion(room, f"what the prompt limit leaves of the model's {scene.positions} positions")


def _response(scene: Scene) -> Suggestion:
    label = scene.data.longest_label if scene.data else None
    if scene.text("rm_type") == "exact" and label is not None:
        return Suggestion(label + label // 4 + 1, f"the longest expected answer has {label} tokens")
    if scene.on_cluster:
        return Suggestion(GPU_RESPONSE, "room to reason before the answer")
    return Suggestion(CPU_RESPONSE, "a short answer in free text; without a GPU every token takes its time")


def rollout_stop_token_ids(scene: Scene) -> Suggestion | None:
    """The token that ends a turn of the chat template, where generation would run past it."""
    end = scene.checkpoint.facts.turn_end if scene.checkpoint else None
    if end is None:
        return None
    return Suggestion(
        str(end[0]), f"the chat template ends turns with {end[1]!r}, which config.json leaves out"
    )


def rollout_batch_size(scene: Scene) -> Suggestion | None:
    """The profile's; else by the size of the model, and never more than there are prompts."""
    known = scene.from_profile("rollout.rollout_batch_size")
    suggestion = known or _prompts(scene)
    rows = scene.columns.num_rows - (scene.number("hold_out") or 0) if scene.columns else 0
    if rows and rows < int(suggestion.value):
        return Suggestion(1 << (rows.bit_length() - 1), f"there are only {rows} prompts")
    return suggestion


def _prompts(scene: Scene) -> Suggestion:
    if scene.on_cluster:
        return Suggestion(32, "enough groups for a steady gradient")
    if scene.parameters is not None and scene.parameters < SMALL_PARAMETERS:
        return Suggestion(32, "enough groups for a steady gradient, and a small model samples them at once")
    return Suggestion(8, "a model of this size samples slowly without a GPU")


def n_samples_per_prompt(scene: Scene) -> Suggestion | None:
    """The profile's; else a group of eight."""
    known = scene.from_profile("rollout.n_samples_per_prompt")
    return known or Suggestion(
        8, "groups of 8 mostly hold good and bad answers, which is what a gradient needs"
    )


def num_rollout(scene: Scene) -> Suggestion | None:
    """The profile's; else one pass over the prompts, between 20 and 200."""
    known, batch = scene.from_profile("rollout.num_rollout"), scene.number("rollout_batch_size")
    if known or scene.columns is None or not batch:
        return known
    rows = scene.columns.num_rows - (scene.number("hold_out") or 0)
    once = rows // batch
    if 20 <= once <= 200:
        return Suggestion(once, f"one pass over {rows:,} prompts")
    return Suggestion(
        min(max(once, 20), 200), f"enough to see a trend; one pass over the prompts is {once:,}"
    )


def lr(scene: Scene) -> Suggestion | None:
    """The profile's; else by the size of the model."""
    known = scene.from_profile("optimizer.lr")
    if known or scene.parameters is None:
        return known
    if scene.parameters < SMALL_PARAMETERS:
        return Suggestion(
            4e-4, "a small model takes a large rate; 3e-3 made one of 226,000 parameters collapse"
        )
    if scene.parameters < LARGE_PARAMETERS:
        return Suggestion(1e-5, "between the rates of small models and the 1e-6 of large ones")
    return Suggestion(1e-6, "RL recipes of published models stay between 5e-7 and 5e-6")


def max_tokens_per_gpu(scene: Scene) -> Suggestion | None:
    """The profile's micro-batch, halved until the run fits into memory beside a single request."""
    known = scene.from_profile("training.max_tokens_per_gpu")
    longest = (scene.number("rollout_max_prompt_len") or 0) + (scene.number("rollout_max_response_len") or 1)
    start = int(known.value) if known else MICRO_BATCH
    suggestion = known or Suggestion(start, "packing short responses beats counting samples")
    return _fitting(scene, "max_tokens_per_gpu", suggestion, longest, {"max_running_requests": 1})


def max_running_requests(scene: Scene) -> Suggestion | None:
    """The profile's number of requests, halved until the run fits into memory."""
    known = scene.from_profile("engine.max_running_requests")
    suggestion = known or Suggestion(REQUESTS, "wide batches keep the cores busy")
    return _fitting(scene, "max_running_requests", suggestion, 1, {})


def _fitting(
    scene: Scene, question: str, suggestion: Suggestion, least: int, beside: dict[str, int]
) -> Suggestion:
    """The suggestion, halved until the estimate is within the free memory, not below `least`."""
    budget = scene.machine.memory_available_bytes * MEMORY_SHARE
    number = int(suggestion.value)
    while True:
        needed = scene.world.memory_needed({**scene.answers, **beside, question: number})
        if needed is None or needed <= budget or number // 2 < least:
            break
        number //= 2
    if number == suggestion.value:
        return suggestion
    return Suggestion(number, f"{suggestion.value} would need more than the free memory of this machine")


def save_interval(scene: Scene) -> Suggestion | None:
    """The profile's; else a tenth of the run."""
    known, rollouts = scene.from_profile("checkpoint.save_interval"), scene.number("num_rollout")
    if known or not rollouts:
        return known
    return Suggestion(max(1, rollouts // 10), "a tenth of the run is the most that a crash can cost")
