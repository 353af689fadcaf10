"""`[rollout]`: how many samples are drawn, and how."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from miles.config.sections.base import Flag, Integers, Section, Strings


class RolloutSection(Section):
    """Sampling of the policy: amounts, limits, filters and schedule."""

    backend: Annotated[Literal["native", "sglang"], Flag("--rollout-backend")] = "native"
    """Engine that samples: miles' own, or SGLang servers."""

    num_rollout: PositiveInt | None = None
    """Number of rollouts of the run: each is one round of sampling and training."""

    num_epoch: PositiveInt | None = None
    """Passes over the prompts; gives `num_rollout` where that is not set."""

    rollout_batch_size: PositiveInt | None = None
    """Prompts per rollout. `rollout_batch_size x n_samples_per_prompt = global_batch_size x
    num_steps_per_rollout`."""

    n_samples_per_prompt: PositiveInt = 1
    """Samples drawn from each prompt: the group that advantages are normalised in."""

    over_sampling_batch_size: PositiveInt | None = None
    """Prompts in flight at once; more than `rollout_batch_size` makes up for filtered groups."""

    dynamic_sampling_filter_path: str | None = None
    """Python path of a function that keeps or drops a finished group."""

    rollout_sample_filter_path: str | None = None
    """Python path of a function that masks samples of the finished rollout."""

    buffer_filter_path: str | None = None
    """Python path of a function that chooses which buffered groups go first; default: the oldest."""

    partial_rollout: bool = False
    """Keep unfinished samples and continue them in the next rollout."""

    mask_offpolicy_in_partial_rollout: bool = False
    """Leave tokens sampled by older weights out of the loss."""

    one_step_ahead: bool = False
    """Sample rollout i + 1 while training on rollout i."""

    fully_async: bool = False
    """Sample without pause; training takes finished groups as they come."""

    max_weight_staleness: NonNegativeInt | None = None
    """Weight versions (steps of the trainer) that the oldest token of a group may lag behind the weights that
    learn from it; default: only the buffer bounds it."""

    async_max_concurrent_samples: PositiveInt | None = None
    """Samples in flight under `fully_async`, in whole groups; default: those of one rollout."""

    async_data_buffer_capacity_factor: Annotated[float, Field(ge=1.0)] = 2.0
    """Groups in flight or finished and not taken under `fully_async`, in units of `rollout_batch_size`."""

    async_unused_samples_handler: Literal["retry", "drop"] = "retry"
    """Where a group grew too stale: its prompt goes back and is sampled again, or is dropped with it."""

    rollout_temperature: NonNegativeFloat = 1.0
    """Sampling temperature; 0 is greedy."""

    rollout_top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Nucleus sampling: probability mass that is kept."""

    rollout_top_k: int = -1
    """Tokens kept for sampling; -1 keeps all."""

    rollout_max_response_len: PositiveInt | None = None
    """Most tokens of a response."""

    rollout_max_prompt_len: PositiveInt | None = None
    """Most tokens of a prompt; longer prompts are left out and counted."""

    rollout_max_context_len: PositiveInt | None = None
    """Most tokens of prompt and response together."""

    rollout_stop: Strings = ()
    """Strings that end a response: at the first token after which its text, special tokens included, contains
    one of them. The tokens stay in the response."""

    rollout_stop_token_ids: Integers = ()
    """Token ids that end a response, beside the checkpoint's own."""

    rollout_skip_special_tokens: bool = False
    """Leave special tokens out of the response text (never out of its tokens)."""

    rollout_seed: NonNegativeInt = 42
    """Seed of sampling and of the order of prompts."""

    rollout_function_path: str | None = None
    """Python path of a function used in place of the built-in collector."""

    custom_generate_function_path: str | None = None
    """Python path of a function that turns one prompt into a sample: tools, several turns, environments."""

    rollout_external_engine_addrs: Strings = ()
    """Addresses of SGLang servers that already run; none is started."""
