"""`[algorithm]`: loss, advantages and regularisation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt

from miles.config.sections.base import Fraction, Section


class AlgorithmSection(Section):
    """What is optimised."""

    loss_type: Literal["policy_loss", "sft_loss", "custom_loss"] = "policy_loss"
    """Policy gradient, supervised fine-tuning, or a loss of your own."""

    custom_loss_function_path: str | None = None
    """Python path of the loss of `loss_type = "custom_loss"`."""

    advantage_estimator: Literal[
        "grpo", "gspo", "cispo", "rloo", "ppo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"
    ] = "grpo"
    """How rewards become advantages."""

    eps_clip: NonNegativeFloat = 0.2
    """Lower clip range of the importance ratio: [1 - eps_clip, 1 + eps_clip_high]."""

    eps_clip_high: NonNegativeFloat | None = None
    """Upper clip range; default: `eps_clip`. Above it: clip-higher."""

    eps_clip_c: Annotated[float | None, Field(gt=1.0)] = None
    """Dual clip: the loss of a token with negative advantage stops growing at this multiple; default: off."""

    kl_coef: NonNegativeFloat = 0.0
    """Coefficient of the KL penalty inside the reward."""

    use_kl_loss: bool = False
    """Add a KL term against the reference policy to the loss."""

    kl_loss_coef: NonNegativeFloat = 0.0
    """Coefficient of the KL term of the loss."""

    kl_loss_type: Literal["k1", "k2", "k3", "low_var_kl"] = "k1"
    """Estimator of the KL divergence; `low_var_kl` is k3 with bounds."""

    use_unbiased_kl: bool = False
    """Weight the KL estimate by the importance ratio, which makes its gradient unbiased."""

    ref_update_interval: PositiveInt | None = None
    """Copy the policy into the reference every so many rollouts; default: never."""

    entropy_coef: NonNegativeFloat = 0.0
    """Coefficient of the entropy bonus."""

    observe_training_entropy: bool = False
    """Report the policy's entropy even without a bonus."""

    calculate_per_token_loss: bool = False
    """Mean over all tokens of the step; default: mean per sample, then over samples."""

    disable_rewards_normalization: bool = False
    """Use raw rewards: no mean of the group is subtracted."""

    disable_grpo_std_normalization: bool = False
    """Subtract the group's mean but do not divide by its standard deviation (Dr. GRPO)."""

    normalize_advantages: bool = False
    """Whiten advantages over the whole batch."""

    gamma: Fraction = 1.0
    """Discount per token (PPO, REINFORCE++)."""

    lambd: Fraction = 1.0
    """Lambda of generalised advantage estimation (PPO)."""

    use_rollout_logprobs: bool = False
    """Take the engine's log-probs as those of the old policy; no old forward pass."""

    keep_old_actor: bool = False
    """Keep the weights that sampled, and compute old log-probs with them."""

    use_opsm: bool = False
    """Off-policy sequence masking: drop sequences with negative advantage that drifted."""

    opsm_delta: NonNegativeFloat = 1e-4
    """Mean log-ratio above which a sequence counts as drifted."""

    custom_advantage_function_path: str | None = None
    """Python path of a function used in place of the advantage estimator."""

    custom_pg_loss_reducer_function_path: str | None = None
    """Python path of a function that replaces the reduction of the policy loss."""
