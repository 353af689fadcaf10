"""`[eval]`: measuring the policy on held-out prompts."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from miles.config.sections.base import Section, Strings


class EvalSection(Section):
    """Evaluation sets, how often, and how they are sampled."""

    eval_interval: PositiveInt | None = None
    """Evaluate every so many rollouts; default: only before the first and after the last."""

    eval_prompt_data: Strings = ()
    """Evaluation sets: name, file, name, file, ..."""

    skip_eval_before_train: bool = False
    """Do not evaluate the policy that the run starts from."""

    eval_greedy: bool = False
    """Also report greedy accuracy."""

    eval_input_key: str | None = None
    """Column of the prompt; default: `input_key`."""

    eval_label_key: str | None = None
    """Column of the expected answer; default: `label_key`."""

    eval_tool_key: str | None = None
    """Column of tool definitions; default: `tool_key`."""

    n_samples_per_eval_prompt: PositiveInt = 1
    """Samples per evaluation prompt."""

    eval_temperature: NonNegativeFloat | None = None
    """Sampling temperature; default: `rollout_temperature`."""

    eval_top_p: Annotated[float | None, Field(gt=0.0, le=1.0)] = None
    """Nucleus sampling; default: `rollout_top_p`."""

    eval_top_k: int | None = None
    """Tokens kept for sampling; default: `rollout_top_k`."""

    eval_max_response_len: PositiveInt | None = None
    """Most tokens of a response; default: `rollout_max_response_len`."""

    eval_max_prompt_len: PositiveInt | None = None
    """Most tokens of a prompt; default: `rollout_max_prompt_len`."""

    eval_max_context_len: PositiveInt | None = None
    """Most tokens of prompt and response; default: `rollout_max_context_len`."""

    eval_min_new_tokens: NonNegativeInt = 0
    """Fewest tokens of a response."""

    eval_function_path: str | None = None
    """Python path of a function used in place of the built-in evaluation."""
