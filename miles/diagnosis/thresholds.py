"""Every number that a rule compares with, named. [code], [user] and [doc] values come from the field's own
constants and threads; the others are ours, calibrated on healthy and on collapsing small runs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Thresholds:
    """Fractions are of 1, log-prob gaps in nats, windows in steps, times in seconds."""

    recent_steps: int = 20
    """A single event keeps its alarm open for this many steps of a live run."""
    mean_steps: int = 5
    """Values are averaged over this many steps before they are compared."""

    heartbeat_stale_intervals: float = 12.0
    heartbeat_stale_floor: float = 60.0
    stall_median_factor: float = 6.0
    stall_min_closed: int = 3
    stall_step_factor: float = 20.0
    """A phase may always last this many median steps of the run …"""
    stall_floor: float = 30.0
    stall_ceiling: float = 1800.0
    """… but that allowance is kept between these two."""

    identity_exact: float = 1e-9
    """Largest |ppo_kl| of the first update when trainer passes are bit-equal."""
    identity_jitter: float = 1e-4
    """The same with kernel jitter."""
    identity_clipfrac: float = 1e-3
    reference_replayed: float = 5e-3
    """Policy against reference in the first step, where one of them replays the engine's routes."""
    first_kl_warn: float = 0.5
    first_kl_bad: float = 1.0
    gap_batch_mean: float = 0.03
    gap_warn: float = 0.03
    gap_bad: float = 0.1
    gap_growth: float = 2.0
    gap_growth_points: int = 10
    gap_growth_floor: float = 0.01
    """A gap below this is kernel noise, however fast it grows."""
    gap_quantised: float = 0.3
    """FP8 rollouts with BF16 training were seen at a flat 0.27."""
    gap_deterministic: float = 1e-6
    resume_gap_factor: float = 3.0
    catastrophic_sequences: float = 0.01
    ess_warn: float = 0.8
    ess_bad: float = 0.5
    tis_clipfrac_warn: float = 0.01
    tis_clipfrac_bad: float = 0.05
    importance_low: float = 0.8
    importance_high: float = 1.2

    zero_overlap: float = 0.01
    replayed_rows: float = 0.99
    flip_warn: float = 0.2
    """About one choice in ten differs between healthy BF16 implementations; this is twice that."""
    expert_load: float = 5.0
    replay_harm: float = 2.0
    """With replay the gap must not be this many times the gap without."""

    sync_lag: int = 3
    """Steps in a row with one and the same weight version."""
    staleness: float = 4.0
    mixed_versions: float = 0.5
    garbled_log_prob: float = -4.0
    """Mean log-prob per token that no language model has of text of its own; uniform is -ln(vocabulary)."""
    draft_warn: float = 0.9
    draft_bad: float = 0.7
    draft_useless: float = 1.3
    """Accepted tokens per verification at which drafting costs more than it saves."""
    break_even: float = 1.0
    """Tokens per second with a draft over those without: exactly where it stops paying."""

    clip_share: float = 0.5
    clip_growth: float = 2.0
    clipfrac_high: float = 0.5
    kl_jump_factor: float = 5.0
    kl_jump_floor: float = 0.05
    value_clipfrac: float = 0.3
    explained_variance: float = -0.1
    draft_loss: float = 1.0

    wait_ratio: float = 0.5
    wait_ratio_async: float = 0.3
    flops_share: float = 0.15
    cache_hits: float = 0.1
    weight_density: float = 0.1

    saturated: float = 0.01
    underflow: float = 0.05
    """Of formats of eight bits; four bits round a tenth of all weights to 0."""

    grad_spike_factor: float = 10.0
    grad_spike_absolute: float = 1e3
    grad_spike_window: int = 20
    grad_spike_min_points: int = 10

    zero_std: float = 0.5
    all_zero: float = 0.95
    """Share of groups with no success at all that counts as a systematic failure."""
    no_gain_steps: int = 20
    """A reward is not called flat before this many steps."""
    truncation: float = 0.25
    length_growth: float = 1.5
    length_window: int = 20
    length_at_cap: float = 0.9
    repetition_warn: float = 0.01
    repetition_bad: float = 0.05
    none_reward_bad: float = 0.5
    hacking_evals: int = 3
    hacking_gap: float = 0.1
    hacking_noise: float = 0.02

    collapse_drop: float = 0.3
    """Share of its best level that the reward must lose."""
    collapse_noise: float = 4.0
    """… and the loss must exceed this many standard errors."""
    collapse_min_steps: int = 8
    collapse_window: int = 2000
    """How far back the best level is looked for."""
    dead_active_groups: float = 0.25
    failed_groups: float = 0.35
    """Share of groups without any success that, when it has grown, tells a dying policy from a sure one."""
    failed_growth: float = 1.5
    """… this many times what it was,"""
    failed_growth_share: float = 0.2
    """… and by this share of all groups."""
    collapse_grad_growth: float = 2.0
    collapse_length_at_cap: float = 0.8
    sudden_death_steps: int = 10
    """A reward that falls below a tenth within this many steps dies suddenly."""
    collapse_alive: float = 0.15
    """A policy that keeps this share of its best reward may be caught without going back."""
    lr_cut: float = 10.0
    lr_cut_sudden: float = 30.0
    entropy_low: float = 0.05
    entropy_fall: float = 0.7
    entropy_high: float = 1.0
    entropy_rise: float = 2.0


DEFAULT = Thresholds()
