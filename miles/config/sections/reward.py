"""`[reward]`: who judges a response."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from miles.config.sections.base import Section


class RewardSection(Section):
    """The verifier or reward model, and shaping of what it returns."""

    rm_type: (
        Literal[
            "exact",
            "math",
            "boxed_exact",
            "boxed_math",
            "dapo",
            "deepscaler",
            "f1",
            "gpqa",
            "ifbench",
            "remote_rm",
            "random",
        ]
        | None
    ) = None
    """Built-in verifier; `boxed_` judges only what stands in the last `boxed{}`; `random` finds half of all
    responses right, whatever they say."""

    reward_key: str | None = None
    """Entry to use where the reward is a table."""

    eval_reward_key: str | None = None
    """Entry to use in evaluation; default: `reward_key`."""

    custom_rm_path: str | None = None
    """Python path of your reward function: `async def reward(args, sample) -> float`."""

    group_rm: bool = False
    """Judge the samples of a prompt together, in one call."""

    num_reward_workers: PositiveInt = 1
    """Processes that judge responses, where workers have processes of their own."""

    rm_url: str | None = None
    """Address of a reward server (`rm_type = "remote_rm"`)."""

    custom_reward_post_process_path: str | None = None
    """Python path of a function that replaces the group normalisation of rewards."""

    overlong_buffer_len: NonNegativeInt = 0
    """DAPO's soft punishment: tokens before `rollout_max_response_len` over which a penalty grows."""

    overlong_penalty_factor: NonNegativeFloat = 1.0
    """Penalty of a response that uses the whole buffer."""
